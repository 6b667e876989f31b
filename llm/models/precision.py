"""The types of a computation: of its activations, and of the operands of its matrix products."""

import functools
import pathlib
import time
from typing import NamedTuple

import jax
import jax.numpy as jnp

from llm.config import ModelConfig


class Precision(NamedTuple):
  """Activations have the type `values`; both operands of a matrix product are cast to `operands`.

  Products accumulate in float32 or better and give `values`.
  """

  values: jnp.dtype
  operands: jnp.dtype


TYPES = {
  "float32": Precision(jnp.dtype("float32"), jnp.dtype("float32")),
  "float64": Precision(jnp.dtype("float64"), jnp.dtype("float64")),
  "bfloat16": Precision(jnp.dtype("bfloat16"), jnp.dtype("bfloat16")),
  # For CPUs: their bfloat16 products are fast only where the result is float32.
  "bfloat16_operands": Precision(jnp.dtype("float32"), jnp.dtype("bfloat16")),
}

WORTHWHILE = 1.2  # bfloat16 products must be this much faster to be taken


def of(config: ModelConfig) -> Precision:
  """The types that the dtype of a config names. "auto" must be resolved (models/resolve.py)."""
  return TYPES[config.dtype]


def auto(platform: str) -> str:
  """bfloat16 on accelerators; on CPU bfloat16 operands where they are measured to be faster.

  Processes that train together must agree, so several on CPU take float32.
  """
  if platform != "cpu":
    return "bfloat16"
  if jax.process_count() > 1 or not native_bfloat16():
    return "float32"
  speeds = product_speeds()
  faster = speeds["bfloat16_operands"] > WORTHWHILE * speeds["float32"]
  return "bfloat16_operands" if faster else "float32"


def explained(asked: str, taken: str, platform: str) -> str:
  """One line for the header of a run: which types were taken for what was asked, and why."""
  if platform != "cpu":
    return taken
  if "bfloat16" in taken and not native_bfloat16():
    return f"{taken}: this CPU has no bfloat16 products and emulates them, which is slow"
  if asked != "auto":
    return taken
  if not native_bfloat16():
    return f"{taken}: this CPU has no bfloat16 products"
  if jax.process_count() > 1:
    return f"{taken}: several processes must agree"
  speeds = product_speeds()
  return (
    f"{taken}: products of float32 run at {speeds['float32'] / 1e9:,.0f} GFLOP/s here, "
    f"of bfloat16 operands at {speeds['bfloat16_operands'] / 1e9:,.0f}"
  )


@functools.cache
def native_bfloat16() -> bool:
  """Whether the CPU multiplies bfloat16 numbers itself, according to /proc/cpuinfo."""
  try:
    words = set(pathlib.Path("/proc/cpuinfo").read_text().split())
  except OSError:
    return False
  return bool(words & {"avx512_bf16", "amx_bf16", "bf16"})


@functools.cache
def product_speeds(rows: int = 2048, width: int = 512, repeats: int = 5) -> dict[str, float]:
  """FLOP/s of rows x width x width products on the first device, casts of operands included."""
  speeds = {}
  with jax.ensure_compile_time_eval():  # the first question may come while a model is traced
    x, kernel = jnp.ones((rows, width)), jnp.ones((width, width))
    for name in ("float32", "bfloat16_operands"):
      multiply = jax.jit(functools.partial(dot, precision=TYPES[name]))
      multiply(x, kernel).block_until_ready()
      seconds = []
      for _ in range(repeats):
        start = time.perf_counter()
        multiply(x, kernel).block_until_ready()
        seconds.append(time.perf_counter() - start)
      speeds[name] = 2.0 * rows * width**2 / min(seconds)
  return speeds


def dot(a, b, precision: Precision) -> jax.Array:
  """a @ b in a precision."""
  return jnp.matmul(
    a.astype(precision.operands),
    b.astype(precision.operands),
    preferred_element_type=precision.values,
  )


def einsum(equation: str, a, b, precision: Precision) -> jax.Array:
  """The sum of products of an equation in a precision."""
  return jnp.einsum(
    equation,
    a.astype(precision.operands),
    b.astype(precision.operands),
    preferred_element_type=precision.values,
  )
