"""Who sees whom, and attention over it.

Visibility is data (segments and positions), not a mask, so that other backends can serve it: splash attention never makes
one. The reference below and cuDNN make a mask of B x 1 x T x S.
"""
import flax.struct
import jax
import jax.numpy as jnp


class Visibility(flax.struct.PyTreeNode):
  """A query sees a key of the same segment and, if causal, of no later position."""
  q_segments_BxT: jax.Array
  kv_segments_BxS: jax.Array
  q_positions_BxT: jax.Array
  kv_positions_BxS: jax.Array
  causal: bool = flax.struct.field(pytree_node=False, default=False)


def self_visibility(batch, *, causal: bool) -> Visibility:
  """Visibility of a batch for itself. Positions restart in every packed document."""
  return Visibility(batch["segments"], batch["segments"], batch["positions"], batch["positions"],
                    causal)


def mask_Bx1xTxS(visibility: Visibility) -> jax.Array:
  visible = visibility.q_segments_BxT[:, :, None] == visibility.kv_segments_BxS[:, None, :]
  if visibility.causal:
    visible &= visibility.kv_positions_BxS[:, None, :] <= visibility.q_positions_BxT[:, :, None]
  return visible[:, None]


def dropout(x: jax.Array, rate: float, key: jax.Array | None) -> jax.Array:
  """Zeroes a share `rate` of x and scales the rest up; `key` None means evaluation."""
  if key is None or rate == 0.0:
    return x
  keep = jax.random.bernoulli(key, 1.0 - rate, x.shape)
  return jnp.where(keep, x / (1.0 - rate), 0).astype(x.dtype)


def rotary(x_BxTxHxK: jax.Array, positions_BxT: jax.Array, theta: float) -> jax.Array:
  """Rotary positions (Su et al. 2021, equation 34), component i paired with i + K/2, in float32."""
  half = x_BxTxHxK.shape[-1] // 2
  frequencies = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
  angles_BxTx1xK2 = positions_BxT[..., None, None] * frequencies
  cos, sin = jnp.cos(angles_BxTx1xK2), jnp.sin(angles_BxTx1xK2)
  first, second = jnp.split(x_BxTxHxK, 2, axis=-1)
  return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], -1).astype(x_BxTxHxK.dtype)


def attend(q_BxTxHxK, k_BxSxGxK, v_BxSxGxK, visibility: Visibility, *, scale: float, bias_HxTxS=None,
           dropout_rate: float = 0.0, key: jax.Array | None = None) -> jax.Array:
  """Scaled dot-product attention (Vaswani et al. 2017, section 3.2.1) -> BxTxHxK.

  G heads of keys and values serve H / G neighbouring query heads each (Ainslie et al. 2023). bias: added to the scores.
  Scores and softmax are float32. Padding (segment 0) sees padding, so no row is empty.
  """
  rows, length, heads, width = q_BxTxHxK.shape
  q_BxTxGxRxK = (q_BxTxHxK * scale).reshape(rows, length, k_BxSxGxK.shape[2], -1, width)
  scores_BxGxRxTxS = jnp.einsum("BTGRK,BSGK->BGRTS", q_BxTxGxRxK, k_BxSxGxK,
                                preferred_element_type=jnp.promote_types(q_BxTxHxK.dtype, jnp.float32))
  scores_BxHxTxS = scores_BxGxRxTxS.reshape(rows, heads, length, -1)
  if bias_HxTxS is not None:
    scores_BxHxTxS += bias_HxTxS
  scores_BxHxTxS = jnp.where(mask_Bx1xTxS(visibility), scores_BxHxTxS, -1e30)
  weights_BxHxTxS = jax.nn.softmax(scores_BxHxTxS, axis=-1).astype(v_BxSxGxK.dtype)
  weights_BxHxTxS = dropout(weights_BxHxTxS, dropout_rate, key)
  mixed_BxTxGxRxK = jnp.einsum("BGRTS,BSGK->BTGRK", weights_BxHxTxS.reshape(scores_BxGxRxTxS.shape), v_BxSxGxK)
  return mixed_BxTxGxRxK.reshape(q_BxTxHxK.shape)
