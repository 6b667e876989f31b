"""Who sees whom, and attention over it.

Visibility is data (segments and positions), not a mask, so that other backends can serve it: splash attention never makes
one. The reference below and cuDNN make a mask of B x 1 x T x S.
"""

import functools

import flax.struct
import jax
import jax.numpy as jnp

from llm.core import Batch
from llm.models.cache import Cache
from llm.models.precision import Precision, dot, einsum


class Visibility(flax.struct.PyTreeNode):
  """A query sees a key of the same segment that is no farther than `reach` positions away.

  Where it is causal, it sees no later position. A reach of None is as far as the text goes.
  """

  q_segments_BxT: jax.Array
  kv_segments_BxS: jax.Array
  q_positions_BxT: jax.Array
  kv_positions_BxS: jax.Array
  causal: bool = flax.struct.field(pytree_node=False, default=False)
  reach: jax.Array | None = None


def self_visibility(batch: Batch, *, causal: bool) -> Visibility:
  """Visibility of a batch for itself. Positions restart in every packed document."""
  return Visibility(
    batch["segments"], batch["segments"], batch["positions"], batch["positions"], causal
  )


def cache_visibility(batch: Batch, cache: Cache, *, causal: bool) -> Visibility:
  """Visibility of new tokens for all that is in a cache, themselves included."""
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
  return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], -1).astype(
    x_BxTxHxK.dtype
  )


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def scores(q_BxGxRxTxK, k_BxGxSxK, types: Precision) -> jax.Array:
  """q . k of every query and key: BxGxRxTxS."""
  return einsum("BGRTK,BGSK->BGRTS", q_BxGxRxTxK, k_BxGxSxK, types)


def _scores_forward(q, k, types):
  return scores(q, k, types), (q, k)


def _scores_backward(types, saved, dscores_BxGxRxTxS):
  q, k = saved
  dq = einsum("BGRTS,BGSK->BGRTK", dscores_BxGxRxTxS, k, types)
  return dq.astype(q.dtype), _over_queries(dscores_BxGxRxTxS, q, types).astype(k.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def mix(weights_BxGxRxTxS, v_BxGxSxK, types: Precision) -> jax.Array:
  """The values of every query's keys, weighted: BxGxRxTxK."""
  return einsum("BGRTS,BGSK->BGRTK", weights_BxGxRxTxS, v_BxGxSxK, types)


def _mix_forward(weights, v, types):
  return mix(weights, v, types), (weights, v)


def _mix_backward(types, saved, dmixed_BxGxRxTxK):
  weights, v = saved
  dweights = einsum("BGRTK,BGSK->BGRTS", dmixed_BxGxRxTxK, v, types)
  dv = _over_queries(weights, dmixed_BxGxRxTxK, types)
  return dweights.astype(weights.dtype), dv.astype(v.dtype)


def _over_queries(a_BxGxRxTxS, b_BxGxRxTxK, types: Precision) -> jax.Array:
  """Sum over the queries: BxGxSxK.

  The product is asked for as K x S, of a b that was transposed before it. XLA on CPU runs products
  over the first dimension of both at half the speed.
  """
  b_BxGxRxKxT = jax.lax.optimization_barrier(b_BxGxRxTxK.swapaxes(-1, -2))
  if b_BxGxRxKxT.shape[2] == 1:  # einsum would move the R that is none
    return dot(b_BxGxRxKxT, a_BxGxRxTxS, types)[:, :, 0].swapaxes(-1, -2)
  return einsum("BGRKT,BGRTS->BGKS", b_BxGxRxKxT, a_BxGxRxTxS, types).swapaxes(-1, -2)


scores.defvjp(_scores_forward, _scores_backward)
mix.defvjp(_mix_forward, _mix_backward)


def attend(
  q_BxTxHxK,
  k_BxSxGxK,
  v_BxSxGxK,
  visibility: Visibility,
  types: Precision | None = None,
  *,
  scale: float,
  bias_HxTxS=None,
  dropout_rate: float = 0.0,
  key: jax.Array | None = None,
) -> jax.Array:
  """Scaled dot-product attention (Vaswani et al. 2017, section 3.2.1) -> BxTxHxK.

  G heads of keys and values serve H / G neighbouring query heads each (Ainslie et al. 2023).
  types: of the products; None takes that of the queries. bias: added to the scores. Scores and
  softmax are float32. Padding (segment 0) sees padding, so no row is empty.
  """
  rows, length, heads, width = q_BxTxHxK.shape
  groups, keys = k_BxSxGxK.shape[2], k_BxSxGxK.shape[1]
  types = types or Precision(q_BxTxHxK.dtype, q_BxTxHxK.dtype)
  exact = types._replace(values=jnp.promote_types(types.values, jnp.float32))
  q_BxHxTxK = (q_BxTxHxK * scale).swapaxes(1, 2)
  k_BxGxSxK, v_BxGxSxK = k_BxSxGxK.swapaxes(1, 2), v_BxSxGxK.swapaxes(1, 2)
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
