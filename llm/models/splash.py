"""Self-attention by JAX's Pallas kernel for TPUs (splash attention): no T x T array ever exists.

Under a mesh each device works on its own rows and heads. Along `context` it has its own queries and
all keys.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from llm.sharding import BATCH

LANES = 128  # lengths must be a multiple, and so must what a device has of them
BLOCK = 512  # queries and keys that are looked at together, where they divide the length


def attend(
  q_BxTxHxK: jax.Array,
  k_BxTxGxK: jax.Array,
  v_BxTxGxK: jax.Array,
  segments_BxT: jax.Array,
  *,
  causal: bool,
  scale: float,
  window: int = 0,
  reach: jax.Array | None = None,
  interpret: bool = False,
) -> jax.Array:
  """attention.attend of a sequence to itself, without bias and dropout -> BxTxHxK.

  T must be a multiple of LANES. A causal query sees no later place of its row: within a segment,
  places and positions have one order. reach: where it is less than T, a layer sees a `window`.
  interpret: runs on any platform, slowly.
  """
  heads, length = q_BxTxHxK.shape[2], q_BxTxHxK.shape[1]
  shared = heads // k_BxTxGxK.shape[2]
  q_BxHxTxK = (q_BxTxHxK * scale).swapaxes(1, 2)
  k_BxHxTxK, v_BxHxTxK = (jnp.repeat(a, shared, 2).swapaxes(1, 2) for a in (k_BxTxGxK, v_BxTxGxK))

  def over(window: int) -> jax.Array:
    return _attend(q_BxHxTxK, k_BxHxTxK, v_BxHxTxK, segments_BxT, causal, window, interpret)

  if reach is None:
    mixed_BxHxTxK = over(0)
  else:
    mixed_BxHxTxK = jax.lax.cond(reach < length, lambda: over(window), lambda: over(0))
  return mixed_BxHxTxK.swapaxes(1, 2)


def _attend(q, k, v, segments_BxT, causal: bool, window: int, interpret: bool) -> jax.Array:
  """One kind of mask, on the devices of the mesh -> BxHxTxK. window 0: no limit."""
  from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel  # 0.3 s

  heads, length = q.shape[1:3]

  def of_device(kernel, q_BxHxTxK, k_BxHxSxK, v_BxHxSxK, q_segments_BxT, kv_segments_BxS):
    def of_row(q, k, v, *segments):
      return kernel(q, k, v, splash_attention_kernel.SegmentIds(*segments))

    return jax.vmap(of_row)(q_BxHxTxK, k_BxHxSxK, v_BxHxSxK, q_segments_BxT, kv_segments_BxS)

  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty or mesh.size == 1:
    kernel = _kernel(heads, length, causal, window, 1, interpret)
    return of_device(kernel, q, k, v, segments_BxT, segments_BxT)
  parts = mesh.shape["context"]
  kernel = _kernel(heads // mesh.shape["tensor"], length, causal, window, parts, interpret)
  # One row, by which shapes are found out, is no device's own.
  rows = BATCH if q.shape[0] % (mesh.shape["data"] * mesh.shape["fsdp"]) == 0 else None
  queries, keys = P(rows, "tensor", "context", None), P(rows, "tensor", None, None)
  split = P(None, "context" if causal or window else None)
  return jax.shard_map(
    of_device,
    in_specs=(
      kernel.manual_sharding_spec(NamedSharding(mesh, split)),
      queries,
      keys,
      keys,
      P(rows, "context"),
      P(rows, None),
    ),
    out_specs=queries,
    check_vma=False,
  )(kernel, q, k, v, segments_BxT, segments_BxT)


def _kernel(heads: int, length: int, causal: bool, window: int, parts: int, interpret: bool) -> Any:
  """The kernel of a device that has one of `parts` of the queries.

  Which of them it has matters to masks that depend on the place: causal ones and windows.
  """
  from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_kernel,
    splash_attention_mask,
  )

  by_place = causal or bool(window)
  if causal:
    mask = splash_attention_mask.CausalMask((length, length))
  elif window:
    sides = (window // 2, window // 2)
    mask = splash_attention_mask.LocalMask((length, length), sides, offset=0)
  else:
    mask = splash_attention_mask.FullMask((length // parts, length))
  block_q, block_kv = _block(length // parts), _block(length)
  sizes = splash_attention_kernel.BlockSizes(
    block_q=block_q,
    block_kv=block_kv,
    block_q_dkv=block_q,
    block_kv_dkv=block_kv,
    use_fused_bwd_kernel=True,
  )
  return splash_attention_kernel.make_splash_mha(
    splash_attention_mask.MultiHeadMask([mask] * heads),
    block_sizes=sizes,
    interpret=interpret,
    head_shards=1,
    q_seq_shards=parts if by_place else 1,
  )


def _block(length: int) -> int:
  """The largest block that divides a length."""
  return next(size for size in (BLOCK, 256, LANES) if length % size == 0)
