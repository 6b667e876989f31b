"""Means of the metrics of several steps, and confidence intervals."""

import json
from typing import Any, Callable, Mapping, Sequence

import numpy as np
import tqdm

Totals = dict[str, list[float]]  # name -> [sum, weight]


def add(totals: Totals, metrics: Mapping[str, Any]) -> None:
  """Adds the (sum, weight) pairs of one more step."""
  for name, (value, weight) in metrics.items():
    total = totals.setdefault(name, [0.0, 0.0])
    total[0] += float(value)
    total[1] += float(weight)


def means(history: Sequence[Mapping[str, Any]]) -> dict[str, float]:
  """(sum, weight) pairs of several steps -> one mean for each name that had a weight."""
  totals: Totals = {}
  for metrics in history:
    add(totals, metrics)
  return means_of({name: total for name, total in totals.items() if total[1]})


def means_of(totals: Totals) -> dict[str, float]:
  """One mean for each name.

  Where an objective has several terms called *_loss, `loss` is the sum of their means.
  """
  result = {name: value / weight if weight else 0.0 for name, (value, weight) in totals.items()}
  terms = [value for name, value in result.items() if name.endswith("_loss")]
  if terms and "loss" not in result:
    result = {"loss": sum(terms), **result}
  return result


def as_json(figures: Any) -> Any:
  """Figures as JSON can have them: null where a number is not finite."""
  return json.loads(json.dumps(figures), parse_constant=lambda _: None)


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
  drawn = {name: np.array([of_draw[name] for of_draw in figures]) for name in figures[0]}
  # A figure that no draw has a value for has no interval.
  return {name: _interval(values) for name, values in drawn.items() if np.isfinite(values).any()}


def seeds_interval(
  values_SxN: np.ndarray, weights_N: np.ndarray | None = None
) -> tuple[float, float]:
  """95% interval (low, high) of the mean of the seeds' sums over the sum of the weights.

  Seeds and records are both taken as drawn: Student's t with the variances of their means added,
  and the degrees of freedom of Welch and Satterthwaite. A bootstrap of two or three seeds would be
  too narrow. With one seed the interval is that of the records alone. weights_N: of the records;
  None is 1 for each. NaN where there is one value.
  """
  import scipy.special  # every command would wait for it

  if values_SxN.size < 2:
    return float("nan"), float("nan")
  records = values_SxN.shape[1]
  weights_N = np.ones(records) if weights_N is None else weights_N
  mean = values_SxN.sum(axis=1).mean() / weights_N.sum()
  # What each value adds to the ratio, to first order.
  parts_SxN = mean + (values_SxN - mean * weights_N) / weights_N.mean()
  variance = freedom = 0.0
  for means in (parts_SxN.mean(axis=1), parts_SxN.mean(axis=0)):
    if len(means) > 1:
      share = means.var(ddof=1) / len(means)
      variance += share
      freedom += share**2 / (len(means) - 1)
  if variance == 0:
    return float(mean), float(mean)
  half = scipy.special.stdtrit(variance**2 / freedom, 0.975) * variance**0.5
  return float(mean - half), float(mean + half)


def _interval(values: np.ndarray) -> tuple[float, float]:
  low, high = np.nanpercentile(values, [2.5, 97.5])
  return float(low), float(high)
