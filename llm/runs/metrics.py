"""Means of the metrics of several steps, and confidence intervals."""

from typing import Callable

import numpy as np
import tqdm


def means(history: list[dict]) -> dict[str, float]:
  """(sum, weight) pairs of several steps -> one mean for each name.

  Where an objective has several terms called *_loss, `loss` is the sum of their means.
  """
  totals = {}
  for metrics in history:
    for name, (value, weight) in metrics.items():
      total = totals.setdefault(name, [0.0, 0.0])
      total[0] += float(value)
      total[1] += float(weight)
  result = {name: value / weight if weight else 0.0 for name, (value, weight) in totals.items()}
  if "loss" not in result:
    loss = sum(value for name, value in result.items() if name.endswith("_loss"))
    result = {"loss": loss, **result}
  return result


def bootstrap(
  summary: Callable[[dict[str, np.ndarray]], dict[str, float]],
  outcomes: dict[str, np.ndarray],
  draws: int = 1000,
) -> dict[str, tuple[float, float]]:
  """95% percentile intervals (low, high) of every figure of `summary` (Efron 1979).

  Records are drawn with replacement, as many as there are, `draws` times. outcomes: arrays with
  one entry a record; without any, there are no intervals.
  """
  if not outcomes:
    return {}
  count = len(next(iter(outcomes.values())))
  rng = np.random.default_rng(0)
  figures = []
  for _ in tqdm.tqdm(range(draws), desc="bootstrap", unit=" draws", disable=None, leave=False):
    drawn = rng.integers(count, size=count)
    figures.append(summary({name: values[drawn] for name, values in outcomes.items()}))
  return {name: _interval([drawn[name] for drawn in figures]) for name in figures[0]}


def _interval(values: list[float]) -> tuple[float, float]:
  low, high = np.nanpercentile(values, [2.5, 97.5])
  return float(low), float(high)
