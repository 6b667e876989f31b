"""Self-attention by cuDNN on NVIDIA GPUs, through jax.nn: the scores of the heads never lie in memory, one mask for all does.

Who sees whom goes in as a mask, one for all heads: cuDNN's own packed layout cannot say that padding stands between documents.
"""

import jax

from llm.models import attention

WIDEST = 128  # head width


def attend(
  q_BxTxHxK,
  k_BxTxGxK,
  v_BxTxGxK,
  visibility: attention.Visibility,
  *,
  scale: float,
  implementation: str = "cudnn",
) -> jax.Array:
  """As attention.attend, in bfloat16, without bias and dropout -> BxTxHxK.

  (cuDNN would take a bias, but gives no gradient of one that a mask was added to.) implementation: "xla" on other platforms.
  """
  return jax.nn.dot_product_attention(
    q_BxTxHxK,
    k_BxTxGxK,
    v_BxTxGxK,
    mask=attention.mask_Bx1xTxS(visibility),
    scale=scale,
    implementation=implementation,
  )
