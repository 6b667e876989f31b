"""The first state of a run: resumed, else transferred, else random."""

import dataclasses
from typing import NamedTuple

import jax
import numpy as np
import optax
from etils import epath
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from llm import config as config_lib
from llm import sharding
from llm.checkpoints import adapters, manager, transfer, vocabulary
from llm.core import Params, TrainState, UserError, flatten
from llm.runs import workdir as workdir_lib
from llm.training import optimizer as optimizer_lib
from llm.training import partition
from llm.training import step as step_lib
from llm.training.experiment import Experiment

# What adapters leave frozen where config.optimizer.freeze does not say: the backbone, not the head.
ALL_BUT_ADAPTERS = r"^backbone/(?!.*/lora_[ab]$)"


def _fresh_params(experiment: Experiment, mesh: Mesh, seed: int) -> Params:
  """Fresh parameters, made in place on the mesh: values do not depend on its shape."""
  row = experiment.one_row()

  def init() -> Params:
    return step_lib.init_params(experiment.model, row, jax.random.key(seed))

  placed = sharding.shardings(jax.eval_shape(init), mesh)
  return jax.jit(init, out_shardings=placed)()


def _alpha(step: epath.Path) -> float:
  return config_lib.freeze(manager.describe(step)["config"]).model.lora_alpha


def _transferred(experiment, fresh, workdir, say):
  """Fresh parameters with those of config.transfer.checkpoint in their place; writes the audit."""
  found = experiment.start
  loaded = adapters.merge(manager.restore(found, "params"), _alpha(found))
  old = manager.load_tokenizer(found)
  matching = (
    vocabulary.match(experiment.tokenizer, old)
    if experiment.config.transfer.vocabulary == "match"
    and experiment.tokenizer.digest() != old.digest()
    else None
  )
  params, audit = transfer.transfer(fresh, loaded, experiment.config.transfer, matching)
  say(transfer.table(audit))
  workdir_lib.write_json(
    workdir / "transfer.json",
    {"checkpoint": str(found), "parameters": [dataclasses.asdict(e) for e in audit]},
  )
  placed = jax.tree.map(
    lambda old, new: jax.device_put(new, old.sharding).astype(old.dtype), fresh, params
  )
  return placed, f"transferred from {found}"


class Plan(NamedTuple):
  """The state of a run before there is one: shapes with their places on a mesh, and what makes and moves them."""

  params: dict  # ShapeDtypeStruct, as the model has them
  state: TrainState  # ShapeDtypeStruct, each with its sharding
  optimizer: optax.GradientTransformation
  marks: dict


def _placed(tree, mesh):
  return jax.tree.map(
    lambda s, p: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=p),
    tree,
    sharding.shardings(tree, mesh),
  )


def plan(experiment, mesh) -> Plan:
  """Allocates nothing. Raises UserError where a rule of the config matches nothing, or an axis divides no dimension."""
  config = experiment.config
  row = experiment.one_row()
  params = jax.eval_shape(lambda: step_lib.init_params(experiment.model, row, jax.random.key(0)))
  if config.model.lora_rank and not any(adapters.is_adapter(path) for path in flatten(params)):
    raise UserError(
      f"config.model.lora_targets={config.model.lora_targets!r} matches no linear layer; they are called "
      "attention/query, key, value, out and mlp/up, gate, down"
    )
  marks = partition.frozen_layers(
    params, config.optimizer.freeze or (ALL_BUT_ADAPTERS if config.model.lora_rank else "")
  )
  trained, frozen = jax.eval_shape(lambda p: partition.split(p, marks), params)
  optimizer = optimizer_lib.make(
    config.optimizer, trained, config.model.num_layers, config.training.steps
  )
  step = jax.ShapeDtypeStruct((), np.int32, sharding=NamedSharding(mesh, P()))
  # Each tree is placed by the one table; the moments end in the paths of their parameters.
  state = TrainState(
    step,
    *(_placed(tree, mesh) for tree in (trained, frozen, jax.eval_shape(optimizer.init, trained))),
  )
  return Plan(_placed(params, mesh), state, optimizer, marks)


def first_state(experiment, own: epath.Path | None, workdir, mesh, say):
  """(state, optimizer, marks, where the parameters came from)."""
  config, planned = experiment.config, plan(experiment, mesh)
  where = jax.tree.map(lambda s: s.sharding, planned.state)
  if own:
    params, origin = manager.restore(own, "params", planned.params), f"resumed from {own}"
  else:
    params, origin = _fresh_params(experiment, mesh, config.training.seed), "random initialisation"
    if config.transfer.checkpoint:
      params, origin = _transferred(experiment, params, workdir, say)
  trained, frozen = jax.jit(
    lambda p: partition.split(p, planned.marks), out_shardings=(where.trained, where.frozen)
  )(params)
  if own:
    opt_state, number = (
      manager.restore(own, "opt_state", planned.state.opt_state),
      manager.describe(own)["step"],
    )
  else:
    opt_state, number = jax.jit(planned.optimizer.init, out_shardings=where.opt_state)(trained), 0
  state = TrainState(jax.device_put(np.int32(number), where.step), trained, frozen, opt_state)
  return state, planned.optimizer, planned.marks, origin
