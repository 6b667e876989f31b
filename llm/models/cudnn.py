"""Self-attention by cuDNN on NVIDIA GPUs, through jax.nn.

The scores never lie in memory. The mask does, one for all heads: cuDNN's own layout of packed rows
cannot express padding between documents.
"""

from typing import Literal

import jax

from llm.models import attention

WIDEST = 128  # the largest head width that cuDNN takes


def attend(
  q_BxTxHxK: jax.Array,
  k_BxTxGxK: jax.Array,
  v_BxTxGxK: jax.Array,
  visibility: attention.Visibility,
  *,
  scale: float,
  implementation: Literal["cudnn", "xla"] = "cudnn",
) -> jax.Array:
  """Computes attention.attend in bfloat16, without bias and dropout -> BxTxHxK.

  cuDNN takes a bias, but it has no gradient for one that a mask is added to. implementation: "xla"
  is for platforms without cuDNN.
  """
  return jax.nn.dot_product_attention(
    q_BxTxHxK,
    k_BxTxGxK,
    v_BxTxGxK,
    mask=attention.mask_Bx1xTxS(visibility),
    scale=scale,
    implementation=implementation,
  )
