"""Writing text: the prompts go into a cache at once, then the program writes a token at a time.

A decoder continues its prompts. They are padded on the left, so that all end in the same slot. An
encoder-decoder reads its prompts, padded on the right, and starts from the padding token.
"""

from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from llm.config import ModelConfig
from llm.core import Batch, Params
from llm.models import build_backbone, cache, facts, layers, precision
from llm.models.cache import Cache


class Sampling(NamedTuple):
  """How the next token is drawn.

  A temperature of 0 takes the likeliest token. A top_k of 0 and a top_p of 1 leave every token
  possible.
  """

  temperature: float = 0.0
  top_k: int = 0
  top_p: float = 1.0


class Writing(flax.struct.PyTreeNode):
  """Rows that are being written: `count` of at most N tokens are there.

  E are the EXPLAINED likeliest tokens of each step. losses: minus the log-probability of each
  token, at the temperature of the draw and before top_k and top_p. read: what an encoder-decoder
  has read, as its states, segments and positions; {} for a decoder.
  """

  cache: Cache
  logits_BxV: jax.Array  # of the next token, without the vocabulary's padding
  positions_B: jax.Array  # of the next token
  tokens_BxN: jax.Array
  losses_BxN: jax.Array
  best_BxNxE: jax.Array  # the likeliest tokens
  odds_BxNxE: jax.Array  # their probabilities
  finished_B: jax.Array  # whether the row has its end token
  count: jax.Array
  key: jax.Array
  read: dict


def shardings(mesh: Mesh) -> Writing:
  """A sharding in the place of each array: keys and values by heads, the rest on every device."""
  replicated: Any = NamedSharding(mesh, P())
  by_head: Any = NamedSharding(mesh, P(None, "tensor"))
  return Writing(
    cache=Cache(by_head, replicated, replicated, replicated),
    logits_BxV=replicated,
    positions_B=replicated,
    tokens_BxN=replicated,
    losses_BxN=replicated,
    best_BxNxE=replicated,
    odds_BxNxE=replicated,
    finished_B=replicated,
    count=replicated,
    key=replicated,
    read=replicated,
  )


EXPLAINED = 5  # likeliest tokens that are kept at every step


READ_BY_EVERY_TOKEN = ("token", "output")  # tables; the others are looked up alone


def for_many_rows(params: Any, dtype: jnp.dtype) -> Any:
  """The parameters in the form that writes many rows fastest: weights are cast to dtype once."""

  def cast(path: tuple, leaf: jax.Array) -> jax.Array:
    *_, module, name = (getattr(part, "key", None) for part in path)
    is_table = name == "embedding" and module in READ_BY_EVERY_TOKEN
    return jnp.asarray(leaf, dtype) if name == "kernel" or is_table else leaf

  return jax.tree_util.tree_map_with_path(cast, params)


def for_one_row(params: Any, dtype: jnp.dtype) -> Any:
  """The parameters in the form that writes a single row fastest.

  Weights that every token reads are cast to dtype, and kernels are transposed to O x I. Norms,
  biases and positions stay as they are. params: with the layers of every stack as a tuple.
  """
  if isinstance(params, tuple):
    return tuple(for_one_row(layer, dtype) for layer in params)
  prepared = {}
  for name, value in params.items():
    if name in READ_BY_EVERY_TOKEN:
      prepared[name] = {"embedding": jnp.asarray(value["embedding"], dtype)}
    elif isinstance(value, dict) and "kernel" in value:
      other = {key: leaf for key, leaf in value.items() if key != "kernel"}
      prepared[name] = {layers.TRANSPOSED: _transposed(name, value["kernel"], dtype), **other}
    elif isinstance(value, (dict, tuple)):
      prepared[name] = for_one_row(value, dtype)
    else:
      prepared[name] = value
  return prepared


def _transposed(name: str, kernel: jax.Array, dtype: jnp.dtype) -> jax.Array:
  """The kernel of a linear layer as O x I, its dimensions of heads flattened."""
  splits_heads = name in ("query", "key", "value")  # D x H x K; "out" is H x K x D
  if kernel.ndim == 3 and not splits_heads and name != "out":
    raise ValueError(f"{name}: which dimensions of its kernel are inputs is not known")
  shape = (kernel.shape[0], -1) if splits_heads else (-1, kernel.shape[-1])
  return jnp.asarray(kernel, dtype).reshape(shape).T


def _logits(config: ModelConfig, hidden_BxTxD: jax.Array, table_VxD: jax.Array) -> jax.Array:
  """Logits after the last position: BxV float32, without the vocabulary's padding."""
  hidden_BxD = hidden_BxTxD[:, -1]
  types = precision.of(config)
  if hidden_BxD.shape[0] == 1 and jax.default_backend() == "cpu":
    logits_BxV = layers.read_once(hidden_BxD, table_VxD.astype(types.operands))
  else:
    logits_BxV = precision.dot(hidden_BxD, table_VxD.T, types)
  return logits_BxV[:, : config.vocab_size].astype(jnp.float32)


def start(
  config: ModelConfig,
  params: Params,
  batch: Batch,
  slots: int,
  new: int,
  pad: int,
  key: jax.Array,
) -> Writing:
  """Reads the prompts of a batch (tokens, segments, positions: BxT).

  slots: the length of the cache. new: N, the most tokens that will be written. pad: the id of the
  padding token. key: of the draws.
  """
  rows = batch["tokens"].shape[0]
  read = {}
  positions_B = batch["positions"].max(-1) + 1
  if facts(config).kind == "encoder_decoder":
    states_BxSxD = build_backbone(config).apply(
      {"params": params["backbone"]}, batch, train=False, method="encode"
    )
    read = {"states": states_BxSxD, "segments": batch["segments"], "positions": batch["positions"]}
    batch = {
      "tokens": jnp.full((rows, 1), pad, jnp.int32),
      "segments": jnp.ones((rows, 1), jnp.int32),
      "positions": jnp.zeros((rows, 1), jnp.int32),
    }
    positions_B = jnp.ones(rows, jnp.int32)
  logits_BxV, filled = step(config, params, batch, cache.empty(config, rows, slots), read)
  return Writing(
    cache=filled,
    logits_BxV=logits_BxV,
    positions_B=positions_B,
    tokens_BxN=jnp.full((rows, new), pad, jnp.int32),
    losses_BxN=jnp.zeros((rows, new)),
    best_BxNxE=jnp.zeros((rows, new, EXPLAINED), jnp.int32),
    odds_BxNxE=jnp.zeros((rows, new, EXPLAINED)),
    finished_B=jnp.zeros(rows, bool),
    count=jnp.zeros((), jnp.int32),
    key=key,
    read=read,
  )


def step(
  config: ModelConfig, params: Params, batch: Batch, past: Cache, read: Batch
) -> tuple[jax.Array, Cache]:
  """(logits BxV after the new tokens of a batch, the cache with these tokens)."""
  states = {}
  if read:
    states["states_BxSxD"] = read["states"]
    decoder = {f"decoder_{name}": array for name, array in batch.items()}
    batch = {**decoder, "segments": read["segments"], "positions": read["positions"]}
  outputs: Any = build_backbone(config).apply(
    {"params": params["backbone"]}, batch, train=False, cache=past, **states
  )
  hidden_BxTxD, table_VxD, filled = outputs
  return _logits(config, hidden_BxTxD, table_VxD), filled


def draw(logits_BxV: jax.Array, key: jax.Array, sampling: Sampling) -> jax.Array:
  """The next token of each row: B int32.

  top_k keeps the k likeliest tokens (Fan et al. 2018, section 5.4). top_p keeps the fewest of the
  likeliest tokens whose probabilities, after the temperature, sum to p or more (Holtzman et al.
  2020, section 3.1).
  """
  if sampling.temperature == 0:
    return logits_BxV.argmax(-1).astype(jnp.int32)
  logits_BxV = logits_BxV / sampling.temperature
  if sampling.top_k:
    least_Bx1 = jax.lax.top_k(logits_BxV, min(sampling.top_k, logits_BxV.shape[-1]))[0][:, -1:]
    logits_BxV = jnp.where(logits_BxV >= least_Bx1, logits_BxV, -jnp.inf)
  if sampling.top_p < 1:
    logits_BxV = nucleus(logits_BxV, sampling.top_p)
  return jax.random.categorical(key, logits_BxV).astype(jnp.int32)


def drawn_losses(logits_BxV: jax.Array, token_B: jax.Array, temperature: float) -> jax.Array:
  """Minus the log-probability of a token of each row: B. A temperature of 0 is as 1."""
  log_probs_BxV = jax.nn.log_softmax(logits_BxV / (temperature or 1.0))
  return -jnp.take_along_axis(log_probs_BxV, token_B[:, None], axis=-1)[:, 0]


def nucleus(logits_BxV: jax.Array, top_p: float | jax.Array) -> jax.Array:
  """The logits of the fewest likeliest tokens whose probabilities sum to p or more, others -inf.

  top_p: of all rows, or Bx1.
  """
  ordered_BxV = jnp.sort(logits_BxV, axis=-1, descending=True)
  probabilities_BxV = jax.nn.softmax(ordered_BxV)
  kept_BxV = jnp.cumsum(probabilities_BxV, -1) - probabilities_BxV < top_p
  least_Bx1 = jnp.where(kept_BxV, ordered_BxV, jnp.inf).min(-1, keepdims=True)
  return jnp.where(logits_BxV >= least_Bx1, logits_BxV, -jnp.inf)


def advance(
  config: ModelConfig,
  params: Params,
  writing: Writing,
  steps: jax.Array,
  eos: int,
  pad: int,
  sampling: Sampling,
) -> Writing:
  """Writes up to `steps` more tokens: fewer once all rows have finished or N tokens are there.

  steps may be traced. A finished row, which has its `eos`, is filled with `pad`.
  """
  stop = jnp.minimum(writing.count + steps, writing.tokens_BxN.shape[1])

  def is_unfinished(w: Writing) -> jax.Array:
    return (w.count < stop) & ~w.finished_B.all()

  def write_one(w: Writing) -> Writing:
    return _with_one_more(config, params, w, eos, pad, sampling)

  return jax.lax.while_loop(is_unfinished, write_one, writing)


def _with_one_more(
  config: ModelConfig, params: Params, w: Writing, eos: int, pad: int, sampling: Sampling
) -> Writing:
  """The rows with one more token each."""

  def put(array: jax.Array, value: jax.Array) -> jax.Array:
    value = value.astype(array.dtype)
    return jax.lax.dynamic_update_index_in_dim(array, value, w.count, axis=1)

  odds_BxE, best_BxE = jax.lax.top_k(jax.nn.softmax(w.logits_BxV), EXPLAINED)
  drawn_B = draw(w.logits_BxV, jax.random.fold_in(w.key, w.count), sampling)
  token_B = jnp.where(w.finished_B, pad, drawn_B)
  batch = {
    "tokens": token_B[:, None],
    "positions": w.positions_B[:, None],
    "segments": jnp.ones_like(token_B)[:, None],
  }
  logits_BxV, filled = step(config, params, batch, w.cache, w.read)
  return w.replace(
    cache=filled,
    logits_BxV=logits_BxV,
    positions_B=w.positions_B + 1,
    tokens_BxN=put(w.tokens_BxN, token_B),
    losses_BxN=put(w.losses_BxN, drawn_losses(w.logits_BxV, token_B, sampling.temperature)),
    best_BxNxE=put(w.best_BxNxE, best_BxE),
    odds_BxNxE=put(w.odds_BxNxE, odds_BxE),
    finished_B=w.finished_B | (token_B == eos),
    count=w.count + 1,
  )
