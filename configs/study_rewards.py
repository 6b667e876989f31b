"""What a reward teaches beside demonstrations, by GRPO, SFT and DPO.

  python -m llm.study rewards --workdir=DIR [--quick]

A GPT of 370,000 parameters over bytes adds numbers of three digits. Three seeds, on two cores.
"""

from typing import Any

import ml_collections

from configs import finetune_chat
from llm.models import gpt
from llm.studies import frame

# The prompt, then the answer and its end: "123+456=579".
TEMPLATE = (
  "{% for message in messages %}{{ message.content }}"
  "{% if message.role == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
)


def get_config() -> Any:
  """The settings of the study, and the config of its supervised runs."""
  run = finetune_chat.get_config()
  run.model.update(gpt.SIZES["tiny"])
  run.model.update(name="gpt", num_layers=3, width=96, num_heads=3, mlp_dim=384, max_length=128)
  run.model.dropout = 0.0
  run.tokenizer.name = "bytes"
  run.objective.template = TEMPLATE
  run.data.train = "set by the study"
  run.optimizer.update(learning_rate=2e-3, warmup_steps=20, schedule="constant")
  run.training.update(
    epochs=0.0, steps=1, batch_size=48, sequence_length=128, eval_every=0, keep_best=""
  )
  return ml_collections.ConfigDict({"study": frame.defaults("rewards"), "run": run})
