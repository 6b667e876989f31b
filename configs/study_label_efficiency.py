"""How many labels without pretraining equal n with it, on any labelled texts.

  python -m llm.study label_efficiency --workdir=DIR [--quick]

Pretrains a BERT of 1.5 M parameters in minutes (config.run), and fine-tunes it, also after a middle
phase on the target's text, beside a published checkpoint, scratch and classical models. On your own
data and checkpoints:

  --config.study.target='jsonl:data/{split}.jsonl'
  --config.study.checkpoints="('small=runs/small','base=runs/base')" --config.study.middle="()"

Published: with ULMFiT's pretraining and middle phase, 100 labels of IMDb do as well as 10 to 20
times as many from scratch (Howard and Ruder 2018, section 5).
"""

from typing import Any

import ml_collections

from configs import pretrain_bert
from llm.studies import frame


def get_config() -> Any:
  """The settings of the study, and the config of its pretraining."""
  run = pretrain_bert.get_config("tiny")
  run.data.train = "embedded:wikipedia@0.35,embedded:reviews@0.5,embedded:abstracts@0.15"
  run.model.max_length = 128
  run.training.update(steps=1_200, batch_size=32, eval_every=0, save_every=0)
  return ml_collections.ConfigDict({"study": frame.defaults("label_efficiency"), "run": run})
