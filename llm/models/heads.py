"""Heads: what an objective needs of the hidden states. They compute only what is predicted.

A head is called as `head(hidden_BxTxD, batch, table_VxD, train=)`, where the table is that of the
output layer. It returns a dict of arrays.
"""

import jax
import jax.numpy as jnp
from flax import linen as nn

from llm import models
from llm.config import ModelConfig
from llm.core import Batch
from llm.models import attention, precision, transformer
from llm.models.architecture import padded_vocab
from llm.models.layers import ACTIVATIONS, Linear, matmul, normal
from llm.models.precision import Precision
from llm.sharding import BATCH, constrain


class Model(nn.Module):
  """A backbone with a head. Its parameters are {"backbone": ..., "head": ...}."""

  backbone: nn.Module
  head: nn.Module

  def __call__(self, batch: Batch, *, train: bool) -> dict[str, jax.Array]:
    hidden_BxTxD, table_VxD, _ = self.backbone(batch, train=train)
    return self.head(hidden_BxTxD, batch, table_VxD, train=train)


def token_losses(
  hidden_BxTxD: jax.Array,
  table_VxD: jax.Array,
  bias_V: jax.Array | None,
  targets_BxT: jax.Array,
  types: Precision,
  *,
  vocab_size: int,
  chunk: int,
) -> tuple[jax.Array, jax.Array]:
  """(cross-entropy of each target in nats, 1 where the target is the likeliest token), both BxT.

  Both are float32 or better. Logits of the vocabulary's padding do not count. chunk: so many
  positions are computed at a time, and once more in the backward pass, so that BxTxV logits never
  exist; 0 computes all positions at once.
  """

  def losses(hidden_BxTxD: jax.Array, targets_BxT: jax.Array) -> tuple[jax.Array, jax.Array]:
    exact = jnp.promote_types(hidden_BxTxD.dtype, jnp.float32)
    logits_BxTxV = matmul(hidden_BxTxD, table_VxD.T, types).astype(exact)
    if bias_V is not None:
      logits_BxTxV += bias_V
    logits_BxTxV = constrain(logits_BxTxV, BATCH, None, "tensor")
    real_V = jnp.arange(table_VxD.shape[0]) < vocab_size
    logits_BxTxV = jnp.where(real_V, logits_BxTxV, -1e30)
    target_BxT = jnp.take_along_axis(logits_BxTxV, targets_BxT[..., None], axis=-1)[..., 0]
    best_BxT = jax.lax.stop_gradient(logits_BxTxV.max(-1))
    total_BxT = jnp.exp(logits_BxTxV - best_BxT[..., None]).sum(-1)
    losses_BxT = best_BxT + jnp.log(total_BxT) - target_BxT
    return losses_BxT, (target_BxT >= best_BxT).astype(exact)

  length = targets_BxT.shape[1]
  if not chunk or chunk >= length:
    return losses(hidden_BxTxD, targets_BxT)
  chunks = (_chunked(hidden_BxTxD, chunk), _chunked(targets_BxT, chunk))
  losses_NxBxT, correct_NxBxT = jax.lax.map(lambda args: jax.checkpoint(losses)(*args), chunks)
  return _joined(losses_NxBxT, length), _joined(correct_NxBxT, length)


def _chunked(array: jax.Array, chunk: int) -> jax.Array:
  """B x T x .. -> chunks x B x chunk x .., the last chunk padded with zeros."""
  rows, length, *other = array.shape
  padding = ((0, 0), (0, -length % chunk)) + ((0, 0),) * len(other)
  return jnp.pad(array, padding).reshape(rows, -1, chunk, *other).swapaxes(0, 1)


def _joined(array_NxBxT: jax.Array, length: int) -> jax.Array:
  """Chunks x B x chunk -> B x length: the inverse of `_chunked`."""
  rows = array_NxBxT.shape[1]
  return array_NxBxT.swapaxes(0, 1).reshape(rows, -1)[:, :length]


class CausalLMHead(nn.Module):
  """Next-token losses through the tied embedding table; no parameters of its own."""

  config: ModelConfig

  @nn.compact
  def __call__(
    self, hidden_BxTxD: jax.Array, batch: Batch, table_VxD: jax.Array, *, train: bool
  ) -> dict[str, jax.Array]:
    losses, correct = token_losses(
      hidden_BxTxD,
      table_VxD,
      None,
      batch["targets"],
      precision.of(self.config),
      vocab_size=self.config.vocab_size,
      chunk=self.config.loss_chunk,
    )
    return {"losses": losses, "correct": correct}


def pooler(hidden_BxTxD: jax.Array, firsts_BxN: jax.Array, types: Precision) -> jax.Array:
  """tanh(W h + b) of the first token of each example of a row -> BxNxD.

  It is in BERT's published code, and both phases share it.
  """
  width = hidden_BxTxD.shape[-1]
  first_BxNxD = jnp.take_along_axis(hidden_BxTxD, firsts_BxN[..., None], axis=1)
  return jnp.tanh(Linear((width, width), precision=types, name="pooler")(first_BxNxD))


class MaskedLMHead(nn.Module):
  """Token losses at the masked positions, BxM, and logits of next-sentence prediction, BxNx2.

  The output layer is a linear transform with a norm, then the embedding table and a bias (BERT's
  published code).
  """

  config: ModelConfig
  next_sentence: bool

  @nn.compact
  def __call__(
    self, hidden_BxTxD: jax.Array, batch: Batch, table_VxD: jax.Array, *, train: bool
  ) -> dict[str, jax.Array]:
    cfg = self.config
    types = precision.of(cfg)
    facts = models.facts(cfg)
    masked_BxMxD = jnp.take_along_axis(hidden_BxTxD, batch["masked_positions"][..., None], axis=1)
    transform = Linear(
      (cfg.width, cfg.width),
      precision=types,
      kernel_init=normal(cfg.init_std),
      bias=facts.bias,
      name="transform",
    )
    masked_BxMxD = ACTIVATIONS[facts.activation](transform(masked_BxMxD))
    masked_BxMxD = transformer.norm(cfg, facts, "transform_norm")(masked_BxMxD)
    bias_V = LMBias(padded_vocab(cfg.vocab_size), name="lm")()
    losses, correct = token_losses(
      masked_BxMxD,
      table_VxD,
      bias_V,
      batch["masked_targets"],
      types,
      vocab_size=cfg.vocab_size,
      chunk=cfg.loss_chunk,
    )
    outputs = {"losses": losses, "correct": correct}
    if self.next_sentence:
      pooled_BxNxD = pooler(hidden_BxTxD, batch["firsts"], types)
      next_sentence = Linear((cfg.width, 2), precision=types, name="next_sentence")
      outputs["pair_logits"] = next_sentence(pooled_BxNxD).astype(losses.dtype)
    return outputs


class SpanHead(nn.Module):
  """Scores of every token as the start and as the end of an answer, BxT each."""

  config: ModelConfig

  @nn.compact
  def __call__(
    self, hidden_BxTxD: jax.Array, batch: Batch, table_VxD: jax.Array, *, train: bool
  ) -> dict[str, jax.Array]:
    types = precision.of(self.config)
    scores_BxTx2 = Linear((self.config.width, 2), precision=types, name="span")(hidden_BxTxD)
    scores_BxTx2 = scores_BxTx2.astype(jnp.promote_types(types.values, jnp.float32))
    return {"starts": scores_BxTx2[..., 0], "ends": scores_BxTx2[..., 1]}


class LMBias(nn.Module):
  """The output bias of the masked language model: V."""

  size: int

  @nn.compact
  def __call__(self) -> jax.Array:
    return self.param("bias", nn.initializers.zeros, (self.size,))


class ClassificationHead(nn.Module):
  """Logits BxNxC from one vector an example: segment n + 1 of a row begins at firsts_BxN[:, n].

  pooling: "first" is BERT's pooler on the first token, "last" the last token and "mean" the mean of
  all tokens of the example.
  """

  config: ModelConfig
  num_classes: int
  pooling: str

  @nn.compact
  def __call__(
    self, hidden_BxTxD: jax.Array, batch: Batch, table_VxD: jax.Array, *, train: bool
  ) -> dict[str, jax.Array]:
    cfg = self.config
    types = precision.of(cfg)
    if self.pooling == "first":
      pooled_BxNxD = pooler(hidden_BxTxD, batch["firsts"], types)
    else:
      pooled_BxNxD = _last_or_mean(hidden_BxTxD, batch["firsts"], batch["segments"], self.pooling)
    key = self.make_rng("dropout") if train and cfg.dropout else None
    pooled_BxNxD = attention.dropout(pooled_BxNxD, cfg.dropout, key)
    classifier = Linear((cfg.width, self.num_classes), precision=types, name="classifier")
    logits_BxNxC = classifier(pooled_BxNxD)
    return {"logits": logits_BxNxC.astype(jnp.promote_types(types.values, jnp.float32))}


def _last_or_mean(
  hidden_BxTxD: jax.Array, firsts_BxN: jax.Array, segments_BxT: jax.Array, pooling: str
) -> jax.Array:
  """The last token of each example ("last"), or the mean of its tokens ("mean"): BxNxD."""
  of_example_BxTxN = segments_BxT[..., None] == 1 + jnp.arange(firsts_BxN.shape[1])
  lengths_BxN = jnp.maximum(of_example_BxTxN.sum(1), 1)  # slots may be empty
  if pooling == "last":
    last_BxN = firsts_BxN + lengths_BxN - 1
    return jnp.take_along_axis(hidden_BxTxD, last_BxN[..., None], axis=1)
  weights_BxTxN = of_example_BxTxN.astype(hidden_BxTxD.dtype)
  total_BxNxD = jnp.einsum("BTD,BTN->BND", hidden_BxTxD, weights_BxTxN)
  return total_BxNxD / lengths_BxN[..., None]
