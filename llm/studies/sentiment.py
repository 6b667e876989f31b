"""What pretraining buys a BERT: sentiment of review sentences at several label counts.

Fine-tunes on several numbers of labels, from pretrained parameters and from random ones, from a
published checkpoint too, and fits the classical models to the same labels.
"""

import dataclasses
from typing import Mapping, Sequence

import jax
import numpy as np
import tqdm
from etils import epath

from llm import sharding
from llm.checkpoints import locate, manager, transfer
from llm.config import DataConfig, MeshConfig, ModelConfig, TransferConfig
from llm.core import Params
from llm.data import sources
from llm.data.tokenizer import Tokenizer
from llm.objectives import base, classification
from llm.studies import label_efficiency
from llm.studies.label_efficiency import FineTuner, Setting, Split
from llm.training import experiment
from llm.training import step as step_lib

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
# The init_std of parameters that are fine-tuned from scratch. Labels alone are learned better from
# 0.02 than from what suits pretraining (validation accuracy 56 against 53 at 64 labels, 61 against
# 56 at 256). So each arm has the start that suits it.
SCRATCH_INIT_STD = 0.02


def _splits(
  data: DataConfig, tokenizer: Tokenizer, model: ModelConfig
) -> tuple[classification.Objective, dict[str, Split]]:
  """The objective, and the splits of the reviews in the tokens of a model."""
  parsed = {
    split: sources.parse(f"embedded:reviews[{split}]", data)[0]
    for split in ("train", "validation", "test")
  }
  objective = classification.Objective(pooling="mean").fit([parsed["train"]], tokenizer)
  splits = {
    split: label_efficiency.encode(objective, source, tokenizer, model, LENGTH)
    for split, source in parsed.items()
  }
  return objective, splits


def _fresh(objective: classification.Objective, model: ModelConfig) -> Params:
  """Random parameters."""
  row = base.zero_row(objective.batch_spec(model, LENGTH))
  model = dataclasses.replace(model, init_std=SCRATCH_INIT_STD)
  network = experiment.build(objective, model)
  return jax.tree.map(np.asarray, step_lib.init_params(network, row, jax.random.key(1)))


def _with_backbone(fresh: Params, checkpoint: epath.Path) -> Params:
  """`fresh` with the backbone of a checkpoint."""
  saved = manager.restore(checkpoint, "params")
  params, _ = transfer.transfer(fresh, saved, TransferConfig(skip=("^head/",)))
  return params


def fine_tuner(pretrained: epath.Path, data: DataConfig) -> tuple[FineTuner, dict[str, Split]]:
  """(the tuner of both arms, the splits). pretrained: a verified step."""
  saved = experiment.from_checkpoint(pretrained)
  model = dataclasses.replace(saved.config.model, dropout=0.1)
  objective, splits = _splits(data, saved.tokenizer, model)
  scratch = _fresh(objective, model)
  starts = {"pretrained": _with_backbone(scratch, pretrained), "scratch": scratch}
  mesh = sharding.make_mesh(MeshConfig())
  return FineTuner(objective, model, starts, BATCH_SIZE, mesh), splits


def published(data: DataConfig, settings: Sequence[Setting]) -> list[dict]:
  """The result rows of a published BERT on the same labels.

  It has six layers, was distilled from a larger model, and then tuned on sentence pairs.
  """
  step = locate.find("embedded:minilm", print, data.cache)
  saved = experiment.from_checkpoint(step)
  model = saved.config.model
  objective, splits = _splits(data, saved.tokenizer, model)
  starts = {"published_bert": _with_backbone(_fresh(objective, model), step)}
  mesh = sharding.make_mesh(MeshConfig())
  tuner = FineTuner(objective, model, starts, BATCH_SIZE // 2, mesh)
  rows = []
  total = sum(label_efficiency.count_fits(setting, len(starts)) for setting in settings)
  with tqdm.tqdm(desc="published BERT", total=total, unit=" runs", disable=None) as bar:
    for setting in settings:
      rows += label_efficiency.measure(
        tuner, setting, splits["train"], splits["validation"], splits["test"], bar
      )
  return rows


def measured(
  pretrained: epath.Path, data: DataConfig, quick: bool
) -> tuple[list[dict], list[dict]]:
  """(a row a model and label count, a difference a label count) of label_efficiency.run.

  pretrained: a verified step. quick: fewer label counts and draws, and no published checkpoint.
  """
  tuner, splits = fine_tuner(pretrained, data)
  rows, differences = label_efficiency.run(
    tuner, QUICK if quick else FULL, splits["train"], splits["validation"], splits["test"]
  )
  if not quick:
    rows += published(data, PUBLISHED)
  return rows, differences


def by_model(rows: Sequence[Mapping], labels: int) -> dict[str, Mapping]:
  """Model -> its result row at so many labels."""
  return {row["model"]: row for row in rows if row["labels"] == labels}
