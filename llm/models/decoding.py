"""Writing text: prompts into a cache once, then a token at a time inside the compiled program.

Decoders continue their prompts, padded on the left so that all end in one slot; an encoder-decoder reads its
prompts, padded on the right, and starts from the padding token.
"""

from typing import NamedTuple

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
  """How the next token is drawn. temperature 0 takes the likeliest; top_k 0 and top_p 1 leave all possible."""

  temperature: float = 0.0
  top_k: int = 0
  top_p: float = 1.0


class Writing(flax.struct.PyTreeNode):
  """Rows being written: N tokens at most, `count` of them done. `finished`: those that wrote the end token."""

  cache: Cache
  logits_BxV: jax.Array  # of the token to come; real pieces only
  positions_B: jax.Array  # of the token to come
  tokens_BxN: jax.Array
  best_BxNxE: jax.Array  # the likeliest tokens at every step, and their probabilities
  odds_BxNxE: jax.Array
  finished_B: jax.Array
  count: jax.Array
  key: jax.Array
  read: dict  # of an encoder-decoder: what was read


def shardings(mesh: Mesh) -> Writing:
  """How rows being written lie on a mesh: keys and values by heads, the rest on every device."""
  whole, by_head = NamedSharding(mesh, P()), NamedSharding(mesh, P(None, "tensor"))
  return Writing(
    Cache(by_head, whole, whole, whole), *(whole,) * (len(Writing.__dataclass_fields__) - 1)
  )


EXPLAINED = 5  # likeliest tokens kept at every step


def for_one_row(params, dtype: jnp.dtype):
  """Parameters with which one row is written: weights that every token reads, cast to dtype.

  Kernels are transposed, O x I. Norms, biases and positions stay as they are. params: with the
  layers of every stack as a tuple.
  """
  if isinstance(params, tuple):
    return tuple(for_one_row(layer, dtype) for layer in params)
  narrow = {}
  for name, value in params.items():
    if name in ("token", "output"):
      narrow[name] = {"embedding": jnp.asarray(value["embedding"], dtype)}
    elif isinstance(value, dict) and "kernel" in value:
      kernel = value["kernel"]
      if kernel.ndim == 3 and name not in ("query", "key", "value", "out"):
        raise ValueError(f"{name}: which dimensions of its kernel are inputs is not known")
      inputs = kernel.shape[0] if name in ("query", "key", "value") else -1
      outputs = -1 if inputs > 0 else kernel.shape[-1]
      transposed = jnp.asarray(kernel, dtype).reshape(inputs, outputs).T
      rest = {key: leaf for key, leaf in value.items() if key != "kernel"}
      narrow[name] = {layers.TRANSPOSED: transposed, **rest}
    elif isinstance(value, (dict, tuple)):
      narrow[name] = for_one_row(value, dtype)
    else:
      narrow[name] = value
  return narrow


def _logits(config: ModelConfig, hidden_BxTxD, table_VxD) -> jax.Array:
  """Of the last position, BxV float32, without the padding of the vocabulary."""
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
  """Reads the prompts of a batch (tokens, segments, positions).

  slots: of the cache. new: the most tokens that are written.
  """
  rows = batch["tokens"].shape[0]
  read = {}
  positions_B = batch["positions"].max(-1) + 1
  if facts(config).kind == "encoder_decoder":
    states_BxSxD = build_backbone(config).apply(
      {"params": params["backbone"]}, batch, train=False, method="encode"
    )
    read = {"states": states_BxSxD, "segments": batch["segments"], "positions": batch["positions"]}
    first = (rows, 1)
    batch = {
      "tokens": jnp.full(first, pad, jnp.int32),
      "segments": jnp.ones(first, jnp.int32),
      "positions": jnp.zeros(first, jnp.int32),
    }
    positions_B = jnp.ones(rows, jnp.int32)
  logits_BxV, filled = _step(config, params, batch, cache.empty(config, rows, slots), read)
  explained = (rows, new, EXPLAINED)
  return Writing(
    cache=filled,
    logits_BxV=logits_BxV,
    positions_B=positions_B,
    tokens_BxN=jnp.full((rows, new), pad, jnp.int32),
    best_BxNxE=jnp.zeros(explained, jnp.int32),
    odds_BxNxE=jnp.zeros(explained),
    finished_B=jnp.zeros(rows, bool),
    count=jnp.zeros((), jnp.int32),
    key=key,
    read=read,
  )


def _step(
  config: ModelConfig, params: Params, batch: Batch, seen: Cache, read: Batch
) -> tuple[jax.Array, Cache]:
  """Logits after new tokens, which are written into the cache."""
  states = {}
  if read:
    states["states_BxSxD"] = read["states"]
    decoder = {f"decoder_{name}": array for name, array in batch.items()}
    batch = {**decoder, "segments": read["segments"], "positions": read["positions"]}
  hidden_BxTxD, table_VxD, seen = build_backbone(config).apply(
    {"params": params["backbone"]}, batch, train=False, cache=seen, **states
  )
  return _logits(config, hidden_BxTxD, table_VxD), seen


def draw(logits_BxV, key, sampling: Sampling) -> jax.Array:
  """The next token of each row: B int32.

  top_k: only the k likeliest (Fan et al. 2018, section 5.4). top_p: only the likeliest whose probabilities reach p
  together, the one that reaches it included (Holtzman et al. 2020, section 3.1), after the temperature.
  """
  if sampling.temperature == 0:
    return logits_BxV.argmax(-1).astype(jnp.int32)
  logits_BxV = logits_BxV / sampling.temperature
  if sampling.top_k:
    least_Bx1 = jax.lax.top_k(logits_BxV, min(sampling.top_k, logits_BxV.shape[-1]))[0][:, -1:]
    logits_BxV = jnp.where(logits_BxV >= least_Bx1, logits_BxV, -jnp.inf)
  if sampling.top_p < 1:
    ordered_BxV = jnp.sort(logits_BxV, axis=-1, descending=True)
    odds_BxV = jax.nn.softmax(ordered_BxV)
    kept_BxV = jnp.cumsum(odds_BxV, -1) - odds_BxV < sampling.top_p
    least_Bx1 = jnp.where(kept_BxV, ordered_BxV, jnp.inf).min(-1, keepdims=True)
    logits_BxV = jnp.where(logits_BxV >= least_Bx1, logits_BxV, -jnp.inf)
  return jax.random.categorical(key, logits_BxV).astype(jnp.int32)


def advance(
  config: ModelConfig,
  params: Params,
  writing: Writing,
  steps: jax.Array,
  eos: int,
  pad: int,
  sampling: Sampling,
) -> Writing:
  """Up to `steps` (may be traced) more tokens, fewer where all rows have finished or N is reached.

  A row that wrote `eos` goes on with `pad`.
  """
  stop = jnp.minimum(writing.count + steps, writing.tokens_BxN.shape[1])

  def write_one(w: Writing) -> Writing:
    def put(array: jax.Array, value: jax.Array) -> jax.Array:
      value = value.astype(array.dtype)
      return jax.lax.dynamic_update_index_in_dim(array, value, w.count, axis=1)

    odds, best = jax.lax.top_k(jax.nn.softmax(w.logits_BxV), EXPLAINED)
    drawn_B = draw(w.logits_BxV, jax.random.fold_in(w.key, w.count), sampling)
    token_B = jnp.where(w.finished_B, pad, drawn_B)
    batch = {
      "tokens": token_B[:, None],
      "positions": w.positions_B[:, None],
      "segments": jnp.ones_like(token_B)[:, None],
    }
    logits_BxV, seen = _step(config, params, batch, w.cache, w.read)
    return w.replace(
      cache=seen,
      logits_BxV=logits_BxV,
      positions_B=w.positions_B + 1,
      tokens_BxN=put(w.tokens_BxN, token_B),
      best_BxNxE=put(w.best_BxNxE, best),
      odds_BxNxE=put(w.odds_BxNxE, odds),
      finished_B=w.finished_B | (token_B == eos),
      count=w.count + 1,
    )

  def goes_on(w: Writing) -> jax.Array:
    return (w.count < stop) & ~w.finished_B.all()

  return jax.lax.while_loop(goes_on, write_one, writing)
