"""Self-attention by the Pallas kernel of JAX for TPUs (splash attention): no T x T array ever exists.

Under a mesh each device works on its own rows and heads.
"""
import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel, splash_attention_mask
from jax.sharding import PartitionSpec as P

from llm.sharding import BATCH

LANES = 128   # lengths must be a multiple
BLOCK = 512   # queries and keys that are looked at together, where they divide the length


def attend(q_BxTxHxK, k_BxTxGxK, v_BxTxGxK, segments_BxT, *, causal: bool, scale: float, interpret: bool = False) -> jax.Array:
  """As attention.attend of a sequence with itself, without bias and dropout -> BxTxHxK. T must be a multiple of LANES.

  A causal query sees no later place of its row; within a segment, places and positions have one order. interpret: on any
  platform, slowly.
  """
  length, heads = q_BxTxHxK.shape[1:3]
  shared = heads // k_BxTxGxK.shape[2]
  q, k, v = (a.swapaxes(1, 2) for a in (q_BxTxHxK * scale, *(jnp.repeat(a, shared, 2) for a in (k_BxTxGxK, v_BxTxGxK))))

  def of_device(q_BxHxTxK, k_BxHxTxK, v_BxHxTxK, segments_BxT):
    kernel = _kernel(q_BxHxTxK.shape[1], length, causal, interpret)
    one = lambda q, k, v, s: kernel(q, k, v, splash_attention_kernel.SegmentIds(s, s))
    return jax.vmap(one)(q_BxHxTxK, k_BxHxTxK, v_BxHxTxK, segments_BxT)

  mesh = jax.sharding.get_abstract_mesh()
  if not mesh.empty and mesh.size > 1:
    # One row, by which shapes are found out, is no device's own.
    rows = BATCH if q.shape[0] % (mesh.shape["data"] * mesh.shape["fsdp"]) == 0 else None
    heads_apart = P(rows, "tensor", None, None)
    of_device = jax.shard_map(of_device, in_specs=(*(heads_apart,) * 3, P(rows, None)), out_specs=heads_apart, check_vma=False)
  return of_device(q, k, v, segments_BxT).swapaxes(1, 2)


def _kernel(heads: int, length: int, causal: bool, interpret: bool):
  shape = (length, length)
  mask = splash_attention_mask.CausalMask(shape) if causal else splash_attention_mask.FullMask(shape)
  block = next(size for size in (BLOCK, 256, LANES) if length % size == 0)
  sizes = splash_attention_kernel.BlockSizes(
      block_q=block, block_kv=block, block_q_dkv=block, block_kv_dkv=block, use_fused_bwd_kernel=True)
  return splash_attention_kernel.make_splash_mha_single_device(
      splash_attention_mask.MultiHeadMask([mask] * heads), block_sizes=sizes, interpret=interpret)
