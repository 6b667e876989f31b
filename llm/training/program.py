"""The training step as a compiled program for devices that need not be here: memory, FLOPs, traffic, bounds."""

import collections
import re

import jax
import numpy as np
from jax.sharding import Mesh

from llm import sharding
from llm.config import Config
from llm.core import first_line
from llm.performance import flops, hardware, hlo
from llm.training import state as state_lib
from llm.training import step as step_lib
from llm.training.experiment import Experiment


def explicit(experiment: Experiment, topology: hardware.Topology) -> Experiment:
  """The experiment with "auto" settled for a topology, not for this machine. Raises UserError."""
  platform = "cpu" if topology.chip is None else "tpu"
  return experiment.on_platform(platform, experiment.config.mesh.context)


def rows_of(experiment: Experiment) -> int:
  """Rows of a batch. Without data, each example has a row, the most that a batch takes."""
  return experiment.config.training.batch_size


def lowered(experiment: Experiment, mesh: Mesh) -> jax.stages.Traced:
  """The step, traced for a mesh; nothing is allocated."""
  planned = state_lib.plan(experiment, mesh)
  rows, split = rows_of(experiment), sharding.batch_sharding(mesh)
  batch = {
    name: jax.ShapeDtypeStruct((rows, *array.shape[1:]), array.dtype, sharding=split)
    for name, array in experiment.one_row().items()
  }
  step = step_lib.jitted_train_step(
    experiment.model,
    experiment.objective,
    planned.optimizer,
    planned.marks,
    experiment.config.optimizer.grad_accum_steps,
    jax.tree.map(lambda s: s.sharding, planned.state),
  )
  with jax.set_mesh(mesh):
    return step.trace(planned.state, batch, np.int32(0))


def _advice(config: Config, rows: int, devices: int) -> list[str]:
  """What makes a step smaller, the cheapest first."""
  out = []
  if config.mesh.fsdp == 1:
    out.append(
      f"--config.mesh.fsdp={devices // config.mesh.tensor // config.mesh.context} --config.mesh.data=1 splits parameters "
      "and optimizer state"
    )
  if config.model.remat == "none":
    out.append("--config.model.remat=full recomputes activations")
  if not config.model.loss_chunk:
    out.append("--config.model.loss_chunk=128 never holds all logits")
  if rows // config.optimizer.grad_accum_steps > devices:
    out.append(
      f"--config.optimizer.grad_accum_steps={2 * config.optimizer.grad_accum_steps} works through the batch in parts"
    )
  return out + ["a smaller --config.training.batch_size", "more devices, or --config.mesh.tensor"]


def _held(state) -> dict[str, int]:
  """Bytes of a device by kind, from the shardings."""
  size = lambda tree: sum(map(sharding.device_bytes, jax.tree.leaves(tree)))
  return {
    "parameters": size(state.trained) + size(state.frozen),
    "optimizer state": size(state.opt_state),
  }


def _link_seconds(exchange: hlo.Collective, topology: hardware.Topology, mesh) -> float:
  """The least time of an exchange: both directions of every torus dimension that its axes span, where they close to a ring."""
  chip, sent = topology.chip, exchange.sent * exchange.times
  if exchange.axes == ("slices",):
    return sent / chip.network_bandwidth
  place = [0] * mesh.devices.ndim
  for axis in exchange.axes:
    place[mesh.axis_names.index(axis)] = slice(None)
  group = mesh.devices[tuple(place)].ravel()
  if len({getattr(device, "slice_index", 0) for device in group}) > 1:
    return sent / chip.network_bandwidth
  coords = np.array([device.coords for device in group])[:, : len(chip.torus)]
  links = 0
  for column, ring in zip(coords.T, chip.torus):
    span = len(set(column.tolist()))
    links += 0 if span == 1 else 2 if span >= ring else 1
  return sent / (max(links, 1) * chip.link_bandwidth)


def report(experiment: Experiment, topology: hardware.Topology) -> dict:
  """All that is known of the step on a topology, as plain numbers (bytes, seconds, FLOPs), for JSON."""
  config, batch_size = experiment.config, rows_of(experiment)
  mesh = hardware.mesh(config.mesh, topology)
  sharding.check_batch(
    config.training.batch_size, batch_size, config.optimizer.grad_accum_steps, mesh
  )
  planned = state_lib.plan(experiment, mesh)
  out = {
    "topology": topology.name,
    "devices": mesh.size,
    "mesh": dict(mesh.shape),
    "parameters": flops.count_parameters(planned.params, config.model.vocab_size),
    "tokens": batch_size * config.training.sequence_length,
  }
  traced = lowered(experiment, mesh)
  row = experiment.one_row()
  of_row = flops.model_flops(experiment.model, planned.params, row, config.model)
  out["model_flops"] = of_row * batch_size
  out["executed_flops"] = flops.dot_flops(traced.jaxpr.jaxpr)
  try:
    compiled = traced.lower().compile()
  except jax.errors.JaxRuntimeError as error:
    if "RESOURCE_EXHAUSTED" not in str(error):
      raise
    used = re.search(r"Used ([\d.]+\w) of ([\d.]+\w) hbm", str(error)) or re.search(
      r"temporaries \(([\d.]+\w)\) exceeds available HBM \(([\d.]+\w)\)", str(error)
    )
    reason = f"{used[1]}iB a device, which has {used[2]}iB" if used else first_line(error)
    return out | {"fits": False, "reason": reason, "advice": _advice(config, batch_size, mesh.size)}
  memory = compiled.memory_analysis()
  held = _held(planned.state)
  # Older compilers do not say when their arrays live: then all at once.
  peak = getattr(memory, "peak_memory_in_bytes", 0) or (
    memory.argument_size_in_bytes
    + memory.output_size_in_bytes
    - memory.alias_size_in_bytes
    + memory.temp_size_in_bytes
  )
  out |= {
    "fits": True,
    "memory": {
      **held,
      "the rest: activations, gradients, batch": peak - sum(held.values()),
      "peak": peak,
    },
  }
  exchanges = hlo.collectives(compiled.as_text(), mesh)
  totals = collections.defaultdict(lambda: [0.0, 0.0])
  for one in exchanges:
    total = totals[one.kind, one.axes]
    total[0] += one.sent * one.times
    total[1] += _link_seconds(one, topology, mesh) if topology.chip else 0.0
  out["collectives"] = [
    {"kind": kind, "axes": axes, "bytes": sent, "seconds": seconds}
    for (kind, axes), (sent, seconds) in sorted(totals.items(), key=lambda item: -item[1][0])
  ]
  return out | _bounds(out, memory, topology)


def _bounds(found: dict, memory, topology: hardware.Topology) -> dict:
  """The least time of a step by what binds it, and the MFU that leaves. Exchanges over different axes overlap at best.

  Memory: the state is read and written once, and so is each byte of temporary memory.
  """
  if topology.chip is None:
    return {"bounds": {}}
  peak = topology.chip.flops * found["devices"]
  by_axis = collections.Counter()
  for one in found["collectives"]:
    by_axis[one["axes"]] += one["seconds"]
  moved = (
    memory.argument_size_in_bytes + memory.output_size_in_bytes + 2 * memory.temp_size_in_bytes
  )
  bounds = {
    "compute": found["executed_flops"] / peak,
    "memory": moved / topology.chip.memory_bandwidth,
    **{f"links, {' '.join(axes)}": seconds for axes, seconds in by_axis.most_common()},
  }
  on_chip = bounds["compute"], bounds["memory"]  # at once, at best
  in_turns = sum(bounds.values()) - min(on_chip)
  return {
    "bounds": bounds,
    "binding": max(bounds, key=bounds.get),
    "mfu_without_overlap": found["model_flops"] / peak / in_turns,
    "mfu_bounds": {
      name: found["model_flops"] / peak / seconds if seconds else 1.0
      for name, seconds in bounds.items()
    },
  }
