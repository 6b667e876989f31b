"""The types of a computation: that of activations, and that of the operands of matrix products."""

import functools
import importlib.metadata
import json
import os
import pathlib
import time
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from llm import cache
from llm.config import ModelConfig


class Precision(NamedTuple):
  """The types of activations and of the operands of matrix products.

  Both operands of a product are cast to `operands`. It accumulates in float32 or better, and its
  result has the type `values`, that of the activations.
  """

  values: jnp.dtype
  operands: jnp.dtype


TYPES = {
  "float32": Precision(jnp.dtype("float32"), jnp.dtype("float32")),
  "float64": Precision(jnp.dtype("float64"), jnp.dtype("float64")),
  "bfloat16": Precision(jnp.dtype("bfloat16"), jnp.dtype("bfloat16")),
  # On CPUs, bfloat16 products are fast only where the result is float32.
  "bfloat16_operands": Precision(jnp.dtype("float32"), jnp.dtype("bfloat16")),
}

MIN_SPEEDUP = 1.2  # bfloat16 operands are taken on CPU where products are this much faster


def of(config: ModelConfig) -> Precision:
  """The types that config.dtype names. "auto" must be resolved before (models/resolve.py)."""
  return TYPES[config.dtype]


def auto(platform: str) -> str:
  """The dtype that "auto" stands for on a platform: cpu, gpu or tpu.

  Accelerators take bfloat16. A CPU takes bfloat16 operands where a measurement finds them faster,
  else float32. Several processes on CPU take float32, because their measurements could differ.
  """
  if platform != "cpu":
    return "bfloat16"
  if jax.process_count() > 1 or not native_bfloat16():
    return "float32"
  speeds = product_speeds()
  faster = speeds["bfloat16_operands"] > MIN_SPEEDUP * speeds["float32"]
  return "bfloat16_operands" if faster else "float32"


def explained(configured: str, resolved: str, platform: str) -> str:
  """The resolved dtype and why it was chosen, as a line for the header of a run."""
  if platform != "cpu":
    return resolved
  if "bfloat16" in resolved and not native_bfloat16():
    return f"{resolved}: this CPU has no bfloat16 products and emulates them, which is slow"
  if configured != "auto":
    return resolved
  if not native_bfloat16():
    return f"{resolved}: this CPU has no bfloat16 products"
  if jax.process_count() > 1:
    return f"{resolved}: several processes must agree"
  speeds = product_speeds()
  return (
    f"{resolved}: products of float32 run at {speeds['float32'] / 1e9:,.0f} GFLOP/s here, "
    f"of bfloat16 operands at {speeds['bfloat16_operands'] / 1e9:,.0f}"
  )


@functools.cache
def native_bfloat16() -> bool:
  """Whether the CPU has instructions for bfloat16 products, according to /proc/cpuinfo."""
  try:
    words = set(pathlib.Path("/proc/cpuinfo").read_text().split())
  except OSError:
    return False
  return bool(words & {"avx512_bf16", "amx_bf16", "bf16"})


@functools.cache
def product_speeds() -> dict[str, float]:
  """Dtype -> FLOP/s of its products, casts of operands included.

  They are measured once on a machine and then kept in the cache folder: all runs of a machine take
  the same types, however busy it is when they start.
  """
  key = cache.digest(_processor(), str(os.cpu_count()), importlib.metadata.version("jaxlib"))

  def write(folder: pathlib.Path) -> None:
    (folder / "speeds.json").write_text(json.dumps(_measured_speeds()))

  folder = cache.kept(cache.cache_dir() / "products" / key[:32], write)
  return json.loads((folder / "speeds.json").read_text())


def _processor() -> str:
  """What /proc/cpuinfo says of the first core that does not change while it runs."""
  first_core = pathlib.Path("/proc/cpuinfo").read_text().split("\n\n")[0]
  return "\n".join(line for line in first_core.splitlines() if not line.startswith("cpu MHz"))


def _measured_speeds(rows: int = 2048, width: int = 512, repeats: int = 5) -> dict[str, float]:
  """Dtype -> FLOP/s of a product of (rows, width) and (width, width), the best of some runs."""
  speeds = {}
  with jax.ensure_compile_time_eval():  # the first call may come while a model is traced
    x = jax.device_put(np.ones((rows, width), np.float32))
    kernel = jax.device_put(np.ones((width, width), np.float32))
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


def dot(a: jax.Array, b: jax.Array, precision: Precision) -> jax.Array:
  """a @ b in a precision."""
  return jnp.matmul(
    a.astype(precision.operands),
    b.astype(precision.operands),
    preferred_element_type=precision.values,
  )


def over_rows(x: jax.Array, dy: jax.Array, precision: Precision) -> jax.Array:
  """The sum over all leading dimensions of x^T dy: IxO, in a precision.

  On CPU, XLA computes a product over flattened rows in float32, whatever its operands: bfloat16
  keeps the leading dimensions and takes half the time. In float32, flattened rows need no copy.
  """
  if precision.operands == jnp.float32:
    return dot(x.reshape(-1, x.shape[-1]).T, dy.reshape(-1, dy.shape[-1]), precision)
  leading = tuple(range(x.ndim - 1))
  return jax.lax.dot_general(
    x.astype(precision.operands),
    dy.astype(precision.operands),
    ((leading, leading), ((), ())),
    preferred_element_type=precision.values,
  )


def einsum(equation: str, a: jax.Array, b: jax.Array, precision: Precision) -> jax.Array:
  """jnp.einsum of two arrays in a precision."""
  return jnp.einsum(
    equation,
    a.astype(precision.operands),
    b.astype(precision.operands),
    preferred_element_type=precision.values,
  )
