"""The FLOPs of a model, counted in its traced program, and the peak that they are held against."""

import functools
import math
import time

import jax
import numpy as np
from flax import linen as nn
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


def dot_flops(jaxpr) -> float:
  """2 x multiplications of every dot_general of a jaxpr.

  Scanned bodies count as often as they run, kernels as often as their grid has places, what each
  device does for itself as often as there are devices. Of branches, the dearest counts.
  """
  total = 0.0
  for eqn in jaxpr.eqns:
    if eqn.primitive.name == "cond":
      total += max(dot_flops(branch.jaxpr) for branch in eqn.params["branches"])
      continue
    if eqn.primitive.name == "dot_general":
      (contracted, _), _ = eqn.params["dimension_numbers"]
      depth = np.prod([eqn.invars[0].aval.shape[i] for i in contracted])
      total += 2.0 * depth * np.prod(eqn.outvars[0].aval.shape)
    times = {
      "scan": lambda p: p["length"],
      "pallas_call": lambda p: math.prod(p["grid_mapping"].grid),
      "shard_map": lambda p: p["mesh"].size,
    }.get(eqn.primitive.name, lambda p: 1)(eqn.params)
    for value in jax.tree.leaves(
      eqn.params, is_leaf=lambda v: hasattr(v, "eqns") or hasattr(v, "jaxpr")
    ):
      inner = getattr(value, "jaxpr", value)
      if hasattr(inner, "eqns"):
        total += times * dot_flops(inner)
  return total


def model_flops(model: nn.Module, params: Params, batch: Batch, config: ModelConfig) -> float:
  """FLOPs that one training step on `batch` needs: 3 x those of the forward pass.

  Forward FLOPs are 2 a multiply-add of every matrix product, counted in the traced program: heads
  included, at the positions where they are computed, over the padded vocabulary. A decoder needs half
  of its attention products: of 4 B T^2 D L FLOPs forward, half are taken off (PaLM, appendix B, counts
  without this halving). Recomputation does not count.
  """
  traced = jax.make_jaxpr(lambda p, b: model.apply({"params": p}, b, train=False))(params, batch)
  forward = dot_flops(traced.jaxpr)
  kind = models.facts(config).kind
  if kind != "encoder":
    tokens = batch["tokens" if kind == "decoder" else "decoder_tokens"]
    rows, length = tokens.shape
    forward -= 2.0 * rows * length**2 * config.num_heads * head_width_of(config) * config.num_layers
  return 3.0 * forward


def peak_flops(mesh: Mesh, types: Precision) -> tuple[float, str]:
  """FLOP/s that the devices of the mesh can reach together, and where the figure comes from.

  Of an accelerator, its data sheet; on CPU a matrix product of these types measured once, all devices
  together; (nan, "unknown") for a device that is not in the table.
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
  rows = NamedSharding(mesh, P(mesh.axis_names))
  a = jax.device_put(np.ones((size * mesh.size, size), np.float32), rows)
  b = jax.device_put(np.ones((size, size), np.float32), NamedSharding(mesh, P()))
  multiply = jax.jit(functools.partial(precision.dot, precision=types))
  multiply(a, b).block_until_ready()
  best = 0.0
  for _ in range(5):
    start = time.perf_counter()
    multiply(a, b).block_until_ready()
    best = max(best, 2.0 * size**3 * mesh.size / (time.perf_counter() - start))
  return best


def count_parameters(params: Params, vocab_size: int) -> int:
  """Parameters without the rows that pad the vocabulary."""
  padding = padded_vocab(vocab_size) - vocab_size
  total = 0
  for path, leaf in flatten(params).items():
    total += math.prod(leaf.shape)
    if path in vocabulary.PATHS:
      total -= padding * math.prod(leaf.shape[1:])
  return total
