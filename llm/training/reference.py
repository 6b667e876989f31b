"""What the checkpoint that a run starts from says of its rows: computed once, and kept in the cache."""

import dataclasses
from typing import Callable

import numpy as np
from jax.experimental import multihost_utils

from llm import config as config_lib
from llm.checkpoints import locate, manager
from llm.core import UserError
from llm.data import cache
from llm.data.tokenizer import Tokenizer
from llm.training import evaluation
from llm.training import experiment as experiment_lib


def attached(experiment: experiment_lib.Training, mesh, say) -> experiment_lib.Training:
  """The experiment, its rows with what its objective wants to know of the reference, if it wants any."""
  predict = predictor(
    experiment.config,
    experiment.objective,
    experiment.tokenizer,
    experiment.batches.batch_size,
    mesh,
    say,
  )
  add = lambda rows: experiment.objective.with_reference(rows, predict)
  batches = dataclasses.replace(
    experiment.batches, rows=[add(rows) for rows in experiment.batches.rows]
  )
  held_out = experiment.eval_rows if experiment.eval_rows is None else add(experiment.eval_rows)
  return dataclasses.replace(experiment, batches=batches, eval_rows=held_out)


def predictor(
  config: config_lib.Config, objective, tokenizer: Tokenizer, batch_size: int, mesh, say
) -> Callable:
  """predict(rows) -> what `objective.predict` gives for all rows under config.transfer.checkpoint.

  batch_size: rows at a time.

  Raises UserError where there is no such checkpoint, or it reads other pieces than the rows are made of.
  """

  def predict(rows) -> dict[str, np.ndarray]:
    if not config.transfer.checkpoint:
      raise UserError(
        f"config.objective.name={config.objective['name']} needs a reference: give config.transfer.checkpoint"
      )
    step = locate.find(config.transfer.checkpoint, say, config.data.cache)
    if manager.load_tokenizer(step).digest() != tokenizer.digest():
      raise UserError(
        f"config.objective.name={config.objective['name']}: the reference {step} has another vocabulary than the run: "
        "transfer first (config.transfer.vocabulary='match'), then start from what that run made"
      )
    key = cache.digest("reference 1", manager.digest(step), rows.digest())

    folder = cache.cache_dir(config.data.cache) / "references" / key[:32]
    # All processes compute, or none: what one has kept, another may lack.
    if not multihost_utils.process_allgather(np.array(folder.exists())).all():
      say(f"reference   {len(rows)} rows under {step}")
      bundle = experiment_lib.load(step)
      length = config.training.sequence_length
      evaluated = evaluation.of_checkpoint(bundle, objective, rows, length, batch_size, mesh)
      cache.made_once(
        folder, lambda scratch: np.savez(scratch / "predictions.npz", **evaluated.predictions)
      )
    with np.load(folder / "predictions.npz") as saved:
      return dict(saved)

  return predict
