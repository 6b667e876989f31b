"""The nine tasks of GLUE from a checkpoint, beside the published rows of BERT tiny to large.

  python -m llm.study glue --workdir=DIR --config.run.transfer.checkpoint=CHECKPOINT [--quick]

GLUE is read from tfds, which must be prepared (docs/data.md), or from files:

  --config.study.data='jsonl:glue/{task}_{split}.jsonl' --config.study.fields=ours

where the splits are train and validation, of MNLI validation_matched and validation_mismatched, and
records have text, text_pair and GLUE's numbers or scores as label. The rates are those of the small
models; Devlin et al. 2019 took ('5e-5','4e-5','3e-5','2e-5') and 3 epochs for base and large.

Published: see llm/studies/glue.py; BERT base has 79.6 on average.
"""

from typing import Any

import ml_collections

from configs import finetune_classification
from llm.studies import frame


def get_config() -> Any:
  """The settings of the study, and the config of its runs."""
  run = finetune_classification.get_config()
  run.training.update(batch_size=32, sequence_length=128)
  return ml_collections.ConfigDict({"study": frame.defaults("glue"), "run": run})
