"""BERT: masked language modelling and next-sentence prediction (Devlin et al. 2019).

  python -m llm.train --config=configs/pretrain_bert.py:tiny --workdir=DIR

Sizes tiny, mini, small, medium, base and large are the published shapes. `base` is the first of
the two published runs (90% of the steps at length 128) and `base-512` the second:

  python -m llm.train --config=configs/pretrain_bert.py:base-512 --workdir=DIR2 \\
      --config.transfer.checkpoint=DIR
"""

from llm import config as config_lib
from llm.models import bert
from llm.objectives import base


def get_config(size: str = "tiny"):
  """The config of one size."""
  config = config_lib.defaults(base.defaults("masked_lm"))
  name, _, second = size.partition("-")
  if name not in bert.SIZES or second not in ("", "512"):
    raise ValueError(f"unknown size {size!r}; known: {', '.join(bert.SIZES)}, and each with -512")
  config.model.update(name="bert", **bert.SIZES[name])
  config.data.train = "embedded:wikipedia"
  config.data.eval = "embedded:wikipedia[validation]"
  config.tokenizer.update(name="sentencepiece", vocab_size=8192)
  config.optimizer.update(
    learning_rate=1e-4, warmup_steps=10_000, weight_decay=0.01, grad_clip_norm=1.0
  )
  config.training.update(
    batch_size=256,
    sequence_length=128,
    steps=900_000,
    log_every=100,
    eval_every=10_000,
    save_every=10_000,
  )
  if name in ("tiny", "mini"):  # these are for trying things out
    config.optimizer.update(learning_rate=1e-3, warmup_steps=-1)
    config.training.update(batch_size=64, steps=2_000, eval_every=500, save_every=500)
  if second:
    config.tokenizer.name = ""  # the first run's
    config.training.update(sequence_length=512, steps=config.training.steps // 9)
    config.optimizer.warmup_steps = -1
  return config
