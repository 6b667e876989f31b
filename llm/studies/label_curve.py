"""How many labels is pretraining worth? Two arms of one architecture, and the classical models.

For each number of labels, several draws of the training labels are fine-tuned on. The arms,
pretrained and scratch, see the same draws, batches and fresh head. The learning rate and the epochs
of each arm, and the regularisation of the classical models, are chosen on the validation split. The
test split is scored once, with what was chosen. A run diverges if what it computes is not finite:
the search counts it and does not choose its learning rate.
"""

import dataclasses
import itertools
import math
from typing import Any, Mapping, Protocol, Sequence, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
import scipy.stats
import tqdm
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from llm.config import DataConfig, ModelConfig, OptimizerConfig
from llm.core import Batch, Leaves, Params, TrainState, UserError, flatten
from llm.data.sources import Source
from llm.data.tokenizer import Tokenizer
from llm.models import classical
from llm.objectives import base, classification
from llm.training import experiment, partition
from llm.training import optimizer as optimizer_lib
from llm.training import step as step_lib

# Rows of held-out text at a time.
EVAL_ROWS = 256


class Bar(Protocol):
  """A progress bar."""

  def update(self) -> Any: ...


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


@dataclasses.dataclass(frozen=True)
class Run:
  """One fine-tuning of an arm. rows: of the training split."""

  arm: str
  rows: tuple[int, ...]
  learning_rate: float
  epochs: int
  seed: int


@dataclasses.dataclass(frozen=True)
class Split:
  """A split: texts, labels, and the arrays of a batch that holds all of its rows."""

  texts: list[str]
  labels: np.ndarray
  arrays: dict[str, np.ndarray]


def encode(
  objective: classification.Objective,
  source: Source,
  tokenizer: Tokenizer,
  model: ModelConfig,
  length: int,
) -> Split:
  """All records of a source as one batch on the host. Draws pick records, so each has a row."""
  records = list(source.records())
  rows = objective.rows(source, tokenizer, DataConfig(), model, length).apart()
  unused_rng = np.random.default_rng(0)  # rows of this objective are not random
  examples = [rows.example(i, unused_rng) for i in range(len(rows))]
  return Split(
    texts=[record["text"] for record in records],
    labels=rows.labels.astype(int),
    arrays={name: np.stack([e[name] for e in examples]) for name in examples[0]},
  )


class FineTuner:
  """Fine-tunes many small runs, one on each device at a time, with one compiled step for all.

  Learning rate, length and warm-up of the schedule are arguments of that step, so a search compiles
  nothing new.
  """

  def __init__(
    self,
    objective: classification.Objective,
    model_config: ModelConfig,
    starts: Mapping[str, Params],
    batch_size: int,
    mesh: Mesh,
  ):
    """starts: arm -> parameters at step 0. batch_size: of one run."""
    self.objective = objective
    self.num_layers = model_config.num_layers
    self.model = experiment.build(objective, model_config, trains=True)
    self.batch_size = batch_size
    self.mesh = mesh
    self.by_device = NamedSharding(mesh, P(mesh.axis_names))
    self.starts = {arm: jax.tree.map(np.asarray, flatten(params)) for arm, params in starts.items()}
    self.none_frozen = {path: [False] for path in next(iter(self.starts.values()))}
    self.settings = OptimizerConfig(schedule="linear")
    # Each takes one run a device, along the first axis of its arguments.
    self.init_states = jax.jit(jax.vmap(self._init_state))
    self.train_steps = jax.jit(jax.vmap(self._train_step), donate_argnums=0)
    self.predictions = jax.jit(jax.vmap(self._predictions))

  def _optimizer(self, rate: Any, steps: Any, trained: Leaves) -> optax.GradientTransformation:
    """rate, steps: numbers, or arguments of the compiled step."""
    return optimizer_lib.make(
      self.settings, trained, self.num_layers, steps, rate, warmup=steps // 10
    )

  def _init_state(self, params: Leaves) -> TrainState:
    return step_lib.init_state(params, {}, self._optimizer(0.0, 1, params))

  def _train_step(
    self, state: TrainState, batch: Batch, rate: jax.Array, steps: jax.Array, seed: jax.Array
  ) -> TrainState:
    optimizer = self._optimizer(rate, steps, state.trained)
    state, _ = step_lib.train_step(
      self.model, self.objective, optimizer, self.none_frozen, 1, state, batch, seed
    )
    return state

  def _predictions(self, params: Leaves, batch: Batch) -> jax.Array:
    """The most probable class of every row; -1 where the logits are not finite."""
    merged = partition.merge(params, {}, self.none_frozen)
    outputs = cast(base.Outputs, self.model.apply({"params": merged}, batch, train=False))
    logits_BxNxC = outputs["logits"]  # a row is one example
    logits_BxC = logits_BxNxC[:, 0]
    return jnp.where(jnp.isfinite(logits_BxC).all(-1), logits_BxC.argmax(-1), -1)

  def accuracies(self, runs: Sequence[Run], train: Split, held_out: Split, bar: Bar) -> list[float]:
    """The accuracy of every run on `held_out`, in the order of `runs`; NaN where it diverged."""
    waiting = sorted(range(len(runs)), key=lambda number: self._steps(runs[number]))
    accuracies = [0.0] * len(runs)
    devices = self.mesh.size
    while waiting:
      # Runs of equal length go side by side. Copies of the first one fill the other devices.
      steps = self._steps(runs[waiting[0]])
      group = [number for number in waiting[:devices] if self._steps(runs[number]) == steps]
      waiting = waiting[len(group) :]
      side_by_side = [runs[number] for number in group]
      side_by_side += [side_by_side[0]] * (devices - len(group))
      for number, accuracy in zip(group, self._accuracies(side_by_side, steps, train, held_out)):
        accuracies[number] = accuracy
        bar.update()
    return accuracies

  def _steps(self, run: Run) -> int:
    return -(-len(run.rows) // self.batch_size) * run.epochs

  def _stacked(self, of_runs: Sequence[Any]) -> jax.Array:
    """A value of each run -> one array, each value on the device of its run."""
    return jax.device_put(np.stack(of_runs), self.by_device)

  def _accuracies(
    self, runs: Sequence[Run], steps: int, train: Split, held_out: Split
  ) -> list[float]:
    """Trains one run on each device, all of the same length, and scores them."""
    params = {
      path: self._stacked([self.starts[run.arm][path] for run in runs]) for path in self.none_frozen
    }
    states = self.init_states(params)
    rates = self._stacked([np.float32(run.learning_rate) for run in runs])
    seeds = self._stacked([run.seed for run in runs])
    lengths = self._stacked([np.int32(steps)] * len(runs))
    orders = [self._order(run) for run in runs]
    for step in range(steps):
      now = slice(step * self.batch_size, (step + 1) * self.batch_size)
      batch = {
        name: self._stacked([array[order[now]] for order in orders])
        for name, array in train.arrays.items()
      }
      states = jax.block_until_ready(self.train_steps(states, batch, rates, lengths, seeds))
    return self._score(states.trained, len(runs), held_out)

  def _order(self, run: Run) -> np.ndarray:
    """The rows of all batches: each epoch shuffled, its last batch filled up from its beginning."""
    rng = np.random.default_rng((run.seed, 1))
    rows = np.array(run.rows)
    size = -(-len(run.rows) // self.batch_size) * self.batch_size
    return np.concatenate([np.resize(rng.permutation(rows), size) for _ in range(run.epochs)])

  def _score(self, params: Leaves, runs: int, held_out: Split) -> list[float]:
    """The accuracy of each of so many runs, NaN where one diverged."""
    count = len(held_out.labels)
    predictions = []
    for start in range(0, count, EVAL_ROWS):
      rows = np.arange(start, start + EVAL_ROWS) % count
      batch = {name: self._stacked([array[rows]] * runs) for name, array in held_out.arrays.items()}
      predictions.append(np.asarray(self.predictions(params, batch)))
    predicted = np.concatenate(predictions, axis=1)[:, :count]
    accuracies = (predicted == held_out.labels).mean(1)
    diverged = (predicted < 0).any(1)
    return [float(accuracy) for accuracy in np.where(diverged, math.nan, accuracies)]


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

  diverged: how many of its `runs` did. Raises UserError where all choices of an arm diverge.
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
      raise UserError(
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
  """(mean, low, high) of a - b, with the 95% interval of Student's t over the pairs."""
  difference = np.asarray(a) - np.asarray(b)
  count = len(difference)
  mean = float(difference.mean())
  if count < 2 or difference.std() == 0:
    return mean, mean, mean
  half = float(scipy.stats.t.ppf(0.975, count - 1) * difference.std(ddof=1) / count**0.5)
  return mean, mean - half, mean + half


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
