"""ModernBERT: masked language modelling at 30%, without pairs (Warner et al. 2024).

  python -m llm.train --config=configs/pretrain_modernbert.py:tiny --workdir=DIR \\
      --config.data.train=text:corpus.txt --config.data.eval=text:held_out.txt

base and large are the published shapes, 17m Ettin's (Weller et al. 2025); tiny is a laptop's. As
published (section 2.2; AnswerDotAI/ModernBERT, yamls/modernbert; for 17m
JHU-CLSP/ettin-encoder-vs-decoder, pretraining/configs): 1.7 trillion tokens at length 1024, masks
at 30%, the rate and its rise, the decay of weights, Adam's betas and epsilon, rows of a batch. Not
as published:

- AdamW with clipping, not StableAdamW, and a batch that does not grow.
- No dropout, where theirs is 0.1 after attention.
- The rate falls at the end of this run. Theirs stays, and falls in the last 50 of 300 billion
  tokens at length 8192.
- The wavelengths are those for length 8192 from the start.

A second run makes a model for the longer texts:

  python -m llm.train --config=configs/pretrain_modernbert.py:base --workdir=DIR2 \\
      --config.transfer.checkpoint=DIR --config.tokenizer.name= \\
      --config.training.sequence_length=8192
"""

from llm import config as config_lib
from llm.models import modernbert
from llm.objectives import base

LENGTH = 1024

# size -> (rate, weight decay, tokens of the rise, rows of a batch). Their decay, 3e-4 or 1e-5, is
# what a weight loses in a step at the full rate. Ours is multiplied by the rate, so it is theirs
# over the rate.
RECIPES = {
  "17m": (3e-3, 0.1, 4e9, 4608),
  "base": (8e-4, 0.0125, 3e9, 4608),
  "large": (5e-4, 0.02, 2e9, 4928),
}


def get_config(size: str = "tiny"):
  """The config of one size."""
  config = config_lib.defaults(base.defaults("masked_lm"))
  if size not in modernbert.SIZES:
    raise ValueError(f"unknown size {size!r}; known: {', '.join(modernbert.SIZES)}")
  config.model.update(name="modernbert", **modernbert.SIZES[size])
  config.objective.update(mask_rate=0.3, next_sentence=False)
  config.data.train = "embedded:wikipedia"
  config.data.eval = "embedded:wikipedia[validation]"
  config.tokenizer.update(
    name="sentencepiece", vocab_size=8192 if size == "tiny" else 50_368, lowercase=False
  )
  config.optimizer.update(
    schedule="wsd", decay_share=0.03, beta2=0.98, epsilon=1e-6, grad_clip_norm=1.0
  )
  if size == "tiny":
    config.optimizer.update(learning_rate=1e-3, warmup_steps=-1, decay_share=0.1, weight_decay=0.01)
    config.training.update(
      batch_size=32, sequence_length=256, steps=2_000, log_every=100, eval_every=500, save_every=500
    )
    return config
  rate, weight_decay, rise, rows = RECIPES[size]
  config.optimizer.update(
    learning_rate=rate, weight_decay=weight_decay, warmup_steps=round(rise / (rows * LENGTH))
  )
  config.training.update(
    batch_size=rows,
    sequence_length=LENGTH,
    steps=round(1.7e12 / (rows * LENGTH)),
    log_every=100,
    eval_every=4_000,
    save_every=4_000,
  )
  return config
