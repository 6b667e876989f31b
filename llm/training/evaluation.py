"""A model over all rows of a source, once."""

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
  """A signal asked the run to stop in the middle of an evaluation."""


class Evaluated(NamedTuple):
  """The means of the metrics, and what was predicted of every row."""

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
  """Figures over an evaluation source; {} where a signal (`stop.asked()`) came meanwhile."""
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
  """A checkpoint in memory, judged by an objective on rows of `length` tokens."""
  params = flatten(bundle.params)
  placed = jax.device_put(params, sharding.shardings(params, mesh))
  model = experiment_lib.build(objective, bundle.config.model, length)
  eval_step = step_lib.make_eval_step(model, objective, {path: [False] for path in params})
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
  """All rows of an evaluation source, or the first `limit` batches; Interrupted where a signal comes."""
  history, predictions = [], []
  for batch in batches_lib.passes(rows, batch_size, mesh, limit):
    if stop and stop.asked():
      raise Interrupted
    metrics, predicted = eval_step(trained, frozen, batch)
    history.append(metrics)
    predictions.append(predicted)
  seen = min(len(rows), len(predictions) * batch_size)
  merged = {
    name: np.concatenate([host_rows(of_batch[name]) for of_batch in predictions])[:seen]
    for name in predictions[0]
  }
  return Evaluated(metrics_lib.means(jax.device_get(history)), merged)
