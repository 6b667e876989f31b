"""The first state of a run: resumed, else transferred, else random."""
import dataclasses
import pathlib

import jax
import numpy as np

from llm import config as config_lib
from llm import sharding
from llm.checkpoints import adapters, manager, transfer, vocabulary
from llm.core import TrainState, UserError, flatten
from llm.training import optimizer as optimizer_lib
from llm.training import partition, step as step_lib
from llm.training import workdir as workdir_lib

# What adapters leave frozen where config.optimizer.freeze does not say: the backbone, not the head.
ALL_BUT_ADAPTERS = r"^backbone/(?!.*/lora_[ab]$)"


def _fresh_params(experiment, batch, mesh, seed: int):
  """Fresh parameters, made in place on the mesh: values do not depend on its shape."""
  init = lambda: step_lib.init_params(experiment.model, batch, jax.random.key(seed))
  placed = sharding.shardings(jax.eval_shape(init), mesh)
  return jax.jit(init, out_shardings=placed)()


def _alpha(step: pathlib.Path) -> float:
  return config_lib.freeze(manager.describe(step)["config"]).model.lora_alpha


def _transferred(experiment, fresh, workdir, say):
  """Fresh parameters with those of config.transfer.checkpoint in their place; writes the audit."""
  found = experiment.start
  loaded = adapters.merge(manager.restore(found, "params"), _alpha(found))
  old = manager.load_tokenizer(found)
  matching = (vocabulary.match(experiment.tokenizer, old)
              if experiment.config.transfer.vocabulary == "match" and experiment.tokenizer.digest() != old.digest() else None)
  params, audit = transfer.transfer(fresh, loaded, experiment.config.transfer, matching)
  say(transfer.table(audit))
  workdir_lib.write_json(workdir / "transfer.json", {
      "checkpoint": str(found), "parameters": [dataclasses.asdict(e) for e in audit]})
  placed = jax.tree.map(lambda old, new: jax.device_put(new, old.sharding).astype(old.dtype), fresh, params)
  return placed, f"transferred from {found}"


def first_state(experiment, own: pathlib.Path | None, workdir, mesh, say):
  """(state, optimizer, marks, where the parameters came from)."""
  config = experiment.config
  one = jax.tree.map(lambda x: np.asarray(x), experiment.batches.read(0, range(1)))
  shapes = jax.eval_shape(lambda: step_lib.init_params(experiment.model, one, jax.random.key(0)))
  if config.model.lora_rank and not any(adapters.is_adapter(path) for path in flatten(shapes)):
    raise UserError(f"config.model.lora_targets={config.model.lora_targets!r} matches no linear layer; they are called "
                    "attention/query, key, value, out and mlp/up, gate, down")
  marks = partition.frozen_layers(shapes, config.optimizer.freeze or (ALL_BUT_ADAPTERS if config.model.lora_rank else ""))
  trained_shapes, _ = jax.eval_shape(lambda p: partition.split(p, marks), shapes)
  optimizer = optimizer_lib.make(config.optimizer, trained_shapes, config.model.num_layers,
                                 config.training.steps)
  if own:
    like = jax.tree.map(lambda s, p: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=p),
                        shapes, sharding.shardings(shapes, mesh))
    params, origin = manager.restore(own, "params", like), f"resumed from {own}"
  else:
    params, origin = _fresh_params(experiment, one, mesh, config.training.seed), "random initialisation"
    if config.transfer.checkpoint:
      params, origin = _transferred(experiment, params, workdir, say)
  # Each tree is placed by the one table; the moments end in the paths of their parameters.
  placed = sharding.shardings(jax.eval_shape(lambda p: partition.split(p, marks), params), mesh)
  trained, frozen = jax.jit(lambda p: partition.split(p, marks), out_shardings=placed)(params)
  opt_shapes = jax.eval_shape(optimizer.init, trained)
  opt_placed = sharding.shardings(opt_shapes, mesh)
  if own:
    like = jax.tree.map(lambda s, p: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=p), opt_shapes, opt_placed)
    opt_state, number = manager.restore(own, "opt_state", like), manager.describe(own)["step"]
  else:
    opt_state, number = jax.jit(optimizer.init, out_shardings=opt_placed)(trained), 0
  scalar = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
  state = TrainState(jax.device_put(np.int32(number), scalar), trained, frozen, opt_state)
  return state, optimizer, marks, origin
