"""Which tokens see which, and the reference attention.

Visibility is data (segments and positions), not a mask, because splash attention never builds one.
The reference below and cuDNN build a mask of B x 1 x T x S from it.
"""

import flax.struct
import jax
import jax.numpy as jnp

from llm.core import Batch
from llm.models.cache import Cache
from llm.models.precision import Precision, dot, einsum


class Visibility(flax.struct.PyTreeNode):
  """A query sees the keys of its own segment that are at most `reach` positions away.

  causal: it sees no later position. reach: a scalar; None is the whole segment.
  """

  q_segments_BxT: jax.Array
  kv_segments_BxS: jax.Array
  q_positions_BxT: jax.Array
  kv_positions_BxS: jax.Array
  causal: bool = flax.struct.field(pytree_node=False, default=False)
  reach: jax.Array | None = None


def self_visibility(batch: Batch, *, causal: bool) -> Visibility:
  """The tokens of a batch see one another. Positions restart in every packed document."""
  return Visibility(
    batch["segments"], batch["segments"], batch["positions"], batch["positions"], causal
  )


def cache_visibility(batch: Batch, cache: Cache, *, causal: bool) -> Visibility:
  """The new tokens of a batch see all tokens in a cache, which holds the new ones too."""
  return Visibility(
    batch["segments"], cache.segments_BxS, batch["positions"], cache.positions_BxS, causal
  )


def mask_Bx1xTxS(visibility: Visibility) -> jax.Array:
  """Whether query t sees key s, for all heads."""
  visible = visibility.q_segments_BxT[:, :, None] == visibility.kv_segments_BxS[:, None, :]
  if visibility.causal or visibility.reach is not None:
    ahead = visibility.kv_positions_BxS[:, None, :] - visibility.q_positions_BxT[:, :, None]
    if visibility.causal:
      visible &= ahead <= 0
    if visibility.reach is not None:
      visible &= jnp.abs(ahead) <= visibility.reach
  return visible[:, None]


def dropout(x: jax.Array, rate: float, key: jax.Array | None) -> jax.Array:
  """Zeroes a share `rate` of x and scales the rest up. Without a key, in evaluation, x stays."""
  if key is None or rate == 0.0:
    return x
  keep = jax.random.bernoulli(key, 1.0 - rate, x.shape)
  return jnp.where(keep, x / (1.0 - rate), 0).astype(x.dtype)


def rotary(x_BxTxHxK: jax.Array, positions_BxT: jax.Array, theta: float | jax.Array) -> jax.Array:
  """Rotary positions (Su et al. 2021, equation 34) -> BxTxHxK, computed in float32.

  Component i is rotated with component i + K/2. theta: base of the wavelengths.
  """
  half = x_BxTxHxK.shape[-1] // 2
  frequencies = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
  angles_BxTx1xK2 = positions_BxT[..., None, None] * frequencies
  cos = jnp.cos(angles_BxTx1xK2)
  sin = jnp.sin(angles_BxTx1xK2)
  first, second = jnp.split(x_BxTxHxK, 2, axis=-1)
  rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], -1)
  return rotated.astype(x_BxTxHxK.dtype)


# The two products of attention. Below, R are the query heads that share one of G heads of keys.


def _scores(q_BxGxRxTxK: jax.Array, k_BxGxSxK: jax.Array, types: Precision) -> jax.Array:
  """q . k of every query and key: BxGxRxTxS."""
  return einsum("BGRTK,BGSK->BGRTS", q_BxGxRxTxK, k_BxGxSxK, types)


scores = jax.custom_vjp(_scores, nondiff_argnums=(2,))


def _scores_forward(q, k, types):
  return scores(q, k, types), (q, k)


def _scores_backward(types, saved, dscores_BxGxRxTxS):
  q, k = saved
  dq = einsum("BGRTS,BGSK->BGRTK", dscores_BxGxRxTxS, k, types)
  dk = _sum_over_queries(dscores_BxGxRxTxS, q, types)
  return dq.astype(q.dtype), dk.astype(k.dtype)


scores.defvjp(_scores_forward, _scores_backward)


def _mix(weights_BxGxRxTxS: jax.Array, v_BxGxSxK: jax.Array, types: Precision) -> jax.Array:
  """The values of every query's keys, weighted and summed: BxGxRxTxK."""
  return einsum("BGRTS,BGSK->BGRTK", weights_BxGxRxTxS, v_BxGxSxK, types)


mix = jax.custom_vjp(_mix, nondiff_argnums=(2,))


def _mix_forward(weights, v, types):
  return mix(weights, v, types), (weights, v)


def _mix_backward(types, saved, dmixed_BxGxRxTxK):
  weights, v = saved
  dweights = einsum("BGRTK,BGSK->BGRTS", dmixed_BxGxRxTxK, v, types)
  dv = _sum_over_queries(weights, dmixed_BxGxRxTxK, types)
  return dweights.astype(weights.dtype), dv.astype(v.dtype)


mix.defvjp(_mix_forward, _mix_backward)


def _sum_over_queries(
  a_BxGxRxTxS: jax.Array, b_BxGxRxTxK: jax.Array, types: Precision
) -> jax.Array:
  """The sum of a x b over the queries, R and T: BxGxSxK.

  XLA on CPU runs a product over the first dimension of both operands at half the speed. So b is
  transposed first, behind a barrier, and the product is computed as K x S.
  """
  b_BxGxRxKxT = jax.lax.optimization_barrier(b_BxGxRxTxK.swapaxes(-1, -2))
  if b_BxGxRxKxT.shape[2] == 1:  # einsum would transpose the dimension of size 1
    return dot(b_BxGxRxKxT, a_BxGxRxTxS, types)[:, :, 0].swapaxes(-1, -2)
  return einsum("BGRKT,BGRTS->BGKS", b_BxGxRxKxT, a_BxGxRxTxS, types).swapaxes(-1, -2)


def attend(
  q_BxTxHxK: jax.Array,
  k_BxSxGxK: jax.Array,
  v_BxSxGxK: jax.Array,
  visibility: Visibility,
  types: Precision | None = None,
  *,
  scale: float,
  bias_HxTxS: jax.Array | None = None,
  dropout_rate: float = 0.0,
  key: jax.Array | None = None,
) -> jax.Array:
  """Scaled dot-product attention (Vaswani et al. 2017, section 3.2.1) -> BxTxHxK.

  Each of the G heads of keys and values serves H / G neighbouring query heads (Ainslie et al.
  2023). types: of the products; None takes the type of the queries. scale: factor of the queries.
  bias: added to the scores. Scores and softmax are float32 or better. Padding (segment 0) sees
  padding, so every query sees a key.
  """
  rows, length, heads, width = q_BxTxHxK.shape
  _, keys, groups, _ = k_BxSxGxK.shape
  types = types or Precision(q_BxTxHxK.dtype, q_BxTxHxK.dtype)
  exact = types._replace(values=jnp.promote_types(types.values, jnp.float32))
  q_BxHxTxK = (q_BxTxHxK * scale).swapaxes(1, 2)
  k_BxGxSxK = k_BxSxGxK.swapaxes(1, 2)
  v_BxGxSxK = v_BxSxGxK.swapaxes(1, 2)
  by_group = (rows, groups, heads // groups, length)
  scores_BxGxRxTxS = scores(q_BxHxTxK.reshape(*by_group, width), k_BxGxSxK, exact)
  scores_BxHxTxS = scores_BxGxRxTxS.reshape(rows, heads, length, keys)
  if bias_HxTxS is not None:
    scores_BxHxTxS += bias_HxTxS
  scores_BxHxTxS = jnp.where(mask_Bx1xTxS(visibility), scores_BxHxTxS, -1e30)
  weights_BxHxTxS = jax.nn.softmax(scores_BxHxTxS, axis=-1).astype(types.values)
  weights_BxHxTxS = dropout(weights_BxHxTxS, dropout_rate, key)
  mixed_BxGxRxTxK = mix(weights_BxHxTxS.reshape(*by_group, keys), v_BxGxSxK, types)
  return mixed_BxGxRxTxK.reshape(rows, heads, length, width).swapaxes(1, 2)
