"""Preferences: a decoder learns to prefer one reply to another, by DPO (Rafailov et al. 2023).

  python -m llm.train --config=configs/finetune_preference.py --workdir=DIR2 \\
      --config.transfer.checkpoint=DIR \\
      --config.data.train=jsonl:train.jsonl --config.data.eval=jsonl:eval.jsonl

A line has {"messages": [{"role", "content"}], "chosen", "rejected"}, or `prompt` in place of the
messages. The reference is the checkpoint that the run starts from, best one of
configs/finetune_chat.py. Its log-probabilities are computed once.
"""

from typing import Any

from llm import config as config_lib
from llm.objectives import base


def get_config(task: str = "") -> Any:
  """The config for your own data, or "demo" for the embedded pairs."""
  config = config_lib.defaults(base.defaults("preference"))
  config.optimizer.update(learning_rate=1e-6, schedule="linear", warmup_steps=-1, weight_decay=0.0)
  config.model.dropout = 0.0  # as in the reference: else they would differ before the first step
  config.training.update(epochs=1.0, batch_size=16, sequence_length=1024, log_every=10)
  if task == "demo":
    config.data.update(train="embedded:preferences", eval="embedded:preferences[validation]")
  elif task:
    raise ValueError(f"unknown task {task!r}; known: demo")
  return config
