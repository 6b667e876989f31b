"""Qwen3: next-token prediction on packed documents (Yang et al. 2025).

  python -m llm.train --config=configs/pretrain_qwen3.py:tiny --workdir=DIR \\
      --config.data.train=text:corpus.txt --config.data.eval=text:held_out.txt

0.6b, 1.7b, 4b, 8b, 14b and 32b are the published dense models; tiny is a laptop's. Of the recipe
their report has 36 trillion tokens, most of them at length 4096 (section 3), and no rates: those
here are Llama's (configs/pretrain_llama.py).
"""

from llm import config as config_lib
from llm.models import qwen3
from llm.objectives import base


def get_config(size: str = "tiny"):
  """The config of one size."""
  config = config_lib.defaults(base.defaults("causal_lm"))
  if size not in qwen3.SIZES:
    raise ValueError(f"unknown size {size!r}; known: {', '.join(qwen3.SIZES)}")
  config.model.update(name="qwen3", **qwen3.SIZES[size])
  config.data.train = "embedded:wikipedia"
  config.data.eval = "embedded:wikipedia[validation]"
  config.tokenizer.update(
    name="sentencepiece", vocab_size=8192 if size == "tiny" else 151_669, lowercase=False
  )
  config.optimizer.update(
    learning_rate=3e-4,
    schedule="cosine",
    warmup_steps=2_000,
    beta2=0.95,
    epsilon=1e-5,
    weight_decay=0.1,
    grad_clip_norm=1.0,
  )
  config.training.update(
    batch_size=1024,
    sequence_length=4096,
    steps=500_000,
    log_every=100,
    eval_every=5_000,
    save_every=5_000,
  )
  if size == "tiny":
    # From Llama 7B (Touvron et al. 2023, table 2): 4 million tokens a step, a trillion in all.
    config.recipe.update(learning_rate=3e-4, width=4096, batch_tokens=4_000_000, steps=250_000)
    config.optimizer.update(learning_rate=-1.0, warmup_steps=-1)
    config.training.update(
      batch_size=32, sequence_length=128, steps=2_000, eval_every=500, save_every=500
    )
  return config
