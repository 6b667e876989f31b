"""A model over all rows of a source, once."""

from typing import Callable

import jax
import numpy as np

from llm import sharding
from llm.core import flatten
from llm.data import batches as batches_lib
from llm.runs import metrics as metrics_lib
from llm.training import experiment as experiment_lib
from llm.training import step as step_lib


def host_rows(array: jax.Array) -> np.ndarray:
  """All rows of a global array, on every process."""
  if array.is_fully_addressable:
    return np.asarray(array)
  from jax.experimental import multihost_utils

  return np.asarray(multihost_utils.process_allgather(array, tiled=True))


def evaluate(
  eval_step: Callable,
  trained,
  frozen,
  objective,
  rows,
  batch_size: int,
  mesh,
  limit: int = 0,
  stop=None,
) -> dict[str, float] | None:
  """Figures over an evaluation source; None if a signal (`stop.asked()`) came meanwhile."""
  found = run_over(eval_step, trained, frozen, objective, rows, batch_size, mesh, limit, stop)
  return found and {**found[0], **objective.score(found[1], rows)}


def of_checkpoint(
  bundle, objective, rows, batch_size: int, mesh
) -> tuple[dict[str, float], dict[str, np.ndarray]]:
  """What `run_over` gives for a checkpoint in memory (experiment.Bundle), judged by an objective."""
  params = flatten(bundle.params)
  placed = jax.device_put(params, sharding.shardings(params, mesh))
  model = experiment_lib.build(objective, bundle.config.model)
  eval_step = step_lib.make_eval_step(model, objective, {path: [False] for path in params})
  return run_over(eval_step, placed, {}, objective, rows, batch_size, mesh)


def run_over(
  eval_step: Callable,
  trained,
  frozen,
  objective,
  rows,
  batch_size: int,
  mesh,
  limit: int = 0,
  stop=None,
) -> tuple[dict[str, float], dict[str, np.ndarray]] | None:
  """(means of the metrics, predictions of all rows) over an evaluation source; None if a signal came."""
  history, predictions = [], []
  for batch in batches_lib.passes(rows, objective.example, batch_size, mesh, limit):
    if stop and stop.asked():
      return None
    found, predicted = eval_step(trained, frozen, batch)
    history.append(found)
    predictions.append(predicted)
  figures = metrics_lib.means(jax.device_get(history))
  seen = min(len(rows), len(predictions) * batch_size)
  merged = {
    k: np.concatenate([host_rows(p[k]) for p in predictions])[:seen] for k in predictions[0]
  }
  return figures, merged
