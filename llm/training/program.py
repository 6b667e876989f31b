"""The training step, compiled for devices that need not be here: memory, FLOPs, traffic, bounds."""

import collections
import re
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from llm import sharding
from llm.config import Config
from llm.core import Params, TrainState, first_line
from llm.performance import flops, hardware, hlo
from llm.training import plan as plan_lib
from llm.training.experiment import Experiment

# What the TPU compiler says where a program does not fit: (needed, available) a device.
OUT_OF_MEMORY = (
  r"Used ([\d.]+\w) of ([\d.]+\w) hbm",
  r"temporaries \(([\d.]+\w)\) exceeds available HBM \(([\d.]+\w)\)",
)


def explicit(experiment: Experiment, topology: hardware.Topology) -> Experiment:
  """The experiment with "auto" settled for a topology, not for this machine. Raises UserError."""
  platform = "cpu" if topology.chip is None else "tpu"
  return experiment.on_platform(platform, experiment.config.mesh.context)


def rows_of(experiment: Experiment) -> int:
  """Rows of a batch. Without data no examples share a row, so that a batch has the most rows."""
  return experiment.config.training.batch_size


def traced_step(experiment: Experiment, planned: plan_lib.Plan, mesh: Mesh) -> jax.stages.Traced:
  """The training step of a plan, traced for its mesh. Nothing is allocated."""
  rows = rows_of(experiment)
  placed = sharding.batch_sharding(mesh)
  batch = {
    name: jax.ShapeDtypeStruct((rows, *array.shape[1:]), array.dtype, sharding=placed)
    for name, array in experiment.one_row().items()
  }
  with jax.set_mesh(mesh):
    return planned.jitted_train_step.trace(planned.state, batch, np.int32(0), plan_lib.NO_PACE)


def report(experiment: Experiment, topology: hardware.Topology) -> dict[str, Any]:
  """What a training step needs on a topology, in bytes, seconds and FLOPs, as JSON takes it.

  `fits` is False where a device has too little memory; `reason` and `advice` then stand in place
  of memory, collectives and bounds. Raises UserError where the config does not fit the topology.
  """
  config = experiment.config
  rows = rows_of(experiment)
  mesh = hardware.mesh(config.mesh, topology)
  accum_steps = config.optimizer.grad_accum_steps
  sharding.check_batch(config.training.batch_size, rows, accum_steps, mesh)
  planned = plan_lib.of(experiment, mesh)
  traced = traced_step(experiment, planned, mesh)
  result = {"topology": topology.name, "devices": mesh.size, "mesh": dict(mesh.shape)}
  result |= _sizes(experiment, planned.params, traced)
  try:
    compiled = traced.lower().compile()
  except jax.errors.JaxRuntimeError as error:
    if "RESOURCE_EXHAUSTED" not in str(error):
      raise
    advice = _advice(config, rows, mesh.size)
    return result | {"fits": False, "reason": _out_of_memory(error), "advice": advice}
  memory: Any = compiled.memory_analysis()
  text = compiled.as_text()
  assert text is not None
  result["fits"] = True
  result["memory"] = _memory(planned.state, memory)
  result["collectives"] = _traffic(hlo.collectives(text, mesh), topology.chip, mesh)
  if topology.chip is None:
    return result | {"bounds": {}}
  return result | _bounds(result, memory, topology.chip)


def _sizes(experiment: Experiment, params: Params, traced: jax.stages.Traced) -> dict[str, float]:
  """Parameters of the model, and tokens and FLOPs of a step."""
  config = experiment.config
  rows = rows_of(experiment)
  flops_of_row = flops.model_flops(experiment.model, params, experiment.one_row(), config.model)
  return {
    "parameters": flops.count_parameters(params, config.model.vocab_size),
    "tokens": rows * config.training.sequence_length,
    "model_flops": flops_of_row * rows,
    "executed_flops": flops.dot_flops(traced.jaxpr.jaxpr),
  }


def _out_of_memory(error: Exception) -> str:
  for pattern in OUT_OF_MEMORY:
    if sizes := re.search(pattern, str(error)):
      return f"{sizes[1]}iB a device, which has {sizes[2]}iB"
  return first_line(error)


def _advice(config: Config, rows: int, devices: int) -> list[str]:
  """What reduces the memory of a step, the cheapest first."""
  advice = []
  if config.mesh.fsdp == 1:
    fsdp = devices // config.mesh.tensor // config.mesh.context
    advice.append(
      f"--config.mesh.fsdp={fsdp} --config.mesh.data=1 splits parameters and optimizer state"
    )
  if config.model.remat == "none":
    advice.append("--config.model.remat=full recomputes activations")
  if not config.model.loss_chunk:
    advice.append("--config.model.loss_chunk=128 never holds all logits")
  accum_steps = config.optimizer.grad_accum_steps
  if rows // accum_steps > devices:
    advice.append(
      f"--config.optimizer.grad_accum_steps={2 * accum_steps} works through the batch in parts"
    )
  advice.append("a smaller --config.training.batch_size")
  advice.append("more devices, or --config.mesh.tensor")
  return advice


def _memory(state: TrainState, memory: Any) -> dict[str, int]:
  """Bytes of a device by what they hold, and the peak.

  memory: `jax.stages.Compiled.memory_analysis()`.
  """
  # Compilers that do not say when each array lives: as if all of them did at the same time.
  peak = getattr(memory, "peak_memory_in_bytes", 0) or (
    memory.argument_size_in_bytes
    + memory.output_size_in_bytes
    - memory.alias_size_in_bytes
    + memory.temp_size_in_bytes
  )
  parameters = _device_bytes(state.trained) + _device_bytes(state.frozen)
  optimizer = _device_bytes(state.opt_state)
  return {
    "parameters": parameters,
    "optimizer state": optimizer,
    "the rest: activations, gradients, batch": peak - parameters - optimizer,
    "peak": peak,
  }


def _device_bytes(tree: Any) -> int:
  return sum(map(sharding.device_bytes, jax.tree.leaves(tree)))


def _traffic(
  exchanges: list[hlo.Collective], chip: hardware.Chip | None, mesh: Mesh
) -> list[dict[str, Any]]:
  """Bytes and least seconds a step, by kind of exchange and mesh axes, the most bytes first."""
  sent = collections.defaultdict(float)
  seconds = collections.defaultdict(float)
  for exchange in exchanges:
    key = exchange.kind, exchange.axes
    sent[key] += exchange.sent * exchange.times
    seconds[key] += _link_seconds(exchange, chip, mesh) if chip else 0.0
  return [
    {"kind": kind, "axes": axes, "bytes": total, "seconds": seconds[kind, axes]}
    for (kind, axes), total in sorted(sent.items(), key=lambda item: -item[1])
  ]


def _link_seconds(exchange: hlo.Collective, chip: hardware.Chip, mesh: Mesh) -> float:
  """The least seconds a step of an exchange, by the bandwidth of the links that it can use.

  Those are the links along every torus dimension that its group of devices spans: in both
  directions where the dimension closes to a ring, else in one.
  """
  sent = exchange.sent * exchange.times
  if exchange.axes == ("slices",):
    return sent / chip.network_bandwidth
  position: list[Any] = [0] * mesh.devices.ndim
  for axis in exchange.axes:
    position[mesh.axis_names.index(axis)] = slice(None)
  group = mesh.devices[tuple(position)].ravel()
  if len({getattr(device, "slice_index", 0) for device in group}) > 1:
    return sent / chip.network_bandwidth
  coords = np.array([device.coords for device in group])[:, : len(chip.torus)]
  links = 0
  for column, ring in zip(coords.T, chip.torus):
    span = len(set(column.tolist()))
    if span > 1:
      links += 2 if span >= ring else 1
  return sent / (max(links, 1) * chip.link_bandwidth)


def _bounds(result: dict[str, Any], memory: Any, chip: hardware.Chip) -> dict[str, Any]:
  """The least seconds of a step by each resource, and the MFU at most if that one binds.

  Memory bandwidth: the state is read and written once, and so is each byte of temporary memory.
  Links: exchanges over the same axes follow each other, those over different axes may overlap.
  """
  peak = chip.flops * result["devices"]
  bytes_moved = (
    memory.argument_size_in_bytes + memory.output_size_in_bytes + 2 * memory.temp_size_in_bytes
  )
  bounds = {
    "compute": result["executed_flops"] / peak,
    "memory": bytes_moved / chip.memory_bandwidth,
  }
  # The two overlap at best: then the shorter one costs nothing.
  hidden = min(bounds.values())
  by_axes = collections.Counter()
  for traffic in result["collectives"]:
    by_axes[traffic["axes"]] += traffic["seconds"]
  for axes, seconds in by_axes.most_common():
    bounds[f"links, {' '.join(axes)}"] = seconds
  without_overlap = sum(bounds.values()) - hidden
  return {
    "bounds": bounds,
    "binding": max(bounds, key=lambda name: bounds[name]),
    "mfu_without_overlap": result["model_flops"] / peak / without_overlap,
    "mfu_bounds": {
      name: result["model_flops"] / peak / seconds if seconds else 1.0
      for name, seconds in bounds.items()
    },
  }
