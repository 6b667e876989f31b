"""The FLOPs of a model, counted in its traced program, and the peak to compare them with."""

import functools
import math
import time
from typing import Any, Iterator, cast

import jax
import numpy as np
from flax import linen as nn
from jax.core import ShapedArray
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from llm import models
from llm.checkpoints import vocabulary
from llm.config import ModelConfig
from llm.core import Batch, Params, flatten
from llm.models import precision
from llm.models.architecture import head_width_of, padded_vocab
from llm.models.precision import Precision
from llm.performance import hardware


def dot_flops(jaxpr: Jaxpr) -> float:
  """FLOPs of all matrix products of a traced program: 2 for every multiplication.

  The body of a scan counts as often as it runs, a kernel once for every cell of its grid, and what
  each device computes for itself once for every device. Of the branches of a condition, the most
  expensive one counts.
  """
  total = 0.0
  for eqn in jaxpr.eqns:
    if eqn.primitive.name == "cond":
      total += max(dot_flops(branch.jaxpr) for branch in eqn.params["branches"])
      continue
    if eqn.primitive.name == "dot_general":
      (contracted, _), _ = eqn.params["dimension_numbers"]
      left = cast(ShapedArray, eqn.invars[0].aval)
      product = cast(ShapedArray, eqn.outvars[0].aval)
      depth = np.prod([left.shape[axis] for axis in contracted])
      total += 2.0 * depth * np.prod(product.shape)
    for inner in _inner_jaxprs(eqn):
      total += _executions(eqn) * dot_flops(inner)
  return total


def _inner_jaxprs(eqn: JaxprEqn) -> Iterator[Jaxpr]:
  """The programs among the parameters of an equation."""

  def is_jaxpr(value: Any) -> bool:
    return isinstance(value, Jaxpr | ClosedJaxpr)

  for value in jax.tree.leaves(eqn.params, is_leaf=is_jaxpr):
    if is_jaxpr(value):
      yield getattr(value, "jaxpr", value)


def _executions(eqn: JaxprEqn) -> int:
  """How often an equation runs the programs among its parameters."""
  match eqn.primitive.name:
    case "scan":
      return eqn.params["length"]
    case "pallas_call":
      return math.prod(eqn.params["grid_mapping"].grid)
    case "shard_map":
      return eqn.params["mesh"].size
  return 1


def model_flops(model: nn.Module, params: Params, batch: Batch, config: ModelConfig) -> float:
  """FLOPs that a training step of all parameters needs: 3 times those of the forward pass.

  The forward pass needs 2 for every multiplication of its matrix products, counted in the traced
  program: the heads at the positions where they are computed, over the padded vocabulary. A causal
  mask makes half of the attention products needless, so half of the 4 B T^2 H K L FLOPs of a
  decoder's attention are taken off (PaLM, Chowdhery et al. 2022, appendix B, does not halve them).
  So is what lies outside the windows of local layers. Recomputation does not count. Where
  parameters are frozen, a step needs less.
  """
  traced = jax.make_jaxpr(lambda p, b: model.apply({"params": p}, b, train=False))(params, batch)
  forward = dot_flops(traced.jaxpr)
  kind = models.facts(config).kind
  rows, length = batch["decoder_tokens" if kind == "encoder_decoder" else "tokens"].shape
  by_pair = 4.0 * rows * config.num_heads * head_width_of(config)  # of a query and a key
  if kind != "encoder":
    forward -= by_pair * length**2 / 2 * config.num_layers
  if config.window:
    local_layers = config.num_layers - -(-config.num_layers // config.global_every)
    forward -= by_pair * length * max(length - config.window, 0) * local_layers
  return 3.0 * forward


def peak_flops(mesh: Mesh, types: Precision) -> tuple[float, str]:
  """FLOP/s that the devices of a mesh reach together at best, and where the figure comes from.

  For an accelerator the figure is that of its data sheet; (nan, "unknown") where the tables lack
  it. On CPU it is measured once: a matrix product of these types on all devices at the same time.
  """
  device = mesh.devices.flat[0]
  if device.platform == "cpu":
    return _matmul_ceiling(mesh, types), f"measured matmul of {types.operands} operands"
  chip = hardware.chip_of(device.device_kind)
  if chip is None:
    return float("nan"), "unknown"
  return chip.flops * mesh.size, f"{chip.kinds[0]} data sheet, bf16"


@functools.cache
def _matmul_ceiling(mesh: Mesh, types: Precision, size: int = 1024) -> float:
  """FLOP/s of the fastest of five products of size x size matrices, one on each device."""
  by_device = NamedSharding(mesh, P(mesh.axis_names))
  replicated = NamedSharding(mesh, P())
  a = jax.device_put(np.ones((size * mesh.size, size), np.float32), by_device)
  b = jax.device_put(np.ones((size, size), np.float32), replicated)
  multiply = jax.jit(functools.partial(precision.dot, precision=types))
  multiply(a, b).block_until_ready()
  fastest = 0.0
  for _ in range(5):
    start = time.perf_counter()
    multiply(a, b).block_until_ready()
    fastest = max(fastest, 2.0 * size**3 * mesh.size / (time.perf_counter() - start))
  return fastest


def count_parameters(params: Params, vocab_size: int) -> int:
  """Parameters without the rows that pad the vocabulary."""
  padding = padded_vocab(vocab_size) - vocab_size
  total = 0
  for path, leaf in flatten(params).items():
    total += math.prod(leaf.shape)
    if path in vocabulary.PATHS:
      total -= padding * math.prod(leaf.shape[1:])
  return total
