"""Llama (Touvron et al. 2023): decoder, RMS norms before layers, rotary positions, gated SiLU."""

from typing import ClassVar

import jax
from flax import linen as nn

from llm.config import ModelConfig
from llm.core import Batch
from llm.models import precision, transformer
from llm.models.architecture import Facts, init_std_of, padded_vocab
from llm.models.cache import Cache
from llm.models.layers import Embed, normal

FACTS = Facts(
  kind="decoder",
  causal=True,
  activation="silu",
  norm_epsilon=1e-5,
  untied=True,
  norm="rms",
  bias=False,
  gated=True,
  rotary=True,
)

# 135m is SmolLM2's shape, 7b and 70b are those of Llama 2, 8b is Llama 3's, tiny is for a laptop.
SIZES = {
  name: dict(
    num_layers=layers,
    width=width,
    num_heads=heads,
    num_kv_heads=kv_heads,
    mlp_dim=mlp_dim,
    max_length=length,
    rope_theta=theta,
    tied=tied,
    dropout=0.0,
  )
  for name, layers, width, heads, kv_heads, mlp_dim, length, theta, tied in (
    ("tiny", 4, 128, 4, 2, 384, 256, 1e4, True),
    ("135m", 30, 576, 9, 3, 1536, 2048, 1e5, True),
    ("7b", 32, 4096, 32, 32, 11_008, 4096, 1e4, False),
    ("8b", 32, 4096, 32, 8, 14_336, 8192, 5e5, False),
    ("70b", 80, 8192, 64, 8, 28_672, 4096, 1e4, False),
  )
}


class Backbone(nn.Module):
  """Embedding, stack and final norm. The table is that of the output layer, tied or not."""

  config: ModelConfig
  facts: ClassVar[Facts] = FACTS

  @nn.compact
  def __call__(
    self, batch: Batch, *, train: bool, cache: Cache | None = None
  ) -> tuple[jax.Array, jax.Array, Cache | None]:
    cfg = self.config
    x_BxTxD, table_VxD = self.embedding("token")(batch["tokens"])
    if not cfg.tied:
      table_VxD = self.embedding("output").table()
    x_BxTxD, cache = transformer.trunk(self, self.facts, x_BxTxD, batch, train=train, cache=cache)
    return transformer.norm(cfg, self.facts, "final_norm")(x_BxTxD), table_VxD, cache

  def embedding(self, name: str) -> Embed:
    cfg = self.config
    return Embed(
      padded_vocab(cfg.vocab_size),
      cfg.width,
      precision.of(cfg).values,
      normal(init_std_of(cfg, self.facts)),
      split="tensor",
      name=name,
    )
