"""A classifier's checkpoint as a reward (rewards/functions.py)."""

import functools
from typing import Any, Callable

import jax
import numpy as np

from llm.checkpoints import locate
from llm.core import Params, UserError
from llm.data import batches
from llm.inference import labeller
from llm.objectives import classification


class Classifier:
  """The probability of a label of the answer. An empty answer earns 0.

  Nothing is loaded before `prepare` or the first answer.
  """

  def __init__(self, judge: labeller.Labeller, label: str):
    self.judge = judge
    self.label = label

  @functools.cached_property
  def program(self) -> tuple[Params, Callable]:
    return self.judge.load()

  def prepare(self):
    """Loads and compiles, which takes longer than an answer may (rewards/process.py)."""
    self("a", {})

  def __call__(self, answer: str, record: dict) -> float:
    if not answer.strip():
      return 0.0
    params, forward = self.program
    saved, objective = self.judge.saved, self.judge.objective
    length = saved.config.training.sequence_length
    rows: Any = objective.encode([{"text": answer}], saved.tokenizer, saved.config.model, length)
    batch = batches.stack([rows.example(0, np.random.default_rng(0))])
    predictions = jax.tree.map(np.asarray, forward(params, batch))
    result: Any = objective.results(predictions, rows)[0]
    return result["probabilities"][self.label]


def classifier(argument: str) -> Classifier:
  """The probability of a label of the answer, by a checkpoint of finetune_classification.py.

  argument: CHECKPOINT:LABEL. Raises UserError where there is no such checkpoint or label.
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
  return Classifier(judge, label)
