"""Do abilities of models emerge? Accuracy against scale and loss on tasks that have a threshold.

  python -m llm.study emergence --workdir=DIR [--quick]

A GPT learns the sums of numbers of three digits, written plainly and last digit first, and to copy
what followed a letter. Sizes of 12 thousand to 590 thousand parameters, five seeds; the rate is
constant after its warm-up, so that each evaluation is that of a run of its length.

Published: exact match of reversed addition at 200 thousand parameters is .003, .084, .907 and 1.0
at epochs 7, 12, 15 and 19. Schaeffer et al. 2023 say when a jump is one of the metric alone.
"""

from typing import Any

import ml_collections

from configs import pretrain_gpt
from llm.objectives import base
from llm.studies import frame


def get_config() -> Any:
  """The settings of the study, and the config of its runs."""
  run = pretrain_gpt.get_config("tiny")
  run.objective = base.defaults("completion")
  run.tokenizer.update(name="bytes", vocab_size=0, path="")
  run.model.update(max_length=128, dropout=0.0)
  run.optimizer.update(schedule="constant", warmup_steps=100)
  run.training.update(steps=3_000, batch_size=16, sequence_length=128, save_every=0, keep_best="")
  return ml_collections.ConfigDict({"study": frame.defaults("emergence"), "run": run})
