"""Predictions of the checkpoint that a run starts from: computed once, then kept in the cache.

Objectives that compare the model with a reference need them (preference optimization).
"""

import dataclasses
import functools
from typing import Any, Callable

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from llm import cache, sharding
from llm.checkpoints import locate, manager
from llm.config import Config
from llm.core import Batch, Leaves, UserError, flatten, unflatten
from llm.data.tokenizer import Tokenizer
from llm.objectives import base
from llm.training import evaluation
from llm.training import experiment as experiment_lib
from llm.training import sampler as sampler_lib
from llm.training import step as step_lib
from llm.training.experiment import Training
from llm.training.partition import FrozenMasks


def attached(experiment: Training, mesh: Mesh, say: Callable) -> Training:
  """The experiment, its rows with what its objective needs to know of the reference.

  An objective that needs no reference costs nothing. Raises UserError as `predictor`.
  """
  objective = experiment.objective
  batches = experiment.batches
  predict = predictor(
    experiment.config, objective, experiment.tokenizer, experiment.eval_batch_size, mesh, say
  )
  rows = [objective.with_reference(rows, predict) for rows in batches.rows]
  eval_rows = experiment.eval_rows
  if eval_rows is not None:
    eval_rows = objective.with_reference(eval_rows, predict)
  batches = dataclasses.replace(batches, rows=rows)
  return dataclasses.replace(experiment, batches=batches, eval_rows=eval_rows)


def predictor(
  config: Config,
  objective: base.Objective,
  tokenizer: Tokenizer,
  batch_size: int,
  mesh: Mesh,
  say: Callable,
) -> Callable[[Any], base.Predictions]:
  """A function from rows to what `objective.predict` gives for them under the reference.

  The reference is config.transfer.checkpoint. batch_size: rows at a time. The function raises
  UserError where there is no such checkpoint, or where its vocabulary is not the run's.
  """

  def predict(rows: Any) -> base.Predictions:
    step = _reference_step(config, tokenizer, say)
    key = cache.digest("reference 1", manager.digest(step), rows.digest())
    folder = cache.cache_dir(config.data.cache) / "references" / key[:32]
    # All processes compute, or none does: the cache of one may lack what that of another has.
    if not multihost_utils.process_allgather(
      np.array(folder.exists() and not cache.fault(folder))
    ).all():
      say(f"reference   {len(rows)} rows under {step}")
      bundle = experiment_lib.load(step)
      length = config.training.sequence_length
      evaluated = evaluation.of_checkpoint(bundle, objective, rows, length, batch_size, mesh)
      arrays: dict[str, Any] = dict(evaluated.predictions)
      cache.kept(folder, lambda scratch: np.savez(scratch / "predictions.npz", **arrays))
    with np.load(folder / "predictions.npz") as saved:
      return dict(saved)

  return predict


def sampler(
  experiment: Training, frozen_masks: FrozenMasks, mesh: Mesh, say: Callable
) -> sampler_lib.Sampler:
  """The sampler of a run, which knows the reference; "auto" must be settled."""
  config = experiment.config
  return sampler_lib.Sampler(
    config.model,
    experiment.tokenizer,
    frozen_masks,
    mesh,
    config.training.seed,
    config.optimizer.grad_accum_steps,
    _losses(experiment, mesh, say),
  )


def _losses(experiment: Training, mesh: Mesh, say: Callable) -> Callable[[Batch], jax.Array]:
  """A function from a batch to `losses` of the network under the reference, BxT.

  It loads the reference when it is first called, and raises UserError as `predictor`.
  """
  config = experiment.config

  @functools.cache
  def program() -> tuple[Callable, Leaves]:
    bundle = experiment_lib.load(_reference_step(config, experiment.tokenizer, say))
    params = flatten(bundle.params)
    placed = jax.device_put(params, sharding.shardings(params, mesh))
    length = config.training.sequence_length
    model = experiment_lib.build(experiment.objective, bundle.config.model, length)

    def apply(params: Leaves, batch: Batch) -> jax.Array:
      outputs: Any = model.apply({"params": unflatten(params)}, batch, train=False)
      return outputs["losses"]

    return step_lib.one_at_a_time(jax.jit(apply)), placed

  def of_batch(batch: Batch) -> jax.Array:
    apply, params = program()
    return apply(params, batch)

  return of_batch


def _reference_step(config: Config, tokenizer: Tokenizer, say: Callable) -> epath.Path:
  """The step of config.transfer.checkpoint. Raises UserError where it cannot be the reference."""
  name = config.objective["name"]
  if not config.transfer.checkpoint:
    raise UserError(
      f"config.objective.name={name} needs a reference: give config.transfer.checkpoint"
    )
  step = locate.find(config.transfer.checkpoint, say, config.data.cache)
  if manager.load_tokenizer(step).digest() != tokenizer.digest():
    raise UserError(
      f"config.objective.name={name}: the reference {step} has another vocabulary than the run: "
      "transfer first (config.transfer.vocabulary='match'), then start from the checkpoint of that "
      "run"
    )
  return step
