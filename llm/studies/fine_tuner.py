"""Fine-tunes many small runs of one shape, one on each device at a time.

All runs of a shape share one compiled step: the parameters that they start from, the learning rate
and the length of its schedule are arguments of that step.
"""

import dataclasses
import functools
import math
from typing import Any, Mapping, Protocol, Sequence, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from llm.config import DataConfig, ModelConfig, OptimizerConfig
from llm.core import Batch, Leaves, Params, TrainState, flatten
from llm.data.sources import Source
from llm.data.tokenizer import Tokenizer
from llm.objectives import base, classification
from llm.performance import flops
from llm.training import experiment, partition
from llm.training import optimizer as optimizer_lib
from llm.training import step as step_lib

# Rows of held-out text at a time.
EVAL_ROWS = 256
SETTINGS = OptimizerConfig(schedule="linear")


class Bar(Protocol):
  """A progress bar."""

  def update(self) -> Any: ...


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


class Programs:
  """The compiled programs of a network. Each takes one run a device, along the first axis."""

  def __init__(self, objective: classification.Objective, model_config: ModelConfig):
    self.objective = objective
    self.num_layers = model_config.num_layers
    self.model = experiment.build(objective, model_config, trains=True)
    self.init_states = jax.jit(jax.vmap(self._init_state))
    self.train_steps = jax.jit(jax.vmap(self._train_step), donate_argnums=0)
    self.predictions = jax.jit(jax.vmap(self._predictions))

  def _optimizer(self, rate: Any, steps: Any, trained: Leaves) -> optax.GradientTransformation:
    """rate, steps: numbers, or arguments of the compiled step."""
    return optimizer_lib.make(SETTINGS, trained, self.num_layers, steps, rate, warmup=steps // 10)

  def _init_state(self, params: Leaves) -> TrainState:
    return step_lib.init_state(params, {}, self._optimizer(0.0, 1, params))

  def _train_step(
    self, state: TrainState, batch: Batch, rate: jax.Array, steps: jax.Array, seed: jax.Array
  ) -> TrainState:
    optimizer = self._optimizer(rate, steps, state.trained)
    none_frozen = _none_frozen(state.trained)
    state, _ = step_lib.train_step(
      self.model, self.objective, optimizer, none_frozen, 1, state, batch, seed
    )
    return state

  def _predictions(self, params: Leaves, batch: Batch) -> jax.Array:
    """The most probable class of every row; -1 where the logits are not finite."""
    merged = partition.merge(params, {}, _none_frozen(params))
    outputs = cast(base.Outputs, self.model.apply({"params": merged}, batch, train=False))
    logits_BxNxC = outputs["logits"]  # a row is one example
    logits_BxC = logits_BxNxC[:, 0]
    return jnp.where(jnp.isfinite(logits_BxC).all(-1), logits_BxC.argmax(-1), -1)


@functools.lru_cache(maxsize=4)
def programs(objective: classification.Objective, model_config: ModelConfig) -> Programs:
  """The programs of a network, which all tuners of it share."""
  return Programs(objective, model_config)


def _none_frozen(params: Leaves) -> dict[str, list[bool]]:
  return {path: [False] for path in params}


class FineTuner:
  """Fine-tunes from several starts of one network."""

  def __init__(
    self,
    objective: classification.Objective,
    model_config: ModelConfig,
    starts: Mapping[str, Params],
    batch_size: int,
    mesh: Mesh,
  ):
    """starts: arm -> parameters at step 0. batch_size: of one run."""
    self.model_config = model_config
    self.batch_size = batch_size
    self.mesh = mesh
    self.by_device = NamedSharding(mesh, P(mesh.axis_names))
    self.starts = {arm: jax.tree.map(np.asarray, flatten(params)) for arm, params in starts.items()}
    self.programs = programs(objective, model_config)

  def flops_a_step(self, train: Split) -> float:
    """Those of one training step."""
    row = {name: array[:1] for name, array in train.arrays.items()}
    leaves = next(iter(self.starts.values()))
    params = partition.merge(leaves, {}, _none_frozen(leaves))
    of_row = flops.model_flops(self.programs.model, params, row, self.model_config)
    return of_row * self.batch_size

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
      path: self._stacked([self.starts[run.arm][path] for run in runs])
      for path in self.starts[runs[0].arm]
    }
    states = self.programs.init_states(params)
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
      states = jax.block_until_ready(
        self.programs.train_steps(states, batch, rates, lengths, seeds)
      )
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
      predictions.append(np.asarray(self.programs.predictions(params, batch)))
    predicted = np.concatenate(predictions, axis=1)[:, :count]
    accuracies = (predicted == held_out.labels).mean(1)
    diverged = (predicted < 0).any(1)
    return [float(accuracy) for accuracy in np.where(diverged, math.nan, accuracies)]
