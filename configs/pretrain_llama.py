"""Llama: next-token prediction on packed documents (Touvron et al. 2023, sections 2.2 and 2.3).

  python -m llm.train --config=configs/pretrain_llama.py:8b --workdir=DIR \\
      --config.data.train=text:corpus.txt --config.data.eval=text:held_out.txt \\
      --config.mesh.data=1 --config.mesh.fsdp=-1 --config.model.remat=full

Size 135m has the shape of SmolLM2, 7b and 70b those of Llama 2, and 8b that of Llama 3, all with a
vocabulary of 32,000 pieces.

Hardware: tiny is for a laptop. With the flags above, preflight's bound (`python -m llm.preflight`)
is at least 357 hours for 8b on v6e-256, and at least 1,387 hours for 70b on v5p:8x8x8.

Published: MaxText reports 65.4% MFU for Llama 2 70B on 512 chips of v5p, and 45.5 and 50.3% for
Llama 3.1 8B and 70B on v6e-256.
"""

from typing import Any

from llm import config as config_lib
from llm.models import llama
from llm.objectives import base


def get_config(size: str = "tiny") -> Any:
  """The config of one size."""
  if size not in llama.SIZES:
    raise ValueError(f"unknown size {size!r}; known: {', '.join(llama.SIZES)}")
  config = config_lib.defaults(base.defaults("causal_lm"))
  config.model.update(name="llama", **llama.SIZES[size])
  config.data.train = "embedded:wikipedia"
  config.data.eval = "embedded:wikipedia[validation]"
  config.tokenizer.update(name="sentencepiece", vocab_size=32_000, lowercase=False)
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
    config.tokenizer.vocab_size = 8192
    # From Llama 7B (Touvron et al. 2023, table 2): 4 million tokens a step, a trillion in all.
    config.recipe.update(learning_rate=3e-4, width=4096, batch_tokens=4_000_000, steps=250_000)
    config.optimizer.update(learning_rate=-1.0, warmup_steps=-1)
    config.training.update(
      batch_size=32, sequence_length=128, steps=2_000, eval_every=500, save_every=500
    )
  return config
