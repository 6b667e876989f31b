"""BERT (Devlin et al. 2019): encoder, post-norm, exact GELU, learned positions, token types."""

import jax
from flax import linen as nn

from llm.config import ModelConfig
from llm.core import Batch
from llm.models import precision, transformer
from llm.models.architecture import Facts, padded_vocab
from llm.models.layers import Embed, normal

FACTS = Facts(
  kind="encoder",
  causal=False,
  activation="gelu",
  norm_epsilon=1e-12,
  begin="cls",
  end="sep",
  post_norm=True,
)

# The published shapes (google-research/bert, release of 11 March 2020).
SIZES = {
  name: dict(
    num_layers=layers,
    width=width,
    num_heads=width // 64,
    mlp_dim=4 * width,
    max_length=512,
    dropout=0.1,
  )
  for name, layers, width in (
    ("tiny", 2, 128),
    ("mini", 4, 256),
    ("small", 4, 512),
    ("medium", 8, 512),
    ("base", 12, 768),
    ("large", 24, 1024),
  )
}


class Backbone(nn.Module):
  """Embeddings and stack. The output is normalised already."""

  config: ModelConfig

  @nn.compact
  def __call__(
    self, batch: Batch, *, train: bool, cache: None = None
  ) -> tuple[jax.Array, jax.Array, None]:
    cfg, dtype = self.config, precision.of(self.config).values
    init = normal(cfg.init_std)
    x_BxTxD, table_VxD = Embed(
      padded_vocab(cfg.vocab_size), cfg.width, dtype, init, split="tensor", name="token"
    )(batch["tokens"])
    x_BxTxD += Embed(cfg.max_length, cfg.width, dtype, init, name="position")(batch["positions"])[0]
    x_BxTxD += Embed(2, cfg.width, dtype, init, name="type")(batch["types"])[0]
    x_BxTxD = transformer.norm(cfg, FACTS, "embedding_norm")(x_BxTxD)
    x_BxTxD, _ = transformer.trunk(self, FACTS, x_BxTxD, batch, train=train)
    return x_BxTxD, table_VxD, None
