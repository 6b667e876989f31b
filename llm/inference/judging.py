"""A classifier's checkpoint as a reward (rewards/functions.py)."""

import functools
from typing import Any, Callable

import jax
import numpy as np

from llm.checkpoints import locate
from llm.core import UserError
from llm.data import batches
from llm.inference import labeller
from llm.objectives import classification


def classifier(argument: str) -> Callable[[str, dict], float]:
  """The probability of a label of the answer, by a checkpoint of finetune_classification.py.

  argument: CHECKPOINT:LABEL. An empty answer earns 0. Raises UserError where there is no such
  checkpoint or label. Nothing is computed before the first answer.
  """
  checkpoint, _, label = argument.rpartition(":")
  judge = labeller.Labeller(locate.find(checkpoint))
  objective = judge.objective
  classes = objective.classes if isinstance(objective, classification.Objective) else ()
  if label not in classes:
    raise UserError(
      f"config.objective.reward=classifier:{argument}: {label!r} is no label of {checkpoint}; its "
      f"labels are {', '.join(classes) or 'none'}"
    )

  program = functools.cache(judge.load)
  tokenizer, config = judge.saved.tokenizer, judge.saved.config

  def reward(answer: str, record: dict) -> float:
    if not answer.strip():
      return 0.0
    params, forward = program()
    length = config.training.sequence_length
    rows: Any = objective.encode([{"text": answer}], tokenizer, config.model, length)
    batch = batches.stack([rows.example(0, np.random.default_rng(0))])
    predictions = jax.tree.map(np.asarray, forward(params, batch))
    result: Any = objective.results(predictions, rows)[0]
    return result["probabilities"][label]

  return reward
