"""What helps what: transfer among film reviews, products, editorials and tweets.

  python -m llm.study related_tasks --workdir=DIR [--quick]

Pretrains a BERT of 1.5 M parameters in minutes (config.run), on the unlabelled training text of all
four and on Wikipedia. With another checkpoint, or other tasks:

  --config.study.checkpoint=embedded:minilm
  --config.study.tasks="('a=jsonl:a/{split}.jsonl','b=jsonl:b/{split}.jsonl')"

Published: intermediate tasks that need inference help most, and some harm (Pruksachatkun et al.
2020, at the size of RoBERTa-large).
"""

from typing import Any

import ml_collections

from configs import pretrain_bert
from llm.studies import frame

TEXT = (
  "embedded:wikipedia@0.3,embedded:reviews@0.3,embedded:products@0.13,embedded:editorials@0.17,"
  "embedded:tweets@0.1"
)


def get_config() -> Any:
  """The settings of the study, and the config of its pretraining."""
  run = pretrain_bert.get_config("tiny")
  run.data.train = TEXT
  run.model.max_length = 128
  run.training.update(steps=1_200, batch_size=32, eval_every=0, save_every=0)
  return ml_collections.ConfigDict({"study": frame.defaults("related_tasks"), "run": run})
