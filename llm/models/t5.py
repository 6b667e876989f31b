"""T5 (Raffel et al. 2020): encoder and decoder, RMS norms, relative position biases, no others.

v1.1, the released checkpoints of that name, has gated GELU and an output layer of its own. v1.0 has
ReLU and a tied output.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import linen as nn

from llm.config import ModelConfig
from llm.core import Batch
from llm.models import attention as attention_lib
from llm.models import precision, transformer
from llm.models.architecture import Facts, init_std_of, padded_vocab
from llm.models.cache import Cache
from llm.models.layers import Embed, normal

FACTS = Facts(
  kind="encoder_decoder",
  causal=False,  # the encoder; the decoder is
  activation="relu",
  norm_epsilon=1e-6,
  untied=True,
  norm="rms",
  bias=False,
  position_bias=True,
  scaled_scores=False,
  fan_in_init=True,
  inner_dropout=True,
)

BUCKETS, FARTHEST = 32, 128  # of relative positions, in all published models

# The published shapes (google-research/text-to-text-transfer-transformer); tiny is for a laptop.
# num_layers: of the encoder, and of the decoder. v1.1 was pretrained without dropout and is
# fine-tuned with 0.1.
SIZES = {
  name: dict(
    num_layers=layers,
    width=width,
    num_heads=heads,
    head_width=head_width,
    mlp_dim=mlp_dim,
    max_length=512,
    tied=not gated,
    gated=gated,
    dropout=0.0 if gated else 0.1,
  )
  for name, layers, width, heads, head_width, mlp_dim, gated in (
    ("tiny", 2, 128, 4, 32, 256, True),
    ("small", 8, 512, 6, 64, 1024, True),
    ("base", 12, 768, 12, 64, 2048, True),
    ("large", 24, 1024, 16, 64, 2816, True),
    ("3b", 24, 2048, 32, 64, 5120, True),
    ("11b", 24, 4096, 64, 64, 10_240, True),
    ("small-v1.0", 6, 512, 8, 64, 2048, False),
    ("base-v1.0", 12, 768, 12, 64, 3072, False),
    ("large-v1.0", 24, 1024, 16, 64, 4096, False),
    ("3b-v1.0", 24, 1024, 32, 128, 16_384, False),
    ("11b-v1.0", 24, 1024, 128, 128, 65_536, False),
  )
}


def bucket(relative: jax.Array, *, causal: bool) -> jax.Array:
  """Bucket of key position - query position (section 2.1; mesh_tensorflow's code has the rule).

  Half of the buckets are a distance each; the others grow by a constant factor up to FARTHEST.
  Without causality, half of all buckets serve later keys.
  """
  number = BUCKETS if causal else BUCKETS // 2
  later = jnp.zeros_like(relative) if causal else jnp.where(relative > 0, number, 0)
  distance = jnp.maximum(-relative, 0) if causal else jnp.abs(relative)
  exact = number // 2
  growth = jnp.log(jnp.maximum(distance, 1) / exact) / jnp.log(FARTHEST / exact)
  far = jnp.minimum(exact + (growth * (number - exact)).astype(jnp.int32), number - 1)
  return later + jnp.where(distance < exact, distance, far)


class Stack(nn.Module):
  """Blocks with their relative position bias, which all layers share, and the final norm."""

  config: ModelConfig
  facts: Facts

  @nn.compact
  def __call__(
    self,
    x_BxTxD: jax.Array,
    batch: Batch,
    memory: transformer.Memory | None = None,
    *,
    train: bool,
    cache: Cache | None = None,
  ) -> tuple[jax.Array, Cache | None]:
    cfg = self.config
    bias_HxTxS = self.position_bias(x_BxTxD, cache)
    x_BxTxD, cache = transformer.trunk(
      self,
      self.facts,
      x_BxTxD,
      batch,
      train=train,
      bias_HxTxS=bias_HxTxS,
      memory=memory,
      cache=cache,
    )
    x_BxTxD = transformer.norm(cfg, self.facts, "final_norm")(x_BxTxD)
    key = self.make_rng("dropout") if train and cfg.dropout else None
    return attention_lib.dropout(x_BxTxD, cfg.dropout, key), cache

  def position_bias(self, x_BxTxD: jax.Array, cache: Cache | None) -> jax.Array:
    """HxTxS. Within a packed document, positions differ as places in the row do."""
    cfg, length = self.config, x_BxTxD.shape[1]
    if cache is None:
      place_T = place_S = jnp.arange(length)
    else:
      place_T = cache.index + jnp.arange(length)
      place_S = jnp.arange(cache.segments_BxS.shape[1])
    buckets_TxS = bucket(place_S - place_T[:, None], causal=self.facts.causal)
    table = Embed(
      BUCKETS,
      cfg.num_heads,
      jnp.promote_types(x_BxTxD.dtype, jnp.float32),
      normal(init_std_of(cfg, FACTS) * cfg.width**-0.5),
      name="relative",
    )
    return table(buckets_TxS)[0].transpose(2, 0, 1)


class Backbone(nn.Module):
  """Encoder and decoder over one embedding -> hidden states of the decoder.

  The encoder reads tokens, segments and positions of a batch, the decoder those called decoder_*. A
  segment of the decoder looks at the encoder's of the same number.
  """

  config: ModelConfig

  def setup(self):
    cfg, dtype = self.config, precision.of(self.config).values
    rows, output_std = padded_vocab(cfg.vocab_size), init_std_of(cfg, FACTS) * cfg.width**-0.5
    activation = "gelu_tanh" if cfg.gated else "relu"
    facts = dataclasses.replace(FACTS, gated=cfg.gated, activation=activation)
    self.token = Embed(rows, cfg.width, dtype, normal(init_std_of(cfg, FACTS)), split="tensor")
    if not cfg.tied:
      self.output = Embed(rows, cfg.width, dtype, normal(output_std), split="tensor")
    self.encoder = Stack(cfg, facts)
    self.decoder = Stack(cfg, dataclasses.replace(facts, causal=True))

  def encode(self, batch: Batch, *, train: bool) -> jax.Array:
    """Hidden states BxSxD of the encoder."""
    return self.encoder(self.token(batch["tokens"])[0], batch, train=train)[0]

  def __call__(
    self,
    batch: Batch,
    *,
    train: bool,
    cache: Cache | None = None,
    states_BxSxD: jax.Array | None = None,
  ) -> tuple[jax.Array, jax.Array, Cache | None]:
    """states: what `encode` gave, where it need not be computed again."""
    if states_BxSxD is None:
      states_BxSxD = self.encode(batch, train=train)
    decoder = {name: batch[f"decoder_{name}"] for name in ("segments", "positions")}
    x_BxTxD, table_VxD = self.token(batch["decoder_tokens"])
    visibility = attention_lib.Visibility(
      decoder["segments"], batch["segments"], decoder["positions"], batch["positions"]
    )
    memory = transformer.Memory(states_BxSxD, visibility)
    hidden_BxTxD, cache = self.decoder(x_BxTxD, decoder, memory, train=train, cache=cache)
    if not self.config.tied:
      return hidden_BxTxD, self.output.table(), cache
    if self.config.scaled_output:  # as mesh_tensorflow scales tied outputs
      hidden_BxTxD = hidden_BxTxD * self.config.width**-0.5
    return hidden_BxTxD, table_VxD, cache
