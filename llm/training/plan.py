"""What a run is before anything is allocated: shapes, places and compiled programs.

Runs of one shape share a plan, so that a study or a search compiles each program once.
"""

import dataclasses
import functools
from typing import Any, Callable

import jax
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from llm import sharding
from llm.checkpoints import adapters
from llm.config import ModelConfig, OptimizerConfig
from llm.core import Leaves, Params, TrainState, UserError, flatten
from llm.objectives import base
from llm.performance import flops
from llm.training import optimizer as optimizer_lib
from llm.training import partition
from llm.training import step as step_lib
from llm.training.experiment import Experiment
from llm.training.optimizer import Pace
from llm.training.partition import FrozenMasks

# What adapters leave frozen where config.optimizer.freeze does not say: the backbone, not the head.
ALL_BUT_ADAPTERS = r"^backbone/(?!.*/lora_[ab]$)"
# Plans that a process keeps, with their programs.
KEPT = 16
# Where only shapes are asked for.
NO_PACE = Pace(0.0, 1, 0)


@dataclasses.dataclass(frozen=True)
class Shape:
  """What decides the programs of a run: those that agree in it share them.

  optimizer: without the rate and the warm-up, which are arguments of the compiled step.
  """

  objective: base.Objective
  model: ModelConfig
  optimizer: OptimizerConfig
  sequence_length: int
  mesh: Mesh


class Plan:
  """A run before anything is allocated: where its state lies, and its compiled programs.

  params: nested, as the model takes them. state: the same, split, with the optimizer's. Both hold
  ShapeDtypeStructs with shardings. row: a batch of one row of zeros. optimizer: of a pace.

  Raises UserError where a rule of the config matches nothing, or a mesh axis does not divide a
  dimension.
  """

  def __init__(self, shape: Shape):
    self.shape = shape
    self.model = shape.objective.model(shape.model)
    self.row = base.zero_row(shape.objective.batch_spec(shape.model, shape.sequence_length))
    params = jax.eval_shape(self._init, 0)
    self.frozen_masks = _frozen_masks(shape.model, shape.optimizer.freeze, params)
    trained, frozen = jax.eval_shape(self._split, params)
    self._trained = trained
    opt_state = jax.eval_shape(self._init_opt_state, trained)
    mesh = shape.mesh
    # A shape, where TrainState is declared with an array.
    step: Any = jax.ShapeDtypeStruct((), np.int32, sharding=NamedSharding(mesh, P()))
    self.params: Params = _with_shardings(params, mesh)
    self.state = TrainState(
      step=step,
      trained=_with_shardings(trained, mesh),
      frozen=_with_shardings(frozen, mesh),
      # The paths of moments end in those of their parameters, so that the same table places them.
      opt_state=_with_shardings(opt_state, mesh),
    )

  def optimizer(self, pace: Pace) -> optax.GradientTransformation:
    # The schedule is that of the steps, however many updates each of them takes.
    updates = self.shape.objective.updates
    return optimizer_lib.make(
      self.shape.optimizer,
      self._trained,
      self.shape.model.num_layers,
      pace.steps * updates,
      pace.learning_rate,
      pace.warmup * updates,
      self.frozen_masks,
    )

  def _init(self, seed: jax.typing.ArrayLike) -> Params:
    return step_lib.init_params(self.model, self.row, jax.random.key(seed))

  def _split(self, params: Params) -> tuple[Leaves, Leaves]:
    return partition.split(params, self.frozen_masks)

  def _init_opt_state(self, trained: Leaves) -> Any:
    return self.optimizer(NO_PACE).init(trained)

  @functools.cached_property
  def shardings(self) -> TrainState:
    """Of the state."""
    return jax.tree.map(lambda array: array.sharding, self.state)

  @functools.cached_property
  def init(self) -> Callable[[int], Params]:
    """seed -> random parameters, created in their place. They do not depend on the mesh."""
    placed = jax.tree.map(lambda array: array.sharding, self.params)
    return jax.jit(self._init, out_shardings=placed)

  @functools.cached_property
  def split(self) -> Callable[[Params], tuple[Leaves, Leaves]]:
    """Parameters -> (trained, frozen)."""
    placed = (self.shardings.trained, self.shardings.frozen)
    return jax.jit(self._split, out_shardings=placed)

  @functools.cached_property
  def init_opt_state(self) -> Callable[[Leaves], Any]:
    """The state of the optimizer at step 0."""
    return jax.jit(self._init_opt_state, out_shardings=self.shardings.opt_state)

  @functools.cached_property
  def jitted_train_step(self) -> Any:
    """As step.make_train_step."""
    return step_lib.make_train_step(
      self.model,
      self.shape.objective,
      self.optimizer,
      self.frozen_masks,
      self.shape.optimizer.grad_accum_steps,
      self.shardings,
    )

  @functools.cached_property
  def train_step(self) -> Callable:
    """(state, batch, seed, pace) -> (state, metrics), on CPU one step at a time."""
    return step_lib.one_at_a_time(self.jitted_train_step)

  @functools.cached_property
  def eval_step(self) -> Callable:
    """As step.make_eval_step."""
    return step_lib.make_eval_step(self.model, self.shape.objective, self.frozen_masks)

  @functools.cached_property
  def flops_a_row(self) -> float:
    """FLOPs of a training step on one row."""
    return flops.model_flops(self.model, self.params, self.row, self.shape.model)


def of(experiment: Experiment, mesh: Mesh) -> Plan:
  """The plan of an experiment, shared by all of its shape. Raises UserError as `Plan`."""
  config = experiment.config
  shape = Shape(
    experiment.objective,
    config.model,
    dataclasses.replace(config.optimizer, learning_rate=-1.0, warmup_steps=-1),
    config.training.sequence_length,
    mesh,
  )
  return _of_shape(shape)


@functools.lru_cache(maxsize=KEPT)
def _of_shape(shape: Shape) -> Plan:
  """The plan of a shape. Its compiled programs live as long as it is kept."""
  return Plan(shape)


def _frozen_masks(model: ModelConfig, freeze: str, params: Params) -> FrozenMasks:
  """What the config freezes. Raises UserError where it wants adapters and no layer has one."""
  if model.lora_rank:
    if not any(adapters.is_adapter(path) for path in flatten(params)):
      raise UserError(
        f"config.model.lora_targets={model.lora_targets!r} matches no linear layer; they "
        "are called attention/query, key, value, out and mlp/up, gate, down"
      )
    freeze = freeze or ALL_BUT_ADAPTERS
  return partition.frozen_layers(params, freeze)


def _with_shardings(shapes: Any, mesh: Mesh) -> Any:
  """A tree of ShapeDtypeStructs, with where each lies on the mesh."""
  return jax.tree.map(
    lambda array, placed: jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=placed),
    shapes,
    sharding.shardings(shapes, mesh),
  )
