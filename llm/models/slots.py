"""Slots: rows of one program that requests join and leave at any token.

This is the iteration-level scheduling of Orca (Yu et al. 2022, section 3.1). The caches of all rows
are one ring of S columns: every step writes one column, the same for all rows. A row that joins
gets its prompt in the columns just before it, and nothing of what its slot held before. So a row
may hold S tokens, whenever it came, and no step scatters.
"""

from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from llm.config import ModelConfig
from llm.core import Batch, Params
from llm.models import cache, decoding
from llm.models.cache import Cache

ALTERNATIVES = 20  # likeliest tokens that a step can report


class Slots(flax.struct.PyTreeNode):
  """B rows that are being written. cache.index: the column of the next token of every row."""

  cache: Cache
  logits_BxV: jax.Array  # of the next token
  positions_B: jax.Array  # of the next token


class Wishes(NamedTuple):
  """What each row asks for. A row that is not live is computed and means nothing."""

  live_B: Any
  seeds_B: Any  # uint32; a draw depends on the seed and the position of the token alone
  temperatures_B: Any  # 0 takes the likeliest token
  top_p_B: Any
  explained: Any  # whether any row asks for probabilities


class Step(NamedTuple):
  """The token that each row got. Of nobody who asked, probabilities are 0."""

  tokens_B: jax.Array
  logprobs_B: jax.Array  # of the tokens, in nats, at temperature 1
  best_BxE: jax.Array  # the likeliest tokens
  best_logprobs_BxE: jax.Array


def shardings(mesh: Mesh) -> Slots:
  """A sharding in the place of each array: keys and values by heads, the rest on every device."""
  replicated: Any = NamedSharding(mesh, P())
  by_head: Any = NamedSharding(mesh, P(None, "tensor"))
  return Slots(Cache(by_head, replicated, replicated, replicated), replicated, replicated)


def empty(config: ModelConfig, rows: int, columns: int) -> Slots:
  """Slots that nobody has joined."""
  return Slots(
    cache=cache.empty(config, rows, columns),
    logits_BxV=jnp.zeros((rows, config.vocab_size), jnp.float32),
    positions_B=jnp.zeros(rows, jnp.int32),
  )


def enlarged(slots: Slots, rows: int, columns: int) -> Slots:
  """The same rows, and further empty ones, in a ring that is at least as long."""
  ring = slots.cache
  more_rows = rows - ring.segments_BxS.shape[0]
  more_columns = columns - ring.segments_BxS.shape[1]

  def with_rows(array: jax.Array) -> jax.Array:
    return jnp.pad(array, [(0, more_rows)] + [(0, 0)] * (array.ndim - 1))

  def with_columns(array: jax.Array, axis: int) -> jax.Array:
    padding = [(0, 0)] * array.ndim
    padding[axis] = (more_columns, 0)
    # In order, so that the newest column comes last.
    return with_rows(jnp.pad(jnp.roll(array, -ring.index, axis), padding))

  return Slots(
    cache=Cache(
      past=jax.tree.map(lambda array: with_columns(array, 2), ring.past),
      segments_BxS=with_columns(ring.segments_BxS, 1),
      positions_BxS=with_columns(ring.positions_BxS, 1),
      index=jnp.zeros((), jnp.int32),
    ),
    logits_BxV=with_rows(slots.logits_BxV),
    positions_B=with_rows(slots.positions_B),
  )


def join(config: ModelConfig, params: Params, slots: Slots, row: jax.Array, batch: Batch) -> Slots:
  """Reads a prompt into a slot.

  batch: tokens, segments and positions of one row, padded on the left. The
  ring must be at least as long.
  """
  ring = slots.cache
  columns = ring.segments_BxS.shape[1]
  length = batch["tokens"].shape[1]
  logits_1xV, read = decoding.step(config, params, batch, cache.empty(config, 1, length), {})

  def put(old: jax.Array, new: jax.Array, axis: int = 0) -> jax.Array:
    if axis:
      padding = [(0, 0)] * new.ndim
      padding[axis] = (columns - length, 0)
      new = jnp.roll(jnp.pad(new, padding), ring.index, axis)
    return cache.write(old, new, row, axis=0)

  return Slots(
    cache=ring.replace(
      past=jax.tree.map(lambda old, new: put(old, new, 2), ring.past, read.past),
      segments_BxS=put(ring.segments_BxS, read.segments_BxS, 1),
      positions_BxS=put(ring.positions_BxS, read.positions_BxS, 1),
    ),
    logits_BxV=put(slots.logits_BxV, logits_1xV),
    positions_B=put(slots.positions_B, batch["positions"].max(-1) + 1),
  )


def write(config: ModelConfig, params: Params, slots: Slots, wishes: Wishes) -> tuple[Slots, Step]:
  """One more token of every row."""
  tokens_B = _draw(slots.logits_BxV, slots.positions_B, wishes)
  step = _explained(slots.logits_BxV, tokens_B, wishes.explained)
  batch = {
    "tokens": tokens_B[:, None],
    "positions": slots.positions_B[:, None],
    "segments": wishes.live_B.astype(jnp.int32)[:, None],
  }
  logits_BxV, filled = decoding.step(config, params, batch, slots.cache, {})
  ring = filled.replace(index=filled.index % filled.segments_BxS.shape[1])
  return Slots(ring, logits_BxV, slots.positions_B + 1), step


def _draw(logits_BxV: jax.Array, positions_B: jax.Array, wishes: Wishes) -> jax.Array:
  """The next token of each row: B int32."""
  likeliest_B = logits_BxV.argmax(-1).astype(jnp.int32)

  def keep_nucleus(scaled_BxV: jax.Array) -> jax.Array:
    return decoding.nucleus(scaled_BxV, wishes.top_p_B[:, None])

  def drawn() -> jax.Array:
    keys_B = jax.vmap(lambda seed, position: jax.random.fold_in(jax.random.key(seed), position))(
      wishes.seeds_B, positions_B
    )
    # From the highest logit on: a temperature near 0 then divides no large number.
    below_best_BxV = logits_BxV - logits_BxV.max(-1, keepdims=True)
    scaled_BxV = below_best_BxV / jnp.maximum(wishes.temperatures_B, 1e-6)[:, None]
    any_cut = (wishes.top_p_B < 1).any()
    scaled_BxV = jax.lax.cond(any_cut, keep_nucleus, lambda same: same, scaled_BxV)
    return jax.vmap(jax.random.categorical)(keys_B, scaled_BxV).astype(jnp.int32)

  # Drawing and sorting cost more than a step of a small model: they are done where somebody asks.
  drawn_B = jax.lax.cond((wishes.temperatures_B > 0).any(), drawn, lambda: likeliest_B)
  return jnp.where(wishes.temperatures_B > 0, drawn_B, likeliest_B)


def _explained(logits_BxV: jax.Array, tokens_B: jax.Array, explained: jax.Array) -> Step:
  """The tokens, with probabilities where `explained`."""
  rows, vocab = logits_BxV.shape
  count = min(ALTERNATIVES, vocab)

  def explain() -> Step:
    logprobs_BxV = jax.nn.log_softmax(logits_BxV)
    best_logprobs_BxE, best_BxE = jax.lax.top_k(logprobs_BxV, count)
    of_tokens_B = jnp.take_along_axis(logprobs_BxV, tokens_B[:, None], axis=-1)[:, 0]
    return Step(tokens_B, of_tokens_B, best_BxE, best_logprobs_BxE)

  def leave() -> Step:
    nothing_BxE = jnp.zeros((rows, count))
    return Step(tokens_B, jnp.zeros(rows), nothing_BxE.astype(jnp.int32), nothing_BxE)

  return jax.lax.cond(explained, explain, leave)
