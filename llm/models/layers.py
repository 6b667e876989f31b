"""The parts of a block: linear, layer norm, embedding, feed-forward."""

import dataclasses
import functools
import math
import re
from typing import Callable

import jax
import jax.numpy as jnp
from flax import linen as nn

from llm.models import attention
from llm.models.precision import TYPES, Precision, dot
from llm.sharding import constrain

normal = nn.initializers.normal

ACTIVATIONS = {
  # Written with erf: jax.nn.gelu takes erfc, which is several times slower on CPU.
  "gelu": lambda x: 0.5 * x * (1.0 + jax.lax.erf(x * 2**-0.5)),
  "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
  "silu": jax.nn.silu,
  "relu": jax.nn.relu,
}


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def matmul(x, kernel_IxO, precision: Precision):
  """x @ kernel -> the leading dimensions of x, then O. All three products have the precision.

  The gradient of the kernel is written as x^T dy. JAX's own rule computes (dy^T x)^T, for which
  XLA on CPU makes a transposed copy of dy, fused with all the sums that dy came from: at 6 layers of
  width 384 that was a fifth of the step.
  """
  return dot(x, kernel_IxO, precision)


def _matmul_forward(x, kernel_IxO, precision):
  return dot(x, kernel_IxO, precision), (x, kernel_IxO)


def _matmul_backward(precision, saved, dy):
  x, kernel_IxO = saved
  dkernel = dot(x.reshape(-1, x.shape[-1]).T, dy.reshape(-1, dy.shape[-1]), precision)
  return dot(dy, kernel_IxO.T, precision), dkernel


matmul.defvjp(_matmul_forward, _matmul_backward)


TRANSPOSED = "kernel_OxI"  # in place of `kernel`, where one token at a time is computed


def read_once(x, kernel_OxI):
  """x @ kernel^T in float32 or better, for an x of one row: as fast as a CPU reads the kernel.

  The compiler must not fuse what comes after: its fused products use one core, and no wide loads.
  """
  y = jax.lax.dot_general(
    x.astype(kernel_OxI.dtype),
    kernel_OxI,
    (((x.ndim - 1,), (1,)), ((), ())),
    preferred_element_type=jnp.promote_types(kernel_OxI.dtype, jnp.float32),
  )
  return jax.lax.optimization_barrier(y)


@dataclasses.dataclass(frozen=True)
class LoRA:
  """Low-rank adapters (Hu et al. 2021, section 4.1): y += (x A) B alpha / rank, A normal, B zero at first.

  targets: regex of the paths of the linear layers that get one.
  """

  rank: int
  alpha: float
  targets: str
  dropout: float


class Linear(nn.Module):
  """Contracts the last dimensions of x with those of `shape` not in `out`: x @ kernel + bias.

  shape: of the kernel, e.g. (D, H, K). out: how many of its trailing dimensions are new.
  """

  shape: tuple[int, ...]
  out: int = 1
  precision: Precision = TYPES["float32"]
  kernel_init: Callable = normal(0.02)
  bias: bool = True
  lora: LoRA | None = None

  @nn.compact
  def __call__(self, x):
    inside = len(self.shape) - self.out
    # One matrix product whatever the number of head dimensions: the compiler then needs no
    # transposes.
    rows = math.prod(self.shape[:inside])
    x = x.reshape(*x.shape[: x.ndim - inside], rows)
    if self.has_variable("params", TRANSPOSED):
      y = read_once(x, self.get_variable("params", TRANSPOSED)).astype(self.precision.values)
    else:
      kernel = self.param("kernel", self.kernel_init, self.shape).astype(self.precision.values)
      y = matmul(x, kernel.reshape(rows, -1), self.precision)
    if self.lora and re.search(self.lora.targets, "/".join(self.path)):
      y += self.adapter(x, y.shape[-1])
    y = y.reshape(*x.shape[:-1], *self.shape[inside:])
    if not self.bias:
      return y
    return y + self.param("bias", nn.initializers.zeros, self.shape[inside:]).astype(
      self.precision.values
    )

  def adapter(self, x, width: int):
    """What the low-rank adapter adds. Dropout where there is a key for it: in training."""
    lora = self.lora
    a_IxR = self.param("lora_a", normal(x.shape[-1] ** -0.5), (x.shape[-1], lora.rank)).astype(
      self.precision.values
    )
    b_RxO = self.param("lora_b", nn.initializers.zeros, (lora.rank, width)).astype(
      self.precision.values
    )
    if lora.dropout and self.has_rng("dropout"):
      x = attention.dropout(x, lora.dropout, self.make_rng("dropout"))
    down = matmul(x, a_IxR, self.precision)
    return matmul(down, b_RxO, self.precision) * (lora.alpha / lora.rank)


class LayerNorm(nn.Module):
  """Layer normalisation over the last dimension (Ba et al. 2016), in float32 or better."""

  epsilon: float
  use_bias: bool = True

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    scale = self.param("scale", nn.initializers.ones, x.shape[-1:])
    y = x.astype(scale.dtype)
    y = y - y.mean(-1, keepdims=True)
    y = y * jax.lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + self.epsilon) * scale
    if self.use_bias:
      y = y + self.param("bias", nn.initializers.zeros, x.shape[-1:])
    return y.astype(x.dtype)


class RMSNorm(nn.Module):
  """x over its root mean square, scaled (Zhang and Sennrich 2019), in float32 or better."""

  epsilon: float

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    scale = self.param("scale", nn.initializers.ones, x.shape[-1:])
    y = x.astype(scale.dtype)
    y = y * jax.lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + self.epsilon)
    return (y * scale).astype(x.dtype)


class Embed(nn.Module):
  """A table of rows. Returns (rows at the ids, the table). split: mesh axis of the rows."""

  num_rows: int
  width: int
  dtype: jnp.dtype
  embedding_init: Callable
  split: str | None = None

  def setup(self):
    self.embedding = self.param("embedding", self.embedding_init, (self.num_rows, self.width))

  def table(self) -> jax.Array:
    """VxD, in the type of the computation."""
    return self.embedding.astype(self.dtype)

  def __call__(self, ids_BxT):
    # Gathering one table over fsdp first is cheap; otherwise the activations of the whole batch are.
    table = self.table()
    narrow = self.embedding.dtype.itemsize < table.dtype.itemsize
    gathered = constrain(self.embedding if narrow else table, self.split, None)
    return jnp.take(gathered, ids_BxT, axis=0).astype(self.dtype), table


class MLP(nn.Module):
  """down(activation(up(x))) (Vaswani et al. 2017, section 3.3).

  gated: down(activation(gate(x)) * up(x)) (Shazeer 2020, equation 5). drop: applied to what enters `down`.
  """

  mlp_dim: int
  activation: str
  precision: Precision
  kernel_init: Callable
  out_init: Callable
  gated: bool
  bias: bool
  lora: LoRA | None

  @nn.compact
  def __call__(self, x_BxTxD, drop: Callable = lambda h: h):
    width = x_BxTxD.shape[-1]
    wide = lambda name: Linear(
      (width, self.mlp_dim),
      precision=self.precision,
      kernel_init=self.kernel_init,
      bias=self.bias,
      lora=self.lora,
      name=name,
    )(x_BxTxD)
    if self.gated:
      h_BxTxF = ACTIVATIONS[self.activation](wide("gate")) * wide("up")
    else:
      h_BxTxF = ACTIVATIONS[self.activation](wide("up"))
    return Linear(
      (self.mlp_dim, width),
      precision=self.precision,
      kernel_init=self.out_init,
      bias=self.bias,
      lora=self.lora,
      name="down",
    )(drop(h_BxTxF))
