"""ELECTRA (Clark et al. 2020): BERT, with an embedding that may be narrower than its layers.

This is the discriminator. The generator that it is trained beside is a narrower backbone, which
reads the same embedding (objectives/replaced_token.py).
"""

import dataclasses
from typing import ClassVar

import jax
from flax import linen as nn

from llm.core import Batch
from llm.models import bert, precision, transformer
from llm.models.architecture import Facts, embedding_width_of, init_std_of
from llm.models.layers import Linear, normal

# The published code classifies by the first token itself.
FACTS = dataclasses.replace(bert.FACTS, pooler=False, embedding_project=True)

# small and base are the published shapes (table 6), tiny is for a laptop.
SIZES = {
  name: dict(
    num_layers=layers,
    width=width,
    embedding_width=embedding_width,
    num_heads=width // 64,
    mlp_dim=4 * width,
    max_length=512,
    dropout=0.1,
  )
  for name, layers, width, embedding_width in (
    ("tiny", 2, 128, 64),
    ("small", 12, 256, 128),
    ("base", 12, 768, 768),
  )
}


class Backbone(bert.Backbone):
  """BERT's embeddings, a projection to the width of the layers where it differs, and the stack.

  embedded: what `embed` of another backbone gave, in place of embeddings of its own.
  """

  facts: ClassVar[Facts] = FACTS

  @nn.compact
  def __call__(
    self,
    batch: Batch,
    *,
    train: bool,
    cache: None = None,
    embedded: tuple[jax.Array, jax.Array] | None = None,
  ) -> tuple[jax.Array, jax.Array, None]:
    cfg = self.config
    x_BxTxD, table_VxE = self.embed(batch) if embedded is None else embedded
    if cfg.width != embedding_width_of(cfg):
      project = Linear(
        (embedding_width_of(cfg), cfg.width),
        precision=precision.of(cfg),
        kernel_init=normal(init_std_of(cfg, self.facts)),
        name="embedding_project",
      )
      x_BxTxD = project(x_BxTxD)
    x_BxTxD, _ = transformer.trunk(self, self.facts, x_BxTxD, batch, train=train)
    return x_BxTxD, table_VxE, None
