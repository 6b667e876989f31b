"""The first state of a run: resumed, else transferred, else random."""

import dataclasses
from typing import Callable

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.experimental import multihost_utils

from llm.checkpoints import adapters, manager, transfer, vocabulary
from llm.core import Params, TrainState, flatten, unflatten
from llm.data.tokenizer import Tokenizer
from llm.runs import workdir as workdir_lib
from llm.training.experiment import Experiment, Training
from llm.training.plan import Plan


def first_state(
  experiment: Training,
  planned: Plan,
  resume_from: epath.Path | None,
  workdir: epath.Path,
  say: Callable,
) -> tuple[TrainState, str]:
  """(state, where the parameters come from).

  resume_from: a verified step of the run itself, None for a new run. Raises UserError where a
  checkpoint does not fit.
  """
  seed = experiment.config.training.seed
  if resume_from:
    params = manager.restore(resume_from, "params", planned.params)
    origin = f"resumed from {resume_from}"
  elif experiment.config.transfer.checkpoint:
    params = _transferred_params(experiment, planned.init(seed), workdir, say)
    origin = f"transferred from {experiment.start}"
  else:
    params = planned.init(seed)
    origin = "random initialisation"
    vectors_VxE = experiment.vectors(say)
    if vectors_VxE is not None:
      params = _with_vectors(params, vectors_VxE, experiment.config.model.init_std)
      origin = "random initialisation, embeddings by the neighbours of each piece"
  trained, frozen = planned.split(params)
  if resume_from:
    opt_state = manager.restore(resume_from, "opt_state", planned.state.opt_state)
    step = manager.describe(resume_from).step
  else:
    opt_state = planned.init_opt_state(trained)
    step = 0
  state = TrainState(
    jax.device_put(np.int32(step), planned.shardings.step), trained, frozen, opt_state
  )
  return state, origin


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
  experiment: Experiment, fresh: Params, workdir: epath.Path, say: Callable
) -> Params:
  """`fresh` parameters, replaced by those of config.transfer.checkpoint where the rules say so.

  Prints what became of each, and writes it to transfer.json.
  """
  checkpoint = experiment.start
  assert checkpoint is not None
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
  return manager.describe(checkpoint).config.model.lora_alpha


def _matching(experiment: Experiment, old: Tokenizer) -> vocabulary.Matching | None:
  """Which rows of the old embeddings the new pieces take; None where the rows stay as they are."""
  if experiment.config.transfer.vocabulary != "match":
    return None
  if experiment.tokenizer.digest() == old.digest():
    return None
  return vocabulary.match(experiment.tokenizer, old)
