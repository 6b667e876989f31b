"""A pass of a model over the rows of an evaluation source."""

from typing import Callable, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from llm import sharding
from llm.core import Batch, Leaves, flatten
from llm.data import batches as batches_lib
from llm.objectives import base
from llm.runs import metrics as metrics_lib
from llm.runs.stop import Stop
from llm.training import experiment as experiment_lib
from llm.training import sampler as sampler_lib
from llm.training import step as step_lib


class Interrupted(Exception):
  """A signal stopped an evaluation before its end."""


class Evaluated(NamedTuple):
  """The mean metrics of a pass, and the predictions for every row."""

  figures: dict[str, float]
  predictions: base.Predictions


def evaluate(
  eval_step: Callable,
  trained: Leaves,
  frozen: Leaves,
  objective: base.Objective,
  rows: base.Rows,
  batch_size: int,
  mesh: Mesh,
  limit: int = 0,
  stop: Stop | None = None,
  actor: base.Actor | None = None,
) -> dict[str, float]:
  """Mean metrics and scores over an evaluation source; {} where a signal interrupts it.

  The other arguments are those of `run_over`. actor: with the same parameters, for an objective
  that learns from what they write.
  """
  prepare = _prepare(objective, rows, actor)
  try:
    evaluated = run_over(eval_step, trained, frozen, rows, batch_size, mesh, limit, stop, prepare)
  except Interrupted:
    return {}
  return {**evaluated.figures, **objective.score(evaluated.predictions, rows)}


def _prepare(
  objective: base.Objective, rows: base.Rows, actor: base.Actor | None
) -> Callable[[Batch], Batch]:
  """What becomes of a batch of `rows` before it is evaluated."""
  if actor is None:
    return lambda batch: batch
  return lambda batch: objective.on_policy(batch, [rows], actor, train=False).batch


def of_checkpoint(
  bundle: experiment_lib.Bundle,
  objective: base.Objective,
  rows: base.Rows,
  length: int,
  batch_size: int,
  mesh: Mesh,
) -> Evaluated:
  """A pass of a checkpoint over `rows` of `length` tokens, with an objective of any kind."""
  params = flatten(bundle.params)
  placed = jax.device_put(params, sharding.shardings(params, mesh))
  model = experiment_lib.build(objective, bundle.config.model, length)
  none_frozen = {path: [False] for path in params}
  eval_step = step_lib.make_eval_step(model, objective, none_frozen)
  config = experiment_lib.settled(bundle.config.model, length)
  sampler = sampler_lib.Sampler(config, bundle.tokenizer, none_frozen, mesh, 0, 1)
  prepare = _prepare(objective, rows, sampler.at(placed, {}, 0))
  return run_over(eval_step, placed, {}, rows, batch_size, mesh, prepare=prepare)


def run_over(
  eval_step: Callable,
  trained: Leaves,
  frozen: Leaves,
  rows: base.Rows,
  batch_size: int,
  mesh: Mesh,
  limit: int = 0,
  stop: Stop | None = None,
  prepare: Callable[[Batch], Batch] = lambda batch: batch,
) -> Evaluated:
  """A pass over all rows, or over the first `limit` batches.

  eval_step: of `step.make_eval_step`. batch_size: rows at a time. stop: polled before every batch.
  prepare: what becomes of a batch before it is evaluated; it may fill it up with rows. Raises
  Interrupted where a signal comes.
  """
  history = []
  predictions = []
  for batch in batches_lib.passes(rows, batch_size, mesh, limit):
    if stop and stop.requested():
      raise Interrupted
    metrics, predicted = eval_step(trained, frozen, prepare(batch))
    history.append(metrics)
    predictions.append(predicted)
  # The rows that fill the last batch up are dropped.
  count = min(len(rows), len(predictions) * batch_size)
  by_row = {
    name: np.concatenate(
      [sharding.host_rows(predicted[name])[:batch_size] for predicted in predictions]
    )[:count]
    for name in predictions[0]
  }
  return Evaluated(metrics_lib.means(jax.device_get(history)), by_row)
