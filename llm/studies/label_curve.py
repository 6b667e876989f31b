"""How many labels is pretraining worth? Two arms of one architecture, and the classical models.

For each number of labels, several draws of the training labels are fine-tuned on. The arms,
pretrained and scratch, see the same draws, batches and fresh head. The learning rate and the epochs
of each arm, and the regularisation of the classical models, are chosen on the validation split. The
test split is scored once, with what was chosen. A run diverges if what it computes is not finite:
the search counts it and does not choose its learning rate.
"""

import dataclasses
import itertools
from typing import Any, Mapping, Sequence

import numpy as np
import tqdm

from llm.core import Diverged, UserError
from llm.models import classical
from llm.runs import metrics
from llm.studies.fine_tuner import Bar, FineTuner, Run, Split


@dataclasses.dataclass(frozen=True)
class Setting:
  """One point of the label curve.

  labels: 0 is all. searched: the number of draws that the search runs on.
  """

  labels: int
  draws: int
  searched: int
  learning_rates: tuple[float, ...]
  epochs: tuple[int, ...]

  @property
  def choices(self) -> list[tuple[float, int]]:
    """(learning rate, epochs) of each run of the search."""
    return list(itertools.product(self.learning_rates, self.epochs))

  def distinct_draws(self) -> int:
    """Draws that differ: with all labels, a linear model gives the same each time."""
    return self.draws if self.labels else 1


def draw(train: Split, labels: int, number: int) -> tuple[int, ...]:
  """The rows of one draw of so many labels; all rows where `labels` is 0."""
  if not labels:
    return tuple(range(len(train.labels)))
  rng = np.random.default_rng((labels, number))
  return tuple(int(row) for row in rng.choice(len(train.labels), labels, replace=False))


def check_labels(settings: Sequence[Setting], train: Split):
  """Raises UserError where a setting has more labels than there are, or there is one class."""
  count = len(train.labels)
  for setting in settings:
    if setting.labels > count:
      raise UserError(
        f"{setting.labels:,} labels were asked for, but the training split has {count:,} (0 takes "
        "all)"
      )
  if len(np.unique(train.labels)) < 2:
    raise UserError("the training split has one class alone; a label curve needs two")


def to_search(validation: Split | None) -> Split:
  """The validation split. Raises UserError where there is none."""
  if validation is None or not len(validation.labels):
    raise UserError(
      "a search needs validation data, and there are none: they choose learning rate, epochs and "
      "regularisation, which test data must not"
    )
  return validation


def _draws(setting: Setting, train: Split) -> list[tuple[int, ...]]:
  return [draw(train, setting.labels, number) for number in range(setting.draws)]


def measure(
  tuner: FineTuner, setting: Setting, train: Split, validation: Split | None, test: Split, bar: Bar
) -> list[dict]:
  """A result row for each arm. Where there is only one choice, nothing is searched.

  A run that diverges after the search has labelled nothing right.
  """
  check_labels([setting], train)
  draws = _draws(setting, train)
  chosen = _search(tuner, setting, draws, train, validation, bar)
  runs = [
    Run(arm, rows, chosen[arm]["learning_rate"], chosen[arm]["epochs"], seed)
    for arm in tuner.starts
    for seed, rows in enumerate(draws)
  ]
  accuracies = np.array(tuner.accuracies(runs, train, test, bar)).reshape(len(tuner.starts), -1)
  results = []
  for arm, of_arm in zip(tuner.starts, accuracies):
    result = _row(arm, len(draws[0]), np.nan_to_num(of_arm, nan=0.0).tolist(), chosen[arm])
    results.append({**result, "diverged": int(np.isnan(of_arm).sum())})
  return results


def _search(
  tuner: FineTuner,
  setting: Setting,
  draws: list[tuple[int, ...]],
  train: Split,
  validation: Split | None,
  bar: Bar,
) -> dict[str, dict[str, Any]]:
  """Arm -> the learning rate and epochs that are best on the validation split, and how good.

  diverged: how many of its `runs` did. Raises Diverged where all choices of an arm do.
  """
  choices = setting.choices
  if len(choices) == 1:
    rate, epochs = choices[0]
    return {arm: {"learning_rate": rate, "epochs": epochs} for arm in tuner.starts}
  # All arms in one call, so that runs of equal length fill the devices.
  runs = [
    Run(arm, draws[seed], rate, epochs, seed)
    for arm in tuner.starts
    for rate, epochs in choices
    for seed in range(setting.searched)
  ]
  accuracies = np.array(tuner.accuracies(runs, train, to_search(validation), bar))
  by_arm = accuracies.reshape(len(tuner.starts), len(choices), -1)
  chosen = {}
  for arm, accuracies_CxD in zip(tuner.starts, by_arm):
    scores = accuracies_CxD.mean(-1)  # NaN where a draw diverged
    if np.isnan(scores).all():
      rates = ", ".join(f"{rate:g}" for rate in setting.learning_rates)
      raise Diverged(
        f"the search of {arm} at {len(draws[0]):,} labels diverged at every learning rate: {rates}"
      )
    best = int(np.nanargmax(scores))
    rate, epochs = choices[best]
    chosen[arm] = {
      "learning_rate": rate,
      "epochs": epochs,
      "validation": float(scores[best]),
      "runs": accuracies_CxD.size,
      "diverged": int(np.isnan(accuracies_CxD).sum()),
    }
  return chosen


def measure_classical(
  setting: Setting, train: Split, validation: Split | None, test: Split, bar: Bar
) -> list[dict]:
  """A result row for each classical model, its regularisation chosen on the validation split."""
  check_labels([setting], train)
  searched = to_search(validation)
  draws = _draws(setting, train)[: setting.distinct_draws()]

  def accuracy(name: str, strength: float, rows: tuple[int, ...], held_out: Split) -> float:
    bar.update()
    drawn = [train.texts[row] for row in rows], train.labels[list(rows)]
    return classical.accuracy(name, strength, drawn, (held_out.texts, held_out.labels))

  results = []
  for name in classical.MODELS:
    scores = []
    for strength in classical.STRENGTHS:
      of_draws = [accuracy(name, strength, rows, searched) for rows in draws[: setting.searched]]
      scores.append(np.mean(of_draws))
    best = classical.STRENGTHS[int(np.argmax(scores))]
    accuracies = [accuracy(name, best, rows, test) for rows in draws]
    chosen = {"strength": best, "validation": float(max(scores))}
    results.append(_row(name, len(draws[0]), accuracies, chosen))
  return results


def count_fits(setting: Setting, arms: int) -> int:
  """How many runs `measure` trains: for the progress bar."""
  choices = len(setting.choices)
  searched = choices * setting.searched if choices > 1 else 0
  return arms * (setting.draws + searched)


def total_steps(setting: Setting, row: Mapping[str, Any], batch_size: int) -> int:
  """The training steps behind a row of `measure`, those of its search included."""
  epochs = setting.draws * row["chosen"]["epochs"]
  if len(setting.choices) > 1:
    epochs += setting.searched * sum(epochs for _, epochs in setting.choices)
  return epochs * -(-row["labels"] // batch_size)


def count_classical_fits(setting: Setting) -> int:
  """How many models `measure_classical` fits."""
  draws = setting.distinct_draws()
  searched = len(classical.STRENGTHS) * min(setting.searched, draws)
  return len(classical.MODELS) * (draws + searched)


def _row(model: str, labels: int, accuracies: list[float], chosen: dict[str, Any]) -> dict:
  return {
    "model": model,
    "labels": labels,
    "seeds": len(accuracies),
    "accuracy_mean": float(np.mean(accuracies)),
    "accuracy_std": float(np.std(accuracies, ddof=1)) if len(accuracies) > 1 else 0.0,
    "accuracies": accuracies,
    "chosen": chosen,
  }


def paired_difference(a: Sequence[float], b: Sequence[float]) -> tuple[float, float, float]:
  """(mean, low, high) of a - b, with the 95% interval of Student's t over the pairs; NaN of one."""
  difference = np.asarray(a) - np.asarray(b)
  return float(difference.mean()), *metrics.seeds_interval(difference[None])


def in_points(mean: float, low: float, high: float) -> str:
  """A difference of accuracies in points, with its interval, which one draw has not."""
  if np.isnan(low):
    return f"{100 * mean:+.1f} (one draw)"
  return f"{100 * mean:+.1f} [{100 * low:+.1f}, {100 * high:+.1f}]"


def verdict(low: float, high: float, lower: bool = False) -> str:
  """What the interval of pretrained - scratch says; nothing where one draw has none.

  lower: whether less is better.
  """
  if np.isnan(low):
    return ""
  if low <= 0 <= high:
    return "not told apart"
  return "pretraining helps" if (high < 0) == lower else "pretraining harms"


def equivalent_labels(
  accuracies: Sequence[float], curve: Mapping[int, Sequence[float]], draws: int = 2000
) -> tuple[float, float, float]:
  """(labels, low, high): how many labels the arm of `curve` needs for the mean of `accuracies`.

  curve: labels -> the accuracies of that arm. The mean accuracy is interpolated over the logarithm
  of the labels, and cannot fall. Labels outside the curve become its ends. low, high: 95% bootstrap
  interval over the draws of both.
  """
  counts = sorted(curve)

  def labels_for(target: float, means: Sequence[float]) -> float:
    rising = np.maximum.accumulate(means) + 1e-9 * np.arange(len(means))
    return float(np.exp(np.interp(target, rising, np.log(counts))))

  rng = np.random.default_rng(0)

  def drawn_mean(values: Sequence[float]) -> float:
    return float(rng.choice(values, len(values)).mean())

  equivalents = [
    labels_for(drawn_mean(accuracies), [drawn_mean(curve[count]) for count in counts])
    for _ in range(draws)
  ]
  low, high = np.percentile(equivalents, [2.5, 97.5])
  mean = labels_for(float(np.mean(accuracies)), [float(np.mean(curve[c])) for c in counts])
  return mean, float(low), float(high)


def in_labels(labels: float, fewest: float, most: float) -> str:
  """A result of `equivalent_labels`, whose curve goes from `fewest` to `most` labels."""
  if labels >= 0.999 * most:
    return f"{most:,} or more"
  if labels <= 1.001 * fewest:
    return f"{fewest:,} or fewer"
  return f"{labels:,.0f}"


def run(
  tuner: FineTuner, settings: Sequence[Setting], train: Split, validation: Split | None, test: Split
) -> tuple[list[dict], list[dict]]:
  """All settings, with a progress bar -> (a row a model and setting, a difference a setting)."""
  # Before the first run, not after hours of them.
  check_labels(settings, train)
  to_search(validation)
  rows = []
  differences = []
  total = sum(count_fits(s, len(tuner.starts)) + count_classical_fits(s) for s in settings)
  with tqdm.tqdm(desc="fine-tuning", total=total, unit=" runs", disable=None) as bar:
    for setting in settings:
      of_setting = measure(tuner, setting, train, validation, test, bar)
      of_setting += measure_classical(setting, train, validation, test, bar)
      difference = _difference(of_setting)
      rows += of_setting
      differences.append(difference)
      tqdm.tqdm.write(f"{difference['labels']} labels: {', '.join(map(in_words, of_setting))}")
  return rows, differences


def in_words(row: Mapping[str, Any]) -> str:
  """The mean accuracy of a result row, and how many runs diverged where some did."""
  words = f"{row['model']} {100 * row['accuracy_mean']:.1f}"
  chosen = row["chosen"]
  if chosen.get("diverged"):
    words += f" ({chosen['diverged']} of the {chosen['runs']} runs of its search diverged)"
  if row.get("diverged"):
    words += f" ({row['diverged']} of its {row['seeds']} runs diverged and count as 0)"
  return words


def _difference(rows: list[dict]) -> dict[str, float]:
  """The gain of pretraining, with its interval, from the rows of one setting."""
  by_model = {row["model"]: row for row in rows}
  pretrained = by_model["pretrained"]
  mean, low, high = paired_difference(pretrained["accuracies"], by_model["scratch"]["accuracies"])
  return {
    "labels": pretrained["labels"],
    "pretrained_minus_scratch": mean,
    "low": low,
    "high": high,
  }
