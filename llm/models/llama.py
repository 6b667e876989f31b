"""Llama (Touvron et al. 2023): decoder, pre-norm with RMS norms, rotary positions, gated SiLU, no biases."""

from flax import linen as nn

from llm.config import ModelConfig
from llm.models import precision, transformer
from llm.models.layers import Embed, normal

STYLE = transformer.Style(
  post_norm=False,
  causal=True,
  activation="silu",
  norm_epsilon=1e-5,
  scaled_residual_init=False,
  norm="rms",
  bias=False,
  gated=True,
  rotary=True,
)

# 135m is SmolLM2's shape, 7b and 70b Llama 2's, 8b Llama 3's; tiny is a laptop's.
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
  """Embedding, stack and final norm. The table is that of the output layer, tied to the embedding or not."""

  config: ModelConfig

  @nn.compact
  def __call__(self, batch, *, train: bool, cache: transformer.Cache | None = None):
    cfg, dtype = self.config, precision.of(self.config).values
    embed = lambda name: Embed(
      transformer.padded_vocab(cfg.vocab_size),
      cfg.width,
      dtype,
      normal(cfg.init_std),
      split="tensor",
      name=name,
    )
    x_BxTxD, table_VxD = embed("token")(batch["tokens"])
    if not cfg.tied:
      table_VxD = embed("output").table()
    x_BxTxD, cache = transformer.trunk(self, STYLE, x_BxTxD, batch, train=train, cache=cache)
    return transformer.norm(cfg, STYLE, "final_norm")(x_BxTxD), table_VxD, cache
