"""How many labels is pretraining worth? Two arms of one architecture, and the classical models.

For each number of labels several draws of the training labels; the arms (pretrained and scratch)
see the same draws, batches and fresh head. Learning rate and epochs of each arm, and the
regularisation of the classical models, are chosen on the validation split; the test split is looked
at once, with what was chosen.
"""

import dataclasses
import itertools
from typing import Sequence

import jax
import numpy as np
import scipy.stats
import tqdm
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from llm.config import DataConfig, OptimizerConfig
from llm.core import flatten
from llm.objectives import classification
from llm.studies import classical
from llm.training import experiment, partition
from llm.training import optimizer as optimizer_lib
from llm.training import step as step_lib


@dataclasses.dataclass(frozen=True)
class Setting:
  """One point of the label curve. labels: 0 is all. searched: draws that the search runs on."""

  labels: int
  draws: int
  searched: int
  learning_rates: tuple[float, ...]
  epochs: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Run:
  """One fine-tuning: an arm, the rows it is trained on, how."""

  arm: str
  rows: tuple[int, ...]
  learning_rate: float
  epochs: int
  seed: int


@dataclasses.dataclass(frozen=True)
class Split:
  """A split as texts, labels and the arrays of a batch over all of its rows."""

  texts: list[str]
  labels: np.ndarray
  arrays: dict[str, np.ndarray]


def encode(objective: classification.Objective, source, tokenizer, model, length: int) -> Split:
  """All records of a source as one batch on the host, one a row, as draws pick single records."""
  records = list(source.records())
  rows = objective.rows(source, tokenizer, DataConfig(), model, length).apart()
  chance = np.random.default_rng(0)  # of which none is drawn
  examples = [rows.example(i, chance) for i in range(len(rows))]
  return Split(
    [r["text"] for r in records],
    rows.labels.astype(int),
    {k: np.stack([e[k] for e in examples]) for k in examples[0]},
  )


class FineTuner:
  """Fine-tunes many small runs, one on each device at a time, with one compiled step for all.

  Learning rate, length and warm-up of the schedule are arguments of the step, so a search compiles
  nothing. starts: arm -> parameters at step 0.
  """

  def __init__(self, objective, model_config, starts: dict, batch_size: int, mesh: Mesh):
    self.model = experiment.build(objective, model_config, trains=True)
    self.batch_size, self.mesh = batch_size, mesh
    self.by_device = NamedSharding(mesh, P(mesh.axis_names))
    self.starts = {arm: jax.tree.map(np.asarray, flatten(params)) for arm, params in starts.items()}
    self.marks = {path: [False] for path in next(iter(self.starts.values()))}
    self.settings = OptimizerConfig(schedule="linear")
    layers = model_config.num_layers

    def optimizer(rate, steps, trained):
      return optimizer_lib.make(self.settings, trained, layers, steps, rate, warmup=steps // 10)

    def first(params):
      return step_lib.init_state(params, {}, optimizer(0.0, 1, params))

    def train(state, batch, rate, steps, seed):
      return step_lib.train_step(
        self.model,
        objective,
        optimizer(rate, steps, state.trained),
        self.marks,
        1,
        state,
        batch,
        seed,
      )[0]

    def guess(params, batch):
      outputs = self.model.apply(
        {"params": partition.merge(params, {}, self.marks)}, batch, train=False
      )
      return outputs["logits"][:, 0].argmax(-1)

    self.first = jax.jit(jax.vmap(first))
    self.train = jax.jit(jax.vmap(train), donate_argnums=0)
    self.guess = jax.jit(jax.vmap(guess))

  def accuracies(self, runs: Sequence[Run], train: Split, held_out: Split, bar) -> list[float]:
    """Accuracy of every run on held_out, in order."""
    order = sorted(range(len(runs)), key=lambda i: self._steps(runs[i]))
    out = [0.0] * len(runs)
    lanes = self.mesh.size
    while order:
      steps = self._steps(runs[order[0]])
      together = [i for i in order[:lanes] if self._steps(runs[i]) == steps]
      order = order[len(together) :]
      filled = [runs[i] for i in together] + [runs[together[0]]] * (lanes - len(together))
      for i, value in zip(together, self._accuracies(filled, steps, train, held_out)):
        out[i] = value
        bar.update()
    return out

  def _steps(self, run: Run) -> int:
    return -(-len(run.rows) // self.batch_size) * run.epochs

  def _put(self, tree):
    return jax.device_put(tree, self.by_device)

  def _accuracies(self, runs, steps, train, held_out):
    stacked = lambda values: self._put(np.stack(values))
    params = {path: stacked([self.starts[r.arm][path] for r in runs]) for path in self.marks}
    state = self.first(params)
    rates, seeds = (
      stacked([np.float32(r.learning_rate) for r in runs]),
      stacked([r.seed for r in runs]),
    )
    lengths = stacked([np.int32(steps)] * len(runs))
    orders = [self._order(run) for run in runs]
    for number in range(steps):
      here = slice(number * self.batch_size, (number + 1) * self.batch_size)
      batch = {k: stacked([v[o[here]] for o in orders]) for k, v in train.arrays.items()}
      state = jax.block_until_ready(self.train(state, batch, rates, lengths, seeds))
    return self._score(state.trained, len(runs), held_out)

  def _order(self, run: Run) -> np.ndarray:
    """Rows of all batches: each epoch shuffled, its last batch filled up from its beginning."""
    rng = np.random.default_rng((run.seed, 1))
    rows, size = np.array(run.rows), -(-len(run.rows) // self.batch_size) * self.batch_size
    return np.concatenate([np.resize(rng.permutation(rows), size) for _ in range(run.epochs)])

  def _score(self, params, lanes, held_out) -> list[float]:
    guesses, size = [], 256
    for start in range(0, len(held_out.labels), size):
      rows = np.arange(start, start + size) % len(held_out.labels)
      batch = {k: self._put(np.stack([v[rows]] * lanes)) for k, v in held_out.arrays.items()}
      guesses.append(np.asarray(self.guess(params, batch)))
    found = np.concatenate(guesses, axis=1)[:, : len(held_out.labels)]
    return [float(v) for v in (found == held_out.labels).mean(1)]


def draw(train: Split, labels: int, number: int) -> tuple[int, ...]:
  """The rows of one draw of the labels; all rows where labels is 0."""
  if not labels:
    return tuple(range(len(train.labels)))
  rng = np.random.default_rng((labels, number))
  return tuple(int(i) for i in rng.choice(len(train.labels), labels, replace=False))


def measure(
  tuner: FineTuner, setting: Setting, train: Split, validation: Split, test: Split, bar
) -> list[dict]:
  """A result row of each arm: {"model", "labels", ...}. The search is left out where there is one choice."""
  draws = _draws(setting, train)
  choices = list(itertools.product(setting.learning_rates, setting.epochs))
  best = dict.fromkeys(tuner.starts, {"learning_rate": choices[0][0], "epochs": choices[0][1]})
  if len(choices) > 1:
    # All arms at once, so that runs of equal length fill the devices.
    searched = [
      Run(arm, draws[n], rate, epochs, n)
      for arm in tuner.starts
      for rate, epochs in choices
      for n in range(setting.searched)
    ]
    found = np.array(tuner.accuracies(searched, train, validation, bar))
    for arm, scores in zip(
      tuner.starts, found.reshape(len(tuner.starts), len(choices), -1).mean(-1)
    ):
      rate, epochs = choices[int(scores.argmax())]
      best[arm] = {"learning_rate": rate, "epochs": epochs, "validation": float(scores.max())}
  final = [
    Run(arm, rows, best[arm]["learning_rate"], best[arm]["epochs"], n)
    for arm in tuner.starts
    for n, rows in enumerate(draws)
  ]
  measured = np.array(tuner.accuracies(final, train, test, bar)).reshape(len(tuner.starts), -1)
  return [
    _row(arm, len(draws[0]), list(map(float, of_arm)), best[arm])
    for arm, of_arm in zip(tuner.starts, measured)
  ]


def measure_classical(
  setting: Setting, train: Split, validation: Split, test: Split, bar
) -> list[dict]:
  """A result row of each classical model, its regularisation chosen on the validation split."""
  draws = _draws(setting, train)[: _distinct(setting)]

  def taken(split: Split, rows):
    return [split.texts[i] for i in rows], split.labels[list(rows)]

  def accuracy(name, strength, rows, held_out):
    bar.update()
    return classical.accuracy(name, strength, taken(train, rows), (held_out.texts, held_out.labels))

  out = []
  for name in classical.MODELS:
    found = [
      np.mean([accuracy(name, s, rows, validation) for rows in draws[: setting.searched]])
      for s in classical.STRENGTHS
    ]
    strength = classical.STRENGTHS[int(np.argmax(found))]
    out.append(
      _row(
        name,
        len(draws[0]),
        [accuracy(name, strength, rows, test) for rows in draws],
        {"strength": strength, "validation": float(max(found))},
      )
    )
  return out


def work(setting: Setting, arms: int) -> int:
  """How many fits `measure` makes: for the progress bar."""
  choices = len(setting.learning_rates) * len(setting.epochs)
  return arms * (setting.draws + (choices * setting.searched if choices > 1 else 0))


def work_classical(setting: Setting) -> int:
  """How many fits `measure_classical` makes."""
  return len(classical.MODELS) * (
    _distinct(setting) + len(classical.STRENGTHS) * min(setting.searched, _distinct(setting))
  )


def _draws(setting: Setting, train: Split) -> list[tuple[int, ...]]:
  return [draw(train, setting.labels, n) for n in range(setting.draws)]


def _distinct(setting: Setting) -> int:
  """Draws that differ: with all labels, a linear model gives the same each time."""
  return setting.draws if setting.labels else 1


def _row(model, labels, accuracies, chosen):
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
  """Mean of a - b and its 95% interval (Student's t over the pairs)."""
  difference = np.asarray(a) - np.asarray(b)
  mean = float(difference.mean())
  if len(difference) < 2 or difference.std() == 0:
    return mean, mean, mean
  half = (
    scipy.stats.t.ppf(0.975, len(difference) - 1) * difference.std(ddof=1) / len(difference) ** 0.5
  )
  return mean, mean - float(half), mean + float(half)


def run(
  tuner: FineTuner, settings: Sequence[Setting], train: Split, validation: Split, test: Split
):
  """All settings, with a progress bar -> (rows, differences)."""
  rows, differences = [], []
  total = sum(work(s, len(tuner.starts)) + work_classical(s) for s in settings)
  with tqdm.tqdm(desc="fine-tuning", total=total, unit=" runs", disable=None) as bar:
    for setting in settings:
      found = {
        r["model"]: r
        for r in (
          *measure(tuner, setting, train, validation, test, bar),
          *measure_classical(setting, train, validation, test, bar),
        )
      }
      rows += found.values()
      mean, low, high = paired_difference(
        found["pretrained"]["accuracies"], found["scratch"]["accuracies"]
      )
      differences.append(
        {
          "labels": found["pretrained"]["labels"],
          "pretrained_minus_scratch": mean,
          "low": low,
          "high": high,
        }
      )
      tqdm.tqdm.write(
        f"{differences[-1]['labels']} labels: "
        + ", ".join(f"{r['model']} {100 * r['accuracy_mean']:.1f}" for r in found.values())
      )
  return rows, differences
