"""Prompt and response: a decoder learns to answer (Ouyang et al. 2022, section 3.5).

  python -m llm.train --config=configs/finetune_chat.py --workdir=DIR2 \\
      --config.transfer.checkpoint=DIR \\
      --config.data.train=jsonl:train.jsonl --config.data.eval=jsonl:eval.jsonl
  python -m llm.generate --checkpoint=DIR2 --chat

A line has {"messages": [{"role", "content"}]}, as OpenAI's fine-tuning takes it, or Alpaca's
{"instruction", "input", "output"}. An assistant's message of weight 0 is not learned.
"""

from typing import Any

from llm import config as config_lib
from llm.objectives import base


def get_config(task: str = "") -> Any:
  """The config for your own data, or "alpaca" for the embedded pairs."""
  config = config_lib.defaults(base.defaults("chat"))
  # Of Alpaca 7B (Taori et al. 2023).
  config.recipe.update(learning_rate=2e-5, width=4096)
  config.optimizer.update(schedule="cosine", weight_decay=0.0)
  config.training.update(
    epochs=3.0,
    batch_size=16,
    sequence_length=512,
    log_every=10,
    eval_every=-1,
    keep_best="auto",
  )
  if task == "alpaca":
    config.data.update(train="embedded:alpaca", eval="embedded:alpaca[validation]")
  elif task:
    raise ValueError(f"unknown task {task!r}; known: alpaca")
  return config
