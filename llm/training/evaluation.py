"""A pass of a model over the rows of an evaluation source."""

from typing import Callable, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from llm import sharding
from llm.core import Leaves, flatten
from llm.data import batches as batches_lib
from llm.objectives import base
from llm.runs import metrics as metrics_lib
from llm.runs.stop import Stop
from llm.training import experiment as experiment_lib
from llm.training import step as step_lib


class Interrupted(Exception):
  """A signal stopped an evaluation before its end."""


class Evaluated(NamedTuple):
  """The mean metrics of a pass, and the predictions for every row."""

  figures: dict[str, float]
  predictions: base.Predictions


def host_rows(array: jax.Array) -> np.ndarray:
  """All rows of a global array, on every process."""
  if array.is_fully_addressable:
    return np.asarray(array)
  from jax.experimental import multihost_utils

  return np.asarray(multihost_utils.process_allgather(array, tiled=True))


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
) -> dict[str, float]:
  """Mean metrics and scores over an evaluation source; {} where a signal interrupts it.

  The arguments are those of `run_over`.
  """
  try:
    evaluated = run_over(eval_step, trained, frozen, rows, batch_size, mesh, limit, stop)
  except Interrupted:
    return {}
  return {**evaluated.figures, **objective.score(evaluated.predictions, rows)}


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
  return run_over(eval_step, placed, {}, rows, batch_size, mesh)


def run_over(
  eval_step: Callable,
  trained: Leaves,
  frozen: Leaves,
  rows: base.Rows,
  batch_size: int,
  mesh: Mesh,
  limit: int = 0,
  stop: Stop | None = None,
) -> Evaluated:
  """A pass over all rows, or over the first `limit` batches.

  eval_step: of `step.make_eval_step`. batch_size: rows at a time. stop: polled before every batch.
  Raises Interrupted where a signal comes.
  """
  history = []
  predictions = []
  for batch in batches_lib.passes(rows, batch_size, mesh, limit):
    if stop and stop.requested():
      raise Interrupted
    metrics, predicted = eval_step(trained, frozen, batch)
    history.append(metrics)
    predictions.append(predicted)
  # The rows that fill the last batch up are dropped.
  count = min(len(rows), len(predictions) * batch_size)
  by_row = {
    name: np.concatenate([host_rows(predicted[name]) for predicted in predictions])[:count]
    for name in predictions[0]
  }
  return Evaluated(metrics_lib.means(jax.device_get(history)), by_row)
