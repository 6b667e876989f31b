"""Rewards that can be checked: a decoder answers prompts and learns from what its answers earn, by
GRPO (Shao et al. 2024).

  python -m llm.train --config=configs/finetune_grpo.py --workdir=DIR2 \\
      --config.transfer.checkpoint=DIR --config.objective.reward=exact_match \\
      --config.data.train=jsonl:train.jsonl --config.data.eval=jsonl:eval.jsonl
  python -m llm.show rollouts --workdir=DIR2

A line has `prompt` (or `messages`, of which the user has the last) and what the reward looks at:
`answer` for exact_match. config.objective.reward=MODULE:FUNCTION names a function of your own.
training.batch_size counts prompts; each gets config.objective.answers answers. The run starts best
from a checkpoint of configs/finetune_chat.py that earns something already.

After the colon: dapo and dr_grpo, the settings of these papers (Yu et al. 2025; Liu et al. 2025).
"""

from typing import Any

from llm import config as config_lib
from llm.objectives import base

VARIANTS = {
  "": {},
  "dapo": {"clip_high": 0.28, "normalize": "tokens", "redraws": 3, "learn_cut_off": False},
  "dr_grpo": {"advantage": "mean", "normalize": "constant"},
}


def get_config(variant: str = "") -> Any:
  """The config, with the corrections of a paper."""
  if variant not in VARIANTS:
    raise ValueError(f"unknown variant {variant!r}; known: {', '.join(filter(None, VARIANTS))}")
  config = config_lib.defaults(base.defaults("grpo"))
  config.objective.update(VARIANTS[variant])
  config.model.dropout = 0.0  # the policy that learns is the one that wrote
  config.optimizer.update(
    learning_rate=1e-6, schedule="constant", warmup_steps=10, weight_decay=0.0, beta2=0.99
  )
  config.training.update(
    steps=500, batch_size=32, sequence_length=512, log_every=10, save_every=50, keep_best=""
  )
  return config
