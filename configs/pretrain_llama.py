"""Llama: next-token prediction on packed documents (Touvron et al. 2023, sections 2.2 and 2.3).

  python -m llm.train --config=configs/pretrain_llama.py:tiny --workdir=DIR \\
      --config.data.train=text:corpus.txt --config.data.eval=text:held_out.txt

135m has SmolLM2's shape, 7b and 70b Llama 2's, 8b Llama 3's; tiny is a laptop's.
"""

from llm import config as config_lib
from llm.models import llama
from llm.objectives import base


def get_config(size: str = "tiny"):
  """The config of one size."""
  config = config_lib.defaults(base.defaults("causal_lm"))
  if size not in llama.SIZES:
    raise ValueError(f"unknown size {size!r}; known: {', '.join(llama.SIZES)}")
  config.model.update(name="llama", **llama.SIZES[size])
  config.data.train = "embedded:wikipedia"
  config.data.eval = "embedded:wikipedia[validation]"
  config.tokenizer.update(
    name="sentencepiece", vocab_size=8192 if size == "tiny" else 32_000, lowercase=False
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
    sequence_length=llama.SIZES[size]["max_length"],
    steps=500_000,
    log_every=100,
    eval_every=5_000,
    save_every=5_000,
  )
  if size == "tiny":
    config.optimizer.update(learning_rate=1e-3, warmup_steps=-1)
    config.training.update(
      batch_size=32, sequence_length=128, steps=2_000, eval_every=500, save_every=500
    )
  return config
