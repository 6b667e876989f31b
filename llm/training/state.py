"""The first state of a run: resumed, else transferred, else random."""

import dataclasses
from typing import Any, Callable, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from etils import epath
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from llm import config as config_lib
from llm import sharding
from llm.checkpoints import adapters, manager, transfer, vocabulary
from llm.config import Config
from llm.core import Params, TrainState, UserError, flatten, unflatten
from llm.data.tokenizer import Tokenizer
from llm.runs import workdir as workdir_lib
from llm.training import optimizer as optimizer_lib
from llm.training import partition
from llm.training import step as step_lib
from llm.training.experiment import Experiment, Training
from llm.training.partition import FrozenMasks

# What adapters leave frozen where config.optimizer.freeze does not say: the backbone, not the head.
ALL_BUT_ADAPTERS = r"^backbone/(?!.*/lora_[ab]$)"


class Plan(NamedTuple):
  """The state of a run before it is allocated.

  init: makes random parameters, whose values do not depend on the mesh. params: nested, as the
  model takes them. state: the same, split, with the optimizer's. Both hold ShapeDtypeStructs with
  shardings.
  """

  init: Callable[[], Params]
  params: Params
  state: TrainState
  optimizer: optax.GradientTransformation
  frozen_masks: FrozenMasks


def plan(experiment: Experiment, mesh: Mesh) -> Plan:
  """Shapes, shardings and optimizer of a run. Nothing is allocated.

  Raises UserError where a rule of the config matches nothing, or a mesh axis does not divide a
  dimension.
  """
  config = experiment.config
  row = experiment.one_row()

  def init() -> Params:
    key = jax.random.key(config.training.seed)
    return step_lib.init_params(experiment.model, row, key)

  params = jax.eval_shape(init)
  frozen_masks = _frozen_masks(config, params)
  trained, frozen = jax.eval_shape(lambda p: partition.split(p, frozen_masks), params)
  optimizer = optimizer_lib.make(
    config.optimizer, trained, config.model.num_layers, config.training.steps
  )
  opt_state = jax.eval_shape(optimizer.init, trained)
  # A shape, where TrainState is declared with an array.
  step: Any = jax.ShapeDtypeStruct((), np.int32, sharding=NamedSharding(mesh, P()))
  state = TrainState(
    step=step,
    trained=_with_shardings(trained, mesh),
    frozen=_with_shardings(frozen, mesh),
    # The paths of moments end in those of their parameters, so that the same table places them.
    opt_state=_with_shardings(opt_state, mesh),
  )
  return Plan(init, _with_shardings(params, mesh), state, optimizer, frozen_masks)


def _frozen_masks(config: Config, params: Params) -> FrozenMasks:
  """What the config freezes. Raises UserError where it wants adapters and no layer has one."""
  freeze = config.optimizer.freeze
  if config.model.lora_rank:
    if not any(adapters.is_adapter(path) for path in flatten(params)):
      raise UserError(
        f"config.model.lora_targets={config.model.lora_targets!r} matches no linear layer; they "
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


def first_state(
  experiment: Training,
  resume_from: epath.Path | None,
  workdir: epath.Path,
  mesh: Mesh,
  say: Callable,
) -> tuple[TrainState, optax.GradientTransformation, FrozenMasks, str]:
  """(state, optimizer, frozen masks, where the parameters come from).

  resume_from: a verified step of the run itself, None for a new run. Raises UserError as `plan`,
  and where a checkpoint does not fit.
  """
  planned = plan(experiment, mesh)
  shardings = jax.tree.map(lambda array: array.sharding, planned.state)
  if resume_from:
    params = manager.restore(resume_from, "params", planned.params)
    origin = f"resumed from {resume_from}"
  elif experiment.config.transfer.checkpoint:
    params = _transferred_params(experiment, planned, workdir, say)
    origin = f"transferred from {experiment.start}"
  else:
    params = _fresh_params(planned)
    origin = "random initialisation"
    vectors_VxE = experiment.vectors(say)
    if vectors_VxE is not None:
      params = _with_vectors(params, vectors_VxE, experiment.config.model.init_std)
      origin = "random initialisation, embeddings by the neighbours of each piece"
  trained, frozen = jax.jit(
    lambda p: partition.split(p, planned.frozen_masks),
    out_shardings=(shardings.trained, shardings.frozen),
  )(params)
  if resume_from:
    opt_state = manager.restore(resume_from, "opt_state", planned.state.opt_state)
    step = manager.describe(resume_from)["step"]
  else:
    opt_state = jax.jit(planned.optimizer.init, out_shardings=shardings.opt_state)(trained)
    step = 0
  state = TrainState(jax.device_put(np.int32(step), shardings.step), trained, frozen, opt_state)
  return state, planned.optimizer, planned.frozen_masks, origin


def _fresh_params(planned: Plan) -> Params:
  """Random parameters, created in their place on the mesh."""
  shardings = jax.tree.map(lambda array: array.sharding, planned.params)
  return jax.jit(planned.init, out_shardings=shardings)()


def _with_vectors(params: Params, vectors_VxE: np.ndarray, std: float) -> Params:
  """The parameters with a table of tokens that starts as `vectors`, at a standard deviation.

  All processes take the vectors of the first: their last bits may differ between machines.
  """
  if jax.process_count() > 1:
    vectors_VxE = np.asarray(multihost_utils.broadcast_one_to_all(vectors_VxE))
  leaves = flatten(params)
  path = "backbone/token/embedding"
  table = leaves[path]
  padded = np.zeros(table.shape, np.float32)
  padded[: len(vectors_VxE)] = std * vectors_VxE
  leaves[path] = jax.jit(
    lambda random, known: jnp.where(jnp.any(known != 0, axis=1, keepdims=True), known, random),
    out_shardings=table.sharding,
  )(table, padded)
  return unflatten(leaves)


def _transferred_params(
  experiment: Experiment, planned: Plan, workdir: epath.Path, say: Callable
) -> Params:
  """Fresh parameters, replaced by those of config.transfer.checkpoint where the rules say so.

  Prints what became of each, and writes it to transfer.json.
  """
  checkpoint = experiment.start
  assert checkpoint is not None
  fresh = _fresh_params(planned)
  saved = adapters.merge(manager.restore(checkpoint, "params"), _lora_alpha(checkpoint))
  matching = _matching(experiment, manager.load_tokenizer(checkpoint))
  params, audit = transfer.transfer(fresh, saved, experiment.config.transfer, matching)
  say(transfer.table(audit))
  workdir_lib.write_json(
    workdir / "transfer.json",
    {
      "checkpoint": str(checkpoint),
      "parameters": [dataclasses.asdict(entry) for entry in audit],
    },
  )
  return jax.tree.map(
    lambda old, new: jax.device_put(new, old.sharding).astype(old.dtype), fresh, params
  )


def _lora_alpha(checkpoint: epath.Path) -> float:
  return config_lib.freeze(manager.describe(checkpoint)["config"]).model.lora_alpha


def _matching(experiment: Experiment, old: Tokenizer) -> vocabulary.Matching | None:
  """Which rows of the old embeddings the new pieces take; None where the rows stay as they are."""
  if experiment.config.transfer.vocabulary != "match":
    return None
  if experiment.tokenizer.digest() == old.digest():
    return None
  return vocabulary.match(experiment.tokenizer, old)
