"""Whether a run fits the memory that there is, by arithmetic, before anything is allocated.

What is counted is the least that any program of the run needs: parameters, gradients and the state
of the optimizer; the batches that are made ahead; what a layer hands to the next one, which the
backward pass keeps even where layers are recomputed; the scores of plain attention. So what is
refused here cannot fit. What passes may still turn out too large when it is compiled.
"""

import math
import pathlib
from typing import Any, NamedTuple

import jax
import psutil
from jax.sharding import Mesh

from llm.core import UserError
from llm.models import precision
from llm.training import plan as plan_lib
from llm.training.experiment import Training

CGROUP = pathlib.Path("/sys/fs/cgroup/memory.max")


class Needs(NamedTuple):
  """Bytes that a run takes at least, over all devices.

  state: whatever the batch is. row: of each row of a batch.
  """

  state: int
  row: int


def check(experiment: Training, mesh: Mesh, params: Any = (), state: Any = None) -> None:
  """Raises UserError where a run cannot fit its devices: how much it takes, and what would fit.

  params, state: the planned parameters and the state, of ShapeDtypeStructs with shardings. Without
  them, one row is counted: it may be too long to plan with.
  """
  trees = (params, state.trained, state.opt_state) if state else ()
  needs = Needs(sum(_bytes(tree, mesh) for tree in trees), _bytes_a_row(experiment))
  memory = memory_of(mesh)
  rows = experiment.batches.batch_size if state else 1
  if memory is None or needs.state + rows * needs.row <= memory:
    return
  where = f"{mesh.size} device{'s' * (mesh.size > 1)} with {human(memory)} of memory"
  parameters = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))
  if needs.state + needs.row > memory and needs.state > needs.row:
    raise UserError(
      f"the model has {parameters:,} parameters, whose training takes at least "
      f"{human(needs.state)}; there is {where}, where {parameters * memory // needs.state:,} would "
      "fit: lower config.model.num_layers or config.model.width, or spread it over more devices "
      "(config.mesh.fsdp)"
    )
  if needs.state + needs.row > memory:
    raise UserError(
      f"a row of config.training.sequence_length={experiment.config.training.sequence_length:,} "
      f"takes at least {human(needs.row)}; there is {where}: take shorter rows, or a smaller model"
    )
  fits = (memory - needs.state) // needs.row
  raise UserError(
    f"config.training.batch_size={experiment.config.training.batch_size:,}: {rows:,} rows take at "
    f"least {human(rows * needs.row)} beside {human(needs.state)} of parameters and optimizer; "
    f"there is {where}: at most {fits:,} rows fit, more with config.optimizer.grad_accum_steps"
  )


def plan_that_fits(experiment: Training, mesh: Mesh) -> plan_lib.Plan:
  """The plan of a run. Raises UserError as `check`, and as planning does."""
  check(experiment, mesh)
  planned = plan_lib.of(experiment, mesh)
  check(experiment, mesh, planned.params, planned.state)
  return planned


def human(count: int) -> str:
  """A number of bytes in the unit that suits it: "1.5 TB"."""
  for unit, size in (("PB", 10**15), ("TB", 10**12), ("GB", 10**9), ("MB", 10**6)):
    if count >= size:
      return f"{count / size:,.1f} {unit}"
  return f"{count / 1e3:,.1f} kB"


def memory_of(mesh: Mesh) -> int | None:
  """Bytes of memory of the devices of a mesh; None where they do not tell."""
  device = mesh.local_devices[0]  # others tell their own processes alone
  if device.platform != "cpu":
    limit = (device.memory_stats() or {}).get("bytes_limit")
    return limit and limit * mesh.size
  memory = psutil.virtual_memory().total
  limit = CGROUP.read_text().strip() if CGROUP.is_file() else "max"
  if limit.isdigit():  # of a container
    memory = min(memory, int(limit))
  return memory * jax.process_count()  # where several processes share a machine, it is less


def _bytes(tree: Any, mesh: Mesh) -> int:
  """Bytes of a tree of arrays over all devices of a mesh, each with its copy or its part."""
  total = 0
  for leaf in jax.tree.leaves(tree):
    part = leaf.sharding.shard_shape(leaf.shape)
    total += math.prod(part) * leaf.dtype.itemsize * mesh.size
  return total


def _bytes_a_row(experiment: Training) -> int:
  """Bytes that each row of a batch takes."""
  config = experiment.config
  model = config.model
  spec = experiment.objective.batch_spec(model, config.training.sequence_length)
  arrays = sum(math.prod(array.shape) * array.dtype.itemsize for array in spec.values())
  length = spec["tokens"].shape[0]
  values = precision.of(model).values.itemsize
  kept_layers = 1 if config.optimizer.freeze else model.num_layers  # frozen ones keep nothing
  at_work = kept_layers * length * model.width * values
  if model.attention == "reference":
    at_work += model.num_heads * length * length * values
  return arrays * (1 + config.data.prefetch) + at_work // config.optimizer.grad_accum_steps
