"""GPT-2: next-token prediction on packed documents (Radford et al. 2019).

  python -m llm.train --config=configs/pretrain_gpt.py:small --workdir=DIR \\
      --config.data.train=text:corpus.txt --config.data.eval=text:held_out.txt

Sizes small (124M), medium, large and xl are the published shapes, and 175b is GPT-3's.

Hardware: tiny is for a laptop. Preflight's bound (`python -m llm.preflight`) is at least 2.7 hours
for small on v5e:16x16. It is at least 491 hours for 175b on v5p:8x8x8, the 512 chips that its mesh
is set for.

Published: the validation loss of GPT-2 124M on OpenWebText is 3.12 nats as released, and 2.85
trained on it (nanoGPT's README). levanter reports 35 to 54% MFU for 345M to 13B on v3-256.
"""

from typing import Any

from llm import config as config_lib
from llm.models import gpt
from llm.objectives import base

# Of Brown et al. 2020, table 2.1. Those of other sizes follow (training/recipe.py).
RATES = {"small": 6e-4, "medium": 3e-4, "large": 2.5e-4, "xl": 2e-4, "175b": 6e-5}


def get_config(size: str = "tiny") -> Any:
  """The config of one size."""
  if size not in gpt.SIZES:
    raise ValueError(f"unknown size {size!r}; known: {', '.join(gpt.SIZES)}")
  config = _published(size)
  if size == "tiny":
    config.model.dropout = 0.0
    config.tokenizer.vocab_size = 8192
    config.optimizer.warmup_steps = -1
    config.training.update(
      batch_size=32, sequence_length=128, steps=2_000, eval_every=500, save_every=500
    )
  if size == "175b":
    config.model.update(dropout=0.0, remat="full")
    config.mesh.update(data=1, fsdp=-1, tensor=8)
    config.training.update(batch_size=512, sequence_length=2048, steps=300_000)
    config.recipe.update(batch_tokens=512 * 2048, steps=300_000)
  return config


def _published(size: str) -> Any:
  """The shapes of GPT-2, with the rates of GPT-3's sizes nearest to them."""
  config = config_lib.defaults(base.defaults("causal_lm"))
  config.model.update(name="gpt", **gpt.SIZES[size])
  config.data.train = "embedded:wikipedia"
  config.data.eval = "embedded:wikipedia[validation]"
  config.tokenizer.update(name="sentencepiece", vocab_size=50_257, lowercase=False)
  published = size if size in RATES else "small"
  config.recipe.update(
    learning_rate=RATES[published],
    width=gpt.SIZES[published]["width"],
    batch_tokens=512 * 1024,
    steps=600_000,
  )
  config.optimizer.update(
    schedule="cosine",
    warmup_steps=2_000,
    beta2=0.95,
    epsilon=1e-8,
    weight_decay=0.1,
    grad_clip_norm=1.0,
  )
  config.training.update(
    batch_size=512,
    sequence_length=1024,
    steps=600_000,
    log_every=100,
    eval_every=5_000,
    save_every=5_000,
  )
  return config
