"""What a decoder has seen: keys and values of every layer, in slots."""

from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp

from llm.config import ModelConfig
from llm.models import precision
from llm.models.architecture import head_width_of, kv_heads_of


class Past(NamedTuple):
  """Keys and values of S slots, of one layer. What one head looks at lies together."""

  keys_BxGxSxK: jax.Array
  values_BxGxSxK: jax.Array

  def with_new(self, k_BxTxGxK: jax.Array, v_BxTxGxK: jax.Array, index: Any) -> "Past":
    """T new tokens written to the slots from `index` on."""
    keys, values = (
      write(old, new.swapaxes(1, 2), index, axis=2)
      for old, new in zip(self, (k_BxTxGxK, v_BxTxGxK))
    )
    return Past(keys, values)


class Cache(flax.struct.PyTreeNode):
  """New tokens go to the slots from `index` on. Slots of segment 0 are not seen."""

  past: tuple[Past, ...]  # of each layer
  segments_BxS: jax.Array
  positions_BxS: jax.Array
  index: jax.Array

  def with_new(self, segments_BxT: jax.Array, positions_BxT: jax.Array) -> "Cache":
    """The cache with where T new tokens stand; their keys and values are written by the layers."""
    return self.replace(
      segments_BxS=write(self.segments_BxS, segments_BxT, self.index, axis=1),
      positions_BxS=write(self.positions_BxS, positions_BxT, self.index, axis=1),
    )


def empty(config: ModelConfig, rows: int, slots: int) -> Cache:
  """A cache in which nothing was written."""
  shape = (rows, kv_heads_of(config), slots, head_width_of(config))
  dtype = precision.of(config).values
  past = tuple(
    Past(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)) for _ in range(config.num_layers)
  )
  segments, positions = jnp.zeros((2, rows, slots), jnp.int32)
  return Cache(past, segments, positions, jnp.zeros((), jnp.int32))


def write(old: jax.Array, new: jax.Array, index: Any, axis: int) -> jax.Array:
  """`old` with `new` in its slots from `index` on."""
  return jax.lax.dynamic_update_slice_in_dim(old, new.astype(old.dtype), index, axis)
