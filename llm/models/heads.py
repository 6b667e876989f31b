"""Heads: what is computed from the hidden states, and only where something is predicted.

A head is called as `head(hidden_BxTxD, batch, table_VxD, train=)` and returns a dict of arrays.
"""

import math
from typing import Callable

import jax
import jax.numpy as jnp
from flax import linen as nn

from llm import models
from llm.config import ModelConfig
from llm.core import Batch
from llm.models import attention, precision, transformer
from llm.models.architecture import embedding_width_of, init_std_of, padded_vocab
from llm.models.layers import ACTIVATIONS, Linear, matmul_table, normal
from llm.models.precision import Precision
from llm.sharding import BATCH, constrain


class Model(nn.Module):
  """A backbone with a head; parameters are {"backbone": ..., "head": ...}."""

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
  """Cross-entropy of each target in nats and whether it was the likeliest token, both BxT float32.

  Logits of the padding of the vocabulary do not count. With `chunk`, that many positions at a
  time, recomputed in the backward pass, so that BxTxV logits never exist.
  """

  def losses(hidden_BxTxD, targets_BxT):
    logits_BxTxV = token_logits(hidden_BxTxD, table_VxD, bias_V, types, vocab_size)
    target_BxT = jnp.take_along_axis(logits_BxTxV, targets_BxT[..., None], axis=-1)[..., 0]
    best_BxT = jax.lax.stop_gradient(logits_BxTxV.max(-1))
    total_BxT = jnp.exp(logits_BxTxV - best_BxT[..., None]).sum(-1)
    correct_BxT = (target_BxT >= best_BxT).astype(logits_BxTxV.dtype)
    return best_BxT + jnp.log(total_BxT) - target_BxT, correct_BxT

  losses_BxT, correct_BxT = in_chunks(losses, chunk, hidden_BxTxD, targets_BxT)
  return losses_BxT, correct_BxT


def token_draws(
  hidden_BxTxD: jax.Array,
  table_VxD: jax.Array,
  bias_V: jax.Array | None,
  key: jax.Array,
  types: Precision,
  *,
  vocab_size: int,
  chunk: int,
) -> jax.Array:
  """BxT: a token for each position, drawn from what its logits say. No gradient passes."""
  hidden_BxTxD, table_VxD, bias_V = jax.lax.stop_gradient((hidden_BxTxD, table_VxD, bias_V))

  def draw(number, logits_V):
    return jax.random.categorical(jax.random.fold_in(key, number), logits_V).astype(jnp.int32)

  def draws(hidden_BxTxD, numbers_BxT):
    logits_BxTxV = token_logits(hidden_BxTxD, table_VxD, bias_V, types, vocab_size)
    return (jax.vmap(jax.vmap(draw))(numbers_BxT, logits_BxTxV),)

  numbers_BxT = jnp.arange(math.prod(hidden_BxTxD.shape[:2])).reshape(hidden_BxTxD.shape[:2])
  return in_chunks(draws, chunk, hidden_BxTxD, numbers_BxT)[0]


def token_logits(
  hidden_BxTxD: jax.Array,
  table_VxD: jax.Array,
  bias_V: jax.Array | None,
  types: Precision,
  vocab_size: int,
) -> jax.Array:
  """BxTxV in float32 or better, without probability for the rows that pad the vocabulary."""
  exact = jnp.promote_types(hidden_BxTxD.dtype, jnp.float32)
  logits_BxTxV = matmul_table(hidden_BxTxD, table_VxD, types).astype(exact)
  if bias_V is not None:
    logits_BxTxV += bias_V
  logits_BxTxV = constrain(logits_BxTxV, BATCH, None, "tensor")
  real_V = jnp.arange(table_VxD.shape[0]) < vocab_size
  return jnp.where(real_V, logits_BxTxV, -1e30)


def in_chunks(
  function: Callable[..., tuple[jax.Array, ...]], chunk: int, *arrays_BxT: jax.Array
) -> tuple[jax.Array, ...]:
  """function(*arrays), arrays BxT, `chunk` positions at a time; 0 is all at once."""
  length = arrays_BxT[0].shape[1]
  if not chunk or chunk >= length:
    return function(*arrays_BxT)
  rest = -length % chunk
  pieces = [
    jnp.pad(a, ((0, 0), (0, rest)) + ((0, 0),) * (a.ndim - 2))
    .reshape(a.shape[0], -1, chunk, *a.shape[2:])
    .swapaxes(0, 1)
    for a in arrays_BxT
  ]
  chunks = jax.lax.map(lambda piece: jax.checkpoint(function)(*piece), tuple(pieces))
  return tuple(a.swapaxes(0, 1).reshape(a.shape[1], -1)[:, :length] for a in chunks)


class CausalLMHead(nn.Module):
  """Next-token losses through the tied embedding table; no parameters of its own.

  temperature: divides the logits.
  """

  config: ModelConfig
  temperature: float = 1.0

  @nn.compact
  def __call__(
    self, hidden_BxTxD: jax.Array, batch: Batch, table_VxD: jax.Array, *, train: bool
  ) -> dict[str, jax.Array]:
    if self.temperature != 1:
      hidden_BxTxD = hidden_BxTxD / self.temperature
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


def at_positions(hidden_BxTxD: jax.Array, positions_BxN: jax.Array) -> jax.Array:
  """BxNxD: the states of some positions of each row."""
  return jnp.take_along_axis(hidden_BxTxD, positions_BxN[..., None], axis=1)


def pooler(hidden_BxTxD: jax.Array, firsts_BxN: jax.Array, types: Precision) -> jax.Array:
  """BxNxD: tanh(W h + b) of the first token of each example of a row.

  As in BERT's published code, next-sentence prediction and classification share the layer.
  """
  width = hidden_BxTxD.shape[-1]
  first_BxNxD = at_positions(hidden_BxTxD, firsts_BxN)
  return jnp.tanh(Linear((width, width), precision=types, name="pooler")(first_BxNxD))


class MaskedLMHead(nn.Module):
  """Losses at the masked positions (transform, tied decoder) and of next-sentence prediction.

  draws: a token for each masked position too, drawn from its probabilities. Its randomness is of
  the stream `dropout` in training, and always the same in evaluation. logits: those of every piece
  at each masked position too.
  """

  config: ModelConfig
  next_sentence: bool
  draws: bool = False
  logits: bool = False

  @nn.compact
  def __call__(
    self, hidden_BxTxD: jax.Array, batch: Batch, table_VxD: jax.Array, *, train: bool
  ) -> dict[str, jax.Array]:
    cfg, types = self.config, precision.of(self.config)
    masked_BxMxE = self.transformed(at_positions(hidden_BxTxD, batch["masked_positions"]))
    bias_V = LMBias(padded_vocab(cfg.vocab_size), name="lm")()
    losses, correct = token_losses(
      masked_BxMxE,
      table_VxD,
      bias_V,
      batch["masked_targets"],
      types,
      vocab_size=cfg.vocab_size,
      chunk=cfg.loss_chunk,
    )
    outputs = {"losses": losses, "correct": correct}
    if self.logits:
      outputs["logits"] = token_logits(masked_BxMxE, table_VxD, bias_V, types, cfg.vocab_size)
    if self.draws:
      outputs["drawn"] = token_draws(
        masked_BxMxE,
        table_VxD,
        bias_V,
        self.make_rng("dropout") if train else jax.random.key(0),
        types,
        vocab_size=cfg.vocab_size,
        chunk=cfg.loss_chunk,
      )
    if self.next_sentence:
      next_sentence = Linear((cfg.width, 2), precision=types, name="next_sentence")
      pair_logits_BxNx2 = next_sentence(pooler(hidden_BxTxD, batch["firsts"], types))
      outputs["pair_logits"] = pair_logits_BxNx2.astype(losses.dtype)
    return outputs

  def transformed(self, masked_BxMxD: jax.Array) -> jax.Array:
    """BxMxE: the masked states, ready for the product with the table of tokens."""
    cfg, facts = self.config, models.facts(self.config)
    transform = Linear(
      (cfg.width, embedding_width_of(cfg)),
      precision=precision.of(cfg),
      kernel_init=normal(init_std_of(cfg, facts)),
      bias=facts.bias,
      name="transform",
    )
    masked_BxMxE = ACTIVATIONS[facts.activation](transform(masked_BxMxD))
    return transformer.norm(cfg, facts, "transform_norm")(masked_BxMxE)


class DetectionHead(nn.Module):
  """A logit BxT for each token: whether it was replaced."""

  config: ModelConfig

  @nn.compact
  def __call__(
    self, hidden_BxTxD: jax.Array, batch: Batch, table_VxD: jax.Array, *, train: bool
  ) -> dict[str, jax.Array]:
    cfg, types, facts = self.config, precision.of(self.config), models.facts(self.config)
    init = normal(init_std_of(cfg, facts))
    transform = Linear(
      (cfg.width, cfg.width), precision=types, kernel_init=init, name="detection_transform"
    )
    detection = Linear((cfg.width, 1), precision=types, kernel_init=init, name="detection")
    logits_BxT = detection(ACTIVATIONS[facts.activation](transform(hidden_BxTxD)))[..., 0]
    return {"detection_logits": logits_BxT.astype(jnp.promote_types(types.values, jnp.float32))}


class SpanHead(nn.Module):
  """Scores BxT of every token as the start, and as the end, of an answer."""

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
  """The output bias of the masked language model."""

  size: int

  @nn.compact
  def __call__(self) -> jax.Array:
    return self.param("bias", nn.initializers.zeros, (self.size,))


class ClassificationHead(nn.Module):
  """Logits BxNxC from one vector an example: segment n + 1 of a row begins at firsts_BxN[:, n].

  pooling: first (the first token, through BERT's pooler where the architecture has one), last (the
  last token of a decoder), mean (of all tokens of the example).
  """

  config: ModelConfig
  num_classes: int
  pooling: str

  @nn.compact
  def __call__(
    self, hidden_BxTxD: jax.Array, batch: Batch, table_VxD: jax.Array, *, train: bool
  ) -> dict[str, jax.Array]:
    cfg, types = self.config, precision.of(self.config)
    firsts_BxN = batch["firsts"]
    if self.pooling == "first" and models.facts(cfg).pooler:
      pooled_BxNxD = pooler(hidden_BxTxD, firsts_BxN, types)
    elif self.pooling == "first":
      pooled_BxNxD = at_positions(hidden_BxTxD, firsts_BxN)
    else:
      of_example_BxTxN = batch["segments"][..., None] == 1 + jnp.arange(firsts_BxN.shape[1])
      lengths_BxN = jnp.maximum(of_example_BxTxN.sum(1), 1)  # slots may be empty
      if self.pooling == "last":
        pooled_BxNxD = at_positions(hidden_BxTxD, firsts_BxN + lengths_BxN - 1)
      else:
        total_BxNxD = jnp.einsum(
          "BTD,BTN->BND", hidden_BxTxD, of_example_BxTxN.astype(hidden_BxTxD.dtype)
        )
        pooled_BxNxD = total_BxNxD / lengths_BxN[..., None]
    key = self.make_rng("dropout") if train and cfg.dropout else None
    pooled_BxNxD = attention.dropout(pooled_BxNxD, cfg.dropout, key)
    classifier = Linear((cfg.width, self.num_classes), precision=types, name="classifier")
    return {"logits": classifier(pooled_BxNxD).astype(jnp.promote_types(types.values, jnp.float32))}
