"""What pretraining buys a BERT: sentiment of review sentences at several label counts.

Fine-tunes on several numbers of labels, from pretrained parameters and from random ones, from a
published checkpoint too, and fits the classical models to the same labels.
"""

import dataclasses
from typing import Mapping, Sequence

import tqdm
from etils import epath

from llm import sharding
from llm.config import DataConfig, MeshConfig
from llm.studies import few_labels, label_curve
from llm.studies.few_labels import Arm
from llm.studies.fine_tuner import FineTuner, Split
from llm.studies.label_curve import Setting

# Tokens of a row: most review sentences fit.
LENGTH = 40
# Rows of a batch of fine-tuning.
BATCH_SIZE = 32

# The fewer the labels, the more draws of them. The search of each arm runs on its first draws.
RATES = (1e-3, 3e-3)
FULL = (
  Setting(64, draws=20, searched=2, learning_rates=RATES, epochs=(20,)),
  Setting(256, draws=8, searched=2, learning_rates=RATES, epochs=(6,)),
  Setting(1024, draws=3, searched=1, learning_rates=RATES, epochs=(3,)),
  Setting(0, draws=2, searched=1, learning_rates=RATES, epochs=(2,)),
)
QUICK = (
  Setting(64, draws=10, searched=2, learning_rates=RATES, epochs=(20,)),
  Setting(256, draws=3, searched=2, learning_rates=RATES, epochs=(6,)),
)
# A published checkpoint of six layers. Its fine-tuning takes as long as that of all the others, so
# it has few draws and no search. The recipe was chosen before, on the validation split (67.6 and
# 76.8 there).
PUBLISHED = (
  Setting(64, draws=4, searched=0, learning_rates=(3e-4,), epochs=(5,)),
  Setting(256, draws=2, searched=0, learning_rates=(2e-4,), epochs=(3,)),
)
REVIEWS = "embedded:reviews[{split}]"


def fine_tuner(pretrained: epath.Path, data: DataConfig) -> tuple[FineTuner, dict[str, Split]]:
  """(the tuner of both arms, the splits). pretrained: a verified step."""
  arm = Arm(str(pretrained), False, REVIEWS, cache=data.cache, length=LENGTH, batch_size=BATCH_SIZE)
  start = few_labels.prepared(arm)
  scratch = few_labels.prepared(dataclasses.replace(arm, scratch=True))
  starts = {"pretrained": start.params, "scratch": scratch.params}
  mesh = sharding.make_mesh(MeshConfig())
  return FineTuner(start.objective, start.model, starts, BATCH_SIZE, mesh), start.splits


def published(data: DataConfig, settings: Sequence[Setting]) -> list[dict]:
  """The result rows of a published BERT on the same labels.

  It has six layers, was distilled from a larger model, and then tuned on sentence pairs.
  """
  size = BATCH_SIZE // 2
  arm = Arm("embedded:minilm", False, REVIEWS, cache=data.cache, length=LENGTH, batch_size=size)
  start = few_labels.prepared(arm)
  starts = {"published_bert": start.params}
  mesh = sharding.make_mesh(MeshConfig())
  tuner = FineTuner(start.objective, start.model, starts, size, mesh)
  train, validation, test = (start.splits[split] for split in few_labels.SPLITS)
  rows = []
  total = sum(label_curve.count_fits(setting, len(starts)) for setting in settings)
  with tqdm.tqdm(desc="published BERT", total=total, unit=" runs", disable=None) as bar:
    for setting in settings:
      rows += label_curve.measure(tuner, setting, train, validation, test, bar)
  return rows


def measured(
  pretrained: epath.Path, data: DataConfig, quick: bool
) -> tuple[list[dict], list[dict]]:
  """(a row a model and label count, a difference a label count) of label_curve.run.

  pretrained: a verified step. quick: fewer label counts and draws, and no published checkpoint.
  """
  tuner, splits = fine_tuner(pretrained, data)
  rows, differences = label_curve.run(
    tuner, QUICK if quick else FULL, splits["train"], splits["validation"], splits["test"]
  )
  if not quick:
    rows += published(data, PUBLISHED)
  return rows, differences


def by_model(rows: Sequence[Mapping], labels: int) -> dict[str, Mapping]:
  """Model -> its result row at so many labels."""
  return {row["model"]: row for row in rows if row["labels"] == labels}
