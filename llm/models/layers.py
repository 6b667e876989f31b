"""The parts of a block: linear layers, norms, the embedding and the feed-forward layer."""

import dataclasses
import functools
import math
import re
from typing import Callable

import jax
import jax.numpy as jnp
from flax import linen as nn

from llm.models import attention
from llm.models.precision import TYPES, Precision, dot, over_rows
from llm.sharding import constrain

normal = nn.initializers.normal


def _gelu(x: jax.Array) -> jax.Array:
  """GELU (Hendrycks and Gimpel 2016, section 2).

  jax.nn.gelu computes it by erfc, which is several times slower than erf on CPU.
  """
  return 0.5 * x * (1.0 + jax.lax.erf(x * 2**-0.5))


ACTIVATIONS = {
  "gelu": _gelu,
  "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
  "silu": jax.nn.silu,
  "relu": jax.nn.relu,
}


def _matmul(x: jax.Array, kernel_IxO: jax.Array, precision: Precision) -> jax.Array:
  """x @ kernel -> the leading dimensions of x, then O. Its gradients have the same precision.

  The gradient of the kernel is computed as x^T dy. JAX's own rule computes (dy^T x)^T. For that,
  XLA on CPU makes a transposed copy of dy, fused with all the sums that dy comes from. With 6
  layers of width 384, the copy took a fifth of the step.
  """
  return dot(x, kernel_IxO, precision)


matmul = jax.custom_vjp(_matmul, nondiff_argnums=(2,))


def _matmul_forward(x, kernel_IxO, precision):
  return dot(x, kernel_IxO, precision), (x, kernel_IxO)


def _matmul_backward(precision, saved, dy):
  x, kernel_IxO = saved
  return dot(dy, kernel_IxO.T, precision), over_rows(x, dy, precision)


matmul.defvjp(_matmul_forward, _matmul_backward)


def _transpose(table_VxD: jax.Array) -> jax.Array:
  """DxV. The barrier in its gradient keeps XLA from computing that of the table as dy^T x.

  (x^T dy)^T takes 0.4 times as long on CPU.
  """
  return table_VxD.T


transpose = jax.custom_vjp(_transpose)


def _transpose_forward(table_VxD):
  return table_VxD.T, None


def _transpose_backward(_, dtable_DxV):
  return (jax.lax.optimization_barrier(dtable_DxV).T,)


transpose.defvjp(_transpose_forward, _transpose_backward)


def matmul_table(x: jax.Array, table_VxD: jax.Array, precision: Precision) -> jax.Array:
  """x @ table^T -> the leading dimensions of x, then V. Its gradients have the same precision."""
  return matmul(x, transpose(table_VxD), precision)


TRANSPOSED = "kernel_OxI"  # stands for `kernel` where one row is written, a token at a time


def read_once(x: jax.Array, kernel_OxI: jax.Array) -> jax.Array:
  """x @ kernel^T in float32 or better, for an x of one row, as fast as a CPU reads the kernel.

  The first barrier ties the kernel to x. Without it, XLA copies all kernels to float32 before the
  loop over tokens, and every token reads twice the bytes. The last one keeps XLA from fusing the
  product with what follows. A fused product uses one core and no wide loads.
  """
  x, kernel_OxI = jax.lax.optimization_barrier((x.astype(kernel_OxI.dtype), kernel_OxI))
  y = jax.lax.dot_general(
    x,
    kernel_OxI,
    (((x.ndim - 1,), (1,)), ((), ())),
    preferred_element_type=jnp.promote_types(kernel_OxI.dtype, jnp.float32),
  )
  return jax.lax.optimization_barrier(y)


@dataclasses.dataclass(frozen=True)
class LoRA:
  """Low-rank adapters (Hu et al. 2021, section 4.1): y += (x A) B alpha / rank.

  A starts normal and B zero. targets: a regex of the paths of the linear layers that get an
  adapter. dropout: rate for the input of the adapter.
  """

  rank: int
  alpha: float
  targets: str
  dropout: float


class Linear(nn.Module):
  """x @ kernel + bias, over the last dimensions of x.

  shape: of the kernel, inputs before outputs, e.g. (D, H, K). out: how many of its dimensions are
  outputs.
  """

  shape: tuple[int, ...]
  out: int = 1
  precision: Precision = TYPES["float32"]
  kernel_init: Callable = normal(0.02)
  bias: bool = True
  lora: LoRA | None = None

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    values = self.precision.values
    input_dims = len(self.shape) - self.out
    output_shape = self.shape[input_dims:]
    # All dimensions of heads are flattened into one matrix product, which needs no transposes.
    inputs = math.prod(self.shape[:input_dims])
    x = x.reshape(*x.shape[: x.ndim - input_dims], inputs)
    if self.has_variable("params", TRANSPOSED):
      y = read_once(x, self.get_variable("params", TRANSPOSED)).astype(values)
    else:
      kernel = self.param("kernel", self.kernel_init, self.shape).astype(values)
      y = matmul(x, kernel.reshape(inputs, -1), self.precision)
    if self.lora and self._has_adapter(self.lora):
      y += self.adapter(x, y.shape[-1], self.lora)
    y = y.reshape(*x.shape[:-1], *output_shape)
    if self.bias:
      y = y + self.param("bias", nn.initializers.zeros, output_shape).astype(values)
    return y

  def _has_adapter(self, lora: LoRA) -> bool:
    """Whether the parameters have one. A layer that is applied alone has a shorter path."""
    if self.is_initializing():
      return bool(re.search(lora.targets, "/".join(self.path)))
    return self.has_variable("params", "lora_a")

  def adapter(self, x: jax.Array, width: int, lora: LoRA) -> jax.Array:
    """What the low-rank adapter adds to the output. It has dropout in training alone."""
    values = self.precision.values
    inputs = x.shape[-1]
    a_IxR = self.param("lora_a", normal(inputs**-0.5), (inputs, lora.rank)).astype(values)
    b_RxO = self.param("lora_b", nn.initializers.zeros, (lora.rank, width)).astype(values)
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
  """x over its root mean square, times a scale (Zhang and Sennrich 2019), in float32 or better."""

  epsilon: float

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    scale = self.param("scale", nn.initializers.ones, x.shape[-1:])
    y = x.astype(scale.dtype)
    y = y * jax.lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + self.epsilon)
    return (y * scale).astype(x.dtype)


class Embed(nn.Module):
  """A table of vectors. Called with ids, it returns (the vectors BxTxD of the ids, the table VxD).

  num_rows: V. width: D. dtype: type of both results. split: the mesh axis of the rows.
  """

  num_rows: int
  width: int
  dtype: jnp.dtype
  embedding_init: Callable
  split: str | None = None

  def setup(self):
    self.embedding = self.param("embedding", self.embedding_init, (self.num_rows, self.width))

  def table(self) -> jax.Array:
    """VxD in `dtype`."""
    return self.embedding.astype(self.dtype)

  def __call__(self, ids_BxT: jax.Array) -> tuple[jax.Array, jax.Array]:
    table_VxD = self.table()
    # Without this constraint, XLA gathers the activations of the whole batch over fsdp. Gathering
    # the table is cheap, and cheapest in the narrower type.
    parameter_is_narrower = self.embedding.dtype.itemsize < table_VxD.dtype.itemsize
    source = self.embedding if parameter_is_narrower else table_VxD
    gathered_VxD = constrain(source, self.split, None)
    return jnp.take(gathered_VxD, ids_BxT, axis=0).astype(self.dtype), table_VxD


class MLP(nn.Module):
  """down(activation(up(x))) (Vaswani et al. 2017, section 3.3).

  gated: down(activation(gate(x)) * up(x)) (Shazeer 2020, equation 5). drop: a function that is
  applied to the input of `down`.
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
  def __call__(self, x_BxTxD: jax.Array, drop: Callable = lambda h: h) -> jax.Array:
    width = x_BxTxD.shape[-1]
    activation = ACTIVATIONS[self.activation]

    def widened(name: str) -> jax.Array:
      linear = Linear(
        (width, self.mlp_dim),
        precision=self.precision,
        kernel_init=self.kernel_init,
        bias=self.bias,
        lora=self.lora,
        name=name,
      )
      return linear(x_BxTxD)

    if self.gated:
      h_BxTxF = activation(widened("gate")) * widened("up")
    else:
      h_BxTxF = activation(widened("up"))
    down = Linear(
      (self.mlp_dim, width),
      precision=self.precision,
      kernel_init=self.out_init,
      bias=self.bias,
      lora=self.lora,
      name="down",
    )
    return down(drop(h_BxTxF))
