"""T5: span corruption on packed documents (Raffel et al. 2020).

  python -m llm.train --config=configs/pretrain_t5.py:base --workdir=DIR \\
      --config.data.train=text:corpus.txt --config.data.eval=text:held_out.txt

Sizes small, base, large, 3b and 11b are the shapes of T5 v1.1. Those of the paper end in -v1.0,
such as small-v1.0. training.sequence_length is the length of the corrupted input. Prefix language
modelling is --config.objective.prefix=True. The optimizer and its schedule are the published ones
for the published sizes.

Hardware: tiny is for a laptop. Preflight's bound (`python -m llm.preflight`) is at least 7.0 hours
for base on v5e:16x16.
"""

from typing import Any

from llm import config as config_lib
from llm.models import t5
from llm.objectives import base


def get_config(size: str = "tiny") -> Any:
  """The config of one size."""
  if size not in t5.SIZES:
    raise ValueError(f"unknown size {size!r}; known: {', '.join(t5.SIZES)}")
  config = config_lib.defaults(base.defaults("span_corruption"))
  config.model.update(name="t5", **t5.SIZES[size])
  config.data.train = "embedded:wikipedia"
  config.data.eval = "embedded:wikipedia[validation]"
  config.tokenizer.update(name="sentencepiece", vocab_size=32_000, lowercase=False, sentinels=100)
  config.optimizer.update(
    name="adafactor",
    learning_rate=0.01,
    schedule="rsqrt",
    warmup_steps=10_000,
    weight_decay=0.0,
    grad_clip_norm=0.0,
  )
  config.training.update(
    batch_size=2048,
    sequence_length=512,
    steps=1_000_000,
    log_every=100,
    eval_every=10_000,
    save_every=10_000,
  )
  if size == "tiny":
    config.tokenizer.vocab_size = 8192
    # Short runs learn faster at 4 times the published rate (docs/recipes.md).
    config.optimizer.update(learning_rate=0.04, warmup_steps=200)
    config.training.update(
      batch_size=32, sequence_length=128, steps=2_000, eval_every=500, save_every=500
    )
  return config
