"""GPT-2 (Radford et al. 2019): decoder, pre-norm, tanh GELU, learned positions, tied output."""

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
  activation="gelu_tanh",
  norm_epsilon=1e-5,
  scaled_residual_init=True,
)

# small to xl are the published shapes (124M, 355M, 774M, 1.56B). 175b is that of GPT-3 (Brown et
# al. 2020, table 2.1). tiny is for a laptop.
SIZES = {
  name: dict(
    num_layers=layers,
    width=width,
    num_heads=heads,
    mlp_dim=4 * width,
    max_length=length,
    dropout=0.1,
  )
  for name, layers, width, heads, length in (
    ("tiny", 4, 128, 4, 256),
    ("small", 12, 768, 12, 1024),
    ("medium", 24, 1024, 16, 1024),
    ("large", 36, 1280, 20, 1024),
    ("xl", 48, 1600, 25, 1024),
    ("175b", 96, 12_288, 96, 2048),
  )
}


class Backbone(nn.Module):
  """Embeddings, stack and final norm."""

  config: ModelConfig

  @nn.compact
  def __call__(
    self, batch: Batch, *, train: bool, cache: Cache | None = None
  ) -> tuple[jax.Array, jax.Array, Cache | None]:
    cfg, dtype = self.config, precision.of(self.config).values
    x_BxTxD, table_VxD = Embed(
      padded_vocab(cfg.vocab_size),
      cfg.width,
      dtype,
      normal(init_std_of(cfg, FACTS)),
      split="tensor",
      name="token",
    )(batch["tokens"])
    x_BxTxD += Embed(
      cfg.max_length, cfg.width, dtype, normal(init_std_of(cfg, FACTS) / 2), name="position"
    )(batch["positions"])[0]
    x_BxTxD, cache = transformer.trunk(self, FACTS, x_BxTxD, batch, train=train, cache=cache)
    return transformer.norm(cfg, FACTS, "final_norm")(x_BxTxD), table_VxD, cache
