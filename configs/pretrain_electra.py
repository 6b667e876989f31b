"""ELECTRA: a small generator replaces tokens, the model tells which (Clark et al. 2020).

  python -m llm.train --config=configs/pretrain_electra.py:small --workdir=DIR

small and base have the published shapes and hyper-parameters (table 6); tiny is for trying things
out. A checkpoint fine-tunes as BERT's does: the run takes over `backbone/`, the discriminator, and
skips `head/` and `generator/`, as configs/finetune_classification.py and finetune_qa.py do. The
published runs fine-tuned at a rate of 3e-4 (small) or 1e-4 (base), less for each layer below:

  python -m llm.train --config=configs/finetune_classification.py --workdir=DIR2 \\
      --config.transfer.checkpoint=DIR --config.optimizer.learning_rate=3e-4 \\
      --config.optimizer.layer_decay=0.8 --config.data.train=jsonl:train.jsonl

A published checkpoint holds the discriminator alone. Pretraining goes on from it with a fresh
generator: --config.transfer.checkpoint=hf:NAME --config.transfer.skip="('^generator/',)"
"""

from llm import config as config_lib
from llm.models import electra
from llm.objectives import base


def get_config(size: str = "tiny"):
  """The config of one size."""
  config = config_lib.defaults(base.defaults("replaced_token"))
  if size not in electra.SIZES:
    raise ValueError(f"unknown size {size!r}; known: {', '.join(electra.SIZES)}")
  config.model.update(name="electra", **electra.SIZES[size])
  config.data.train = "embedded:wikipedia"
  config.data.eval = "embedded:wikipedia[validation]"
  config.tokenizer.update(name="sentencepiece", vocab_size=8192)
  config.optimizer.update(
    learning_rate=5e-4, warmup_steps=10_000, weight_decay=0.01, epsilon=1e-6, grad_clip_norm=1.0
  )
  config.training.update(
    batch_size=128,
    sequence_length=128,
    steps=1_000_000,
    log_every=100,
    eval_every=10_000,
    save_every=10_000,
  )
  if size == "small":
    config.model.init_std = 0.02  # as published; the width alone would say 0.035
  if size == "base":
    config.objective.generator_share = 1 / 3
    config.optimizer.learning_rate = 2e-4
    config.training.update(batch_size=256, sequence_length=512, steps=766_000)
  if size == "tiny":
    config.optimizer.update(learning_rate=1e-3, warmup_steps=-1)
    config.training.update(batch_size=64, steps=2_000, eval_every=500, save_every=500)
  return config
