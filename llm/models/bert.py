"""BERT (Devlin et al. 2019): encoder, post-norm, exact GELU, learned positions, token types."""

from typing import ClassVar

import jax
from flax import linen as nn

from llm.config import ModelConfig
from llm.core import Batch
from llm.models import precision, transformer
from llm.models.architecture import Facts, embedding_width_of, init_std_of, padded_vocab
from llm.models.layers import Embed, normal

FACTS = Facts(
  kind="encoder",
  causal=False,
  activation="gelu",
  norm_epsilon=1e-12,
  begin="cls",
  end="sep",
  tuning_dropout=0.1,
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
  facts: ClassVar[Facts] = FACTS

  def setup(self):
    cfg = self.config
    dtype = precision.of(cfg).values
    width = embedding_width_of(cfg)
    init = normal(init_std_of(cfg, self.facts))
    self.token = Embed(padded_vocab(cfg.vocab_size), width, dtype, init, split="tensor")
    self.position = Embed(cfg.max_length, width, dtype, init)
    self.type = Embed(2, width, dtype, init)
    self.embedding_norm = transformer.norm(cfg, self.facts, "embedding_norm")

  def embed(self, batch: Batch) -> tuple[jax.Array, jax.Array]:
    """(BxTxE, the table of tokens)."""
    x_BxTxE, table_VxE = self.token(batch["tokens"])
    x_BxTxE += self.position(batch["positions"])[0]
    x_BxTxE += self.type(batch["types"])[0]
    return self.embedding_norm(x_BxTxE), table_VxE

  @nn.compact
  def __call__(
    self, batch: Batch, *, train: bool, cache: None = None
  ) -> tuple[jax.Array, jax.Array, None]:
    x_BxTxD, table_VxD = self.embed(batch)
    x_BxTxD, _ = transformer.trunk(self, self.facts, x_BxTxD, batch, train=train)
    return x_BxTxD, table_VxD, None
