"""ModernBERT (Warner et al. 2024): encoder, pre-norm, rotary positions, gated GELU, no biases.

Every third layer sees the whole text, from the first on, and the others a window. A norm follows
the embedding, so the first layer's attention has none: its scale lies in the stack, unused.
"""

import jax
from flax import linen as nn

from llm.config import ModelConfig
from llm.core import Batch
from llm.models import precision, transformer
from llm.models.architecture import Facts, init_std_of, padded_vocab
from llm.models.layers import Embed, normal

FACTS = Facts(
  kind="encoder",
  causal=False,
  activation="gelu",
  norm_epsilon=1e-5,
  begin="cls",
  end="sep",
  norm_bias=False,
  first_norm=False,
  bias=False,
  gated=True,
  rotary=True,
  scaled_residual_init=True,
  pooler=False,
)

# base and large are the published shapes (149M and 395M), 17m is Ettin's (Weller et al. 2025), tiny
# is for a laptop. Three need not divide the layers: the last of base, the 22nd, is global.
SIZES = {
  name: dict(
    num_layers=layers,
    width=width,
    num_heads=heads,
    mlp_dim=mlp_dim,
    max_length=length,
    rope_theta=1.6e5,
    local_rope_theta=local_theta,
    global_every=3,
    window=128,
    dropout=0.0,
  )
  for name, layers, width, heads, mlp_dim, length, local_theta in (
    ("tiny", 4, 128, 4, 192, 1024, 1e4),
    ("17m", 7, 256, 4, 384, 7999, 1.6e5),
    ("base", 22, 768, 12, 1152, 8192, 1e4),
    ("large", 28, 1024, 16, 2624, 8192, 1e4),
  )
}


class Backbone(nn.Module):
  """Embedding and its norm, stack and final norm."""

  config: ModelConfig

  @nn.compact
  def __call__(
    self, batch: Batch, *, train: bool, cache: None = None
  ) -> tuple[jax.Array, jax.Array, None]:
    cfg = self.config
    x_BxTxD, table_VxD = Embed(
      padded_vocab(cfg.vocab_size),
      cfg.width,
      precision.of(cfg).values,
      normal(init_std_of(cfg, FACTS)),
      split="tensor",
      name="token",
    )(batch["tokens"])
    x_BxTxD = transformer.norm(cfg, FACTS, "embedding_norm")(x_BxTxD)
    x_BxTxD, _ = transformer.trunk(self, FACTS, x_BxTxD, batch, train=train)
    return transformer.norm(cfg, FACTS, "final_norm")(x_BxTxD), table_VxD, None
