"""Sums to means, and intervals of figures of merit."""

from typing import Callable

import numpy as np
import tqdm


def means(history: list[dict]) -> dict[str, float]:
  """(sum, weight) pairs of several steps -> one mean each.

  `loss` is the sum of the terms called *_loss where an objective has several.
  """
  totals = {}
  for metrics in history:
    for name, (value, weight) in metrics.items():
      sums = totals.setdefault(name, [0.0, 0.0])
      sums[0] += float(value)
      sums[1] += float(weight)
  out = {name: value / weight if weight else 0.0 for name, (value, weight) in totals.items()}
  if "loss" not in out:
    out = {"loss": sum(v for k, v in out.items() if k.endswith("_loss")), **out}
  return out


def bootstrap(
  summary: Callable, outcomes: dict[str, np.ndarray], draws: int = 1000
) -> dict[str, tuple[float, float]]:
  """95% percentile intervals of each figure of `summary`, by drawing records again (Efron 1979).

  {} where there are no outcomes by record.
  """
  if not outcomes:
    return {}
  count, rng = len(next(iter(outcomes.values()))), np.random.default_rng(0)
  figures = []
  for _ in tqdm.tqdm(range(draws), desc="bootstrap", unit=" draws", disable=None, leave=False):
    drawn = rng.integers(count, size=count)
    figures.append(summary({name: values[drawn] for name, values in outcomes.items()}))
  return {name: _interval([f[name] for f in figures]) for name in figures[0]}


def _interval(values: list[float]) -> tuple[float, float]:
  low, high = np.nanpercentile(values, [2.5, 97.5])
  return float(low), float(high)
