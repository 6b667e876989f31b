"""Self-attention by the Pallas kernel of JAX for TPUs (splash attention): no T x T array ever exists.

Under a mesh each device works on its own rows and heads, and along `context` on its own queries with all keys.
"""

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from llm.sharding import BATCH

LANES = 128  # lengths must be a multiple, and what a device has of them
BLOCK = 512  # queries and keys that are looked at together, where they divide the length


def attend(
  q_BxTxHxK,
  k_BxTxGxK,
  v_BxTxGxK,
  segments_BxT,
  *,
  causal: bool,
  scale: float,
  interpret: bool = False,
) -> jax.Array:
  """As attention.attend of a sequence with itself, without bias and dropout -> BxTxHxK. T must be a multiple of LANES.

  A causal query sees no later place of its row; within a segment, places and positions have one order. interpret: on any
  platform, slowly.
  """
  from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel  # 0.3 s

  length, heads = q_BxTxHxK.shape[1:3]
  shared = heads // k_BxTxGxK.shape[2]
  q, k, v = (
    a.swapaxes(1, 2)
    for a in (q_BxTxHxK * scale, *(jnp.repeat(a, shared, 2) for a in (k_BxTxGxK, v_BxTxGxK)))
  )

  def of_device(kernel, q_BxHxTxK, k_BxHxSxK, v_BxHxSxK, q_segments_BxT, kv_segments_BxS):
    one = lambda q, k, v, *segments: kernel(q, k, v, splash_attention_kernel.SegmentIds(*segments))
    return jax.vmap(one)(q_BxHxTxK, k_BxHxSxK, v_BxHxSxK, q_segments_BxT, kv_segments_BxS)

  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty or mesh.size == 1:
    return of_device(
      _kernel(heads, length, causal, 1, interpret), q, k, v, segments_BxT, segments_BxT
    ).swapaxes(1, 2)
  kernel = _kernel(heads // mesh.shape["tensor"], length, causal, mesh.shape["context"], interpret)
  # One row, by which shapes are found out, is no device's own.
  rows = BATCH if q.shape[0] % (mesh.shape["data"] * mesh.shape["fsdp"]) == 0 else None
  queries, keys = P(rows, "tensor", "context", None), P(rows, "tensor", None, None)
  of_kernel = kernel.manual_sharding_spec(
    NamedSharding(mesh, P(None, "context" if causal else None))
  )
  of_device = jax.shard_map(
    of_device,
    in_specs=(of_kernel, queries, keys, keys, P(rows, "context"), P(rows, None)),
    out_specs=queries,
    check_vma=False,
  )
  return of_device(kernel, q, k, v, segments_BxT, segments_BxT).swapaxes(1, 2)


def _kernel(heads: int, length: int, causal: bool, parts: int, interpret: bool):
  """The kernel of a device that has one of `parts` of the queries: which one matters to a causal mask alone."""
  from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_kernel,
    splash_attention_mask,
  )

  mask = (
    splash_attention_mask.CausalMask((length, length))
    if causal
    else splash_attention_mask.FullMask((length // parts, length))
  )
  queries, keys = (
    next(size for size in (BLOCK, 256, LANES) if n % size == 0) for n in (length // parts, length)
  )
  sizes = splash_attention_kernel.BlockSizes(
    block_q=queries,
    block_kv=keys,
    block_q_dkv=queries,
    block_kv_dkv=keys,
    use_fused_bwd_kernel=True,
  )
  return splash_attention_kernel.make_splash_mha(
    splash_attention_mask.MultiHeadMask([mask] * heads),
    block_sizes=sizes,
    interpret=interpret,
    head_shards=1,
    q_seq_shards=parts if causal else 1,
  )
