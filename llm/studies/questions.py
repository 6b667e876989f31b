"""What pretraining buys on questions: who took part in a study, as words of its abstract.

Fine-tunes on the embedded abstracts from pretrained parameters and from random ones, by the same
recipe, and scores both on the test split. Few abstracts have their answer in the first words, so a
network must find it.
"""

import dataclasses
import pathlib
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath

from llm import config as config_lib
from llm import sharding
from llm.checkpoints import manager
from llm.config import Config, MeshConfig
from llm.core import UserError
from llm.data import sources
from llm.objectives import base
from llm.runs import metrics
from llm.studies import responses
from llm.studies.few_labels import INIT_STD
from llm.studies.report import Compared
from llm.training import evaluation, experiment

# Tokens of a window, the length of the rows of the pretraining.
LENGTH = 128
# Fine-tunings of each arm.
SEEDS = 2
# Abstracts whose answers the report shows.
SHOWN = 3


class Answered(NamedTuple):
  """The F1 of both arms for each seed and question of the test split, and the first seed's answers
  to the first questions."""

  pretrained_SxN: np.ndarray
  scratch_SxN: np.ndarray
  shown: list[dict[str, str]]


def tuning_config(checkpoint: str, cache: str, quick: bool) -> Config:
  """Fine-tuning of a checkpoint on the abstracts."""
  config = config_lib.defaults(base.defaults("span_qa"))
  config.objective.stride = LENGTH // 2
  config.model.dropout = 0.1
  config.data.update(train="embedded:abstracts", eval="embedded:abstracts[validation]", cache=cache)
  config.transfer.update(checkpoint=checkpoint, skip=("^head/",))
  config.optimizer.learning_rate = 1e-3
  config.training.update(
    epochs=5.0 if quick else 12.0,
    batch_size=16,
    sequence_length=LENGTH,
    eval_every=-1,
    keep_best="auto",
    keep=1,
  )
  return config_lib.freeze(config)


def from_scratch(config: Config) -> Config:
  """The same with none of the checkpoint's parameters, and the start that suits labels alone."""
  model = dataclasses.replace(config.model, init_std=INIT_STD)
  return dataclasses.replace(responses.from_scratch(config), model=model)


def _scored(step: epath.Path, config: Config) -> tuple[np.ndarray, list[str], Any]:
  """(F1 of each test question, its answer, the rows) of a fine-tuned step."""
  bundle = experiment.load(step)
  saved = experiment.from_checkpoint(step)
  objective = saved.objective
  if not isinstance(objective, base.Answers):
    raise UserError(f"{step} answers no questions")
  source = sources.parse_one("embedded:abstracts[test]", config.data)
  rows = objective.eval_rows(source, saved.tokenizer, config.data, saved.config.model, LENGTH)
  mesh = sharding.make_mesh(MeshConfig())

  with jax.set_mesh(mesh):
    evaluated = evaluation.of_checkpoint(bundle, objective, rows, LENGTH, 16, mesh)
  outcomes = objective.outcomes(evaluated.predictions, rows)
  results = objective.results(evaluated.predictions, rows)
  return outcomes["f1"], [result["answer"] for result in results], rows


def measured(
  pretrained: pathlib.PurePath, workdir: pathlib.Path, cache: str, quick: bool
) -> Answered:
  """Fine-tunes both arms with each seed in folders of `workdir` and scores them."""
  config = tuning_config(str(pretrained), cache, quick)
  arms = {"pretrained": config, "scratch": from_scratch(config)}
  f1: dict[str, list[np.ndarray]] = {arm: [] for arm in arms}
  answers: dict[str, list[str]] = {}
  for arm, folder in responses.tuned(arms, 1 if quick else SEEDS, workdir, "questions"):
    of_seed, written, rows = _scored(manager.find(folder), config)
    f1[arm].append(of_seed)
    answers.setdefault(arm, written)
  shown = [
    {
      "text": question.text[:400],
      "right": " / ".join(dict.fromkeys(question.gold)),
      **{arm: answers[arm][number] for arm in arms},
    }
    for number, question in enumerate(rows.questions[:SHOWN])
  ]
  return Answered(np.array(f1["pretrained"]), np.array(f1["scratch"]), shown)


def compared(answered: Answered) -> Compared:
  """Mean F1 of both arms; the interval takes seeds and questions as drawn."""
  difference_SxN = answered.pretrained_SxN - answered.scratch_SxN
  low, high = metrics.seeds_interval(difference_SxN)
  return Compared(
    "questions on abstracts",
    "F1",
    float(answered.pretrained_SxN.mean()),
    float(answered.scratch_SxN.mean()),
    float(difference_SxN.mean()),
    low,
    high,
    {},
  )
