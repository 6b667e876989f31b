"""BERT: masked language modelling and next-sentence prediction (Devlin et al. 2019).

  python -m llm.train --config=configs/pretrain_bert.py:base --workdir=DIR \\
      --config.data.train=text:corpus.txt --config.data.eval=text:held_out.txt

Sizes tiny, mini, small, medium, base and large are the published shapes. The published recipe has
two runs: `base` is the first one, 90% of the steps at length 128, and `base-512` is the second:

  python -m llm.train --config=configs/pretrain_bert.py:base-512 --workdir=DIR2 \\
      --config.transfer.checkpoint=DIR

Hardware: tiny and mini have short runs for a laptop. Preflight's bound (`python -m llm.preflight`)
is at least 2.1 hours for base on v5e:4x4, with the vocabulary of 8,192 pieces that is set here.

Published: accuracy on GLUE's test set of SST-2, after fine-tuning: tiny 83.2, mini 85.9, small
89.7, medium 89.6 (README of google-research/bert), base 93.5 (Devlin et al. 2019, table 1).
"""

from typing import Any

from llm import config as config_lib
from llm.models import bert
from llm.objectives import base


def get_config(size: str = "tiny") -> Any:
  """The config of one size, with -512 for the second run."""
  name, _, second = size.partition("-")
  if name not in bert.SIZES or second not in ("", "512"):
    raise ValueError(f"unknown size {size!r}; known: {', '.join(bert.SIZES)}, and each with -512")
  config = config_lib.defaults(base.defaults("masked_lm"))
  config.model.update(name="bert", **bert.SIZES[name])
  config.data.train = "embedded:wikipedia"
  config.data.eval = "embedded:wikipedia[validation]"
  config.tokenizer.update(name="sentencepiece", vocab_size=8192)
  # Of base and large; the rates of the others follow (training/recipe.py).
  config.recipe.update(
    learning_rate=1e-4,
    width=max(768, config.model.width),
    num_layers=max(12, config.model.num_layers),
    batch_tokens=256 * 128,
    steps=900_000,
  )
  config.optimizer.update(warmup_steps=10_000, weight_decay=0.01, grad_clip_norm=1.0)
  config.training.update(
    batch_size=256,
    sequence_length=128,
    steps=900_000,
    log_every=100,
    eval_every=10_000,
    save_every=10_000,
  )
  if name in ("tiny", "mini"):
    # What a short run needs (docs/recipes.md): more masks, no pairs, no dropout, a good start.
    config.objective.update(mask_rate=0.4, next_sentence=False)
    config.model.update(dropout=0.0, embedding_start="cooccurrence")
    config.recipe.update(
      learning_rate=3e-3, width=128, num_layers=2, batch_tokens=64 * 128, steps=2_000
    )
    config.optimizer.warmup_steps = -1
    config.training.update(batch_size=64, steps=2_000, eval_every=500, save_every=500)
  if second:
    config.tokenizer.name = ""  # that of the first run
    config.training.update(sequence_length=512, steps=config.training.steps // 9)
    config.recipe.update(batch_tokens=256 * 512, steps=100_000)
    config.optimizer.warmup_steps = -1
  return config
