"""The mesh, and the table that says how every array is split over it.

Each mesh axis splits certain dimensions:

  data     the batch
  fsdp     the batch, and parameters with their optimizer state
  tensor   heads, feed-forward width, vocabulary
  context  token positions
"""

import math
import os
import re
from typing import Any, Sequence

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from llm.config import MeshConfig
from llm.core import UserError, round_up

AXES = ("data", "fsdp", "tensor", "context")
BATCH = ("data", "fsdp")

# Pattern of a path -> mesh axes of the trailing dimensions. Stacked layers need no rule of their
# own: their additional dimension comes first. Nor do the optimizer's moments: their paths end as
# those of the parameters do. The first match counts; a path without a match is an error.
RULES = (
  # Adafactor's sums of rows and columns, and its small arrays, are replicated.
  (r"/(count|v|v_row|v_col)(/|$)", ()),
  (r"(token|output)/embedding$", ("tensor", "fsdp")),
  (r"(position|type)/embedding$", (None, "fsdp")),
  (r"(query|key|value)/kernel$", ("fsdp", "tensor", None)),
  (r"(query|key|value)/bias$", ("tensor", None)),
  (r"relative/embedding$", (None, "tensor")),
  (r"(attention|cross)/out/kernel$", ("tensor", None, "fsdp")),
  (r"mlp/(up|gate)/kernel$", ("fsdp", "tensor")),
  (r"mlp/up/bias$", ("tensor",)),
  (r"mlp/down/kernel$", ("tensor", "fsdp")),
  (r"lm/bias$", ("tensor",)),
  # Adapters are small. Where they were cut over fsdp and tensor, XLA's partitioner computed wrong
  # tokens in writing, on a mesh of data, fsdp and tensor (tests/test_grpo.py).
  (r"lora_[ab]$", (None, None)),
  (r"(pooler|transform)/kernel$", ("fsdp", "tensor")),
  (r"(next_sentence|classifier|span|detection|embedding_project)/kernel$", ("fsdp", None)),
  (r"(out|down|pooler|transform|next_sentence|classifier|span)/bias$", (None,)),
  (r"(detection|embedding_project)/bias$", (None,)),
  (r"norm[a-z_]*/(scale|bias)$", (None,)),
)


def mesh_shape(config: MeshConfig, num_devices: int) -> dict[str, int]:
  """The size of each axis, with -1 filled in. Their product is num_devices.

  Raises UserError where the axes do not fill the devices.
  """
  sizes = {axis: getattr(config, axis) for axis in AXES}
  unset = [axis for axis, size in sizes.items() if size == -1]
  if len(unset) > 1 or any(size < 1 and size != -1 for size in sizes.values()):
    raise UserError(f"config.mesh axes must be positive, at most one of them -1, not {sizes}")
  fixed = math.prod(size for size in sizes.values() if size != -1)
  if unset and num_devices % fixed == 0:
    sizes[unset[0]] = num_devices // fixed
  if math.prod(sizes.values()) != num_devices:
    raise UserError(
      f"config.mesh {sizes} does not fill the {num_devices} devices: the product of "
      "its axes must be their number (one axis may be -1)"
    )
  if sizes["data"] % config.slices:
    raise UserError(f"config.mesh.slices={config.slices} must divide mesh.data={sizes['data']}")
  return sizes


def make_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
  """The mesh of `config` over a sequence of JAX devices (default: all of them).

  Raises UserError where the axes do not fill the devices.
  """
  devices = jax.devices() if devices is None else devices
  sizes = mesh_shape(config, len(devices))
  automatic = (AxisType.Auto,) * len(AXES)
  if config.slices > 1:
    return Mesh(_grid_of_slices(sizes, config.slices, devices), AXES, axis_types=automatic)
  try:
    return jax.make_mesh(tuple(sizes.values()), AXES, axis_types=automatic, devices=devices)
  except NotImplementedError:
    # An axis is no product of physical axes of the slice. It shares one of them with another axis.
    return Mesh(_grid_of_shared_axes(sizes, devices), AXES, axis_types=automatic)


def _grid_of_slices(sizes: dict[str, int], slices: int, devices: Sequence[Any]) -> np.ndarray:
  """Devices in the shape of the mesh, with the axis `data` over the slices."""
  from jax.experimental import mesh_utils

  per_slice = {**sizes, "data": sizes["data"] // slices}
  return mesh_utils.create_hybrid_device_mesh(
    tuple(per_slice.values()), (slices, 1, 1, 1), devices=devices
  )


def _grid_of_shared_axes(sizes: dict[str, int], devices: Sequence[Any]) -> np.ndarray:
  """Devices in the shape of the mesh, where several mesh axes may share a physical axis."""
  from jax.experimental import mesh_utils

  return mesh_utils.create_device_mesh(
    tuple(sizes.values()), devices, allow_split_physical_axes=True
  )


def parameter_spec(path: str, ndim: int) -> P:
  """The mesh axes of an array of `ndim` dimensions. Raises KeyError where no rule matches."""
  if ndim == 0:
    return P()
  for pattern, axes in RULES:
    if re.search(pattern, path):
      return P(*(None,) * (ndim - len(axes)), *axes)
  raise KeyError(f"no rule of llm/sharding.py matches the parameter {path!r}")


def shardings(tree: Any, mesh: Mesh) -> Any:
  """A NamedSharding for every leaf of a tree of parameters or optimizer state.

  Raises UserError where a mesh axis does not divide a dimension. The error names the parameter, the
  dimension, the axis and both sizes.
  """

  def leaf_sharding(key_path, leaf):
    path = jax.tree_util.keystr(key_path, simple=True, separator="/")
    spec = parameter_spec(path, leaf.ndim)
    for dim, axis in enumerate(spec):
      if axis and leaf.shape[dim] % mesh.shape[axis]:
        divisors = [n for n in range(1, 1 + max(8, mesh.size)) if leaf.shape[dim] % n == 0]
        raise UserError(
          f"config.mesh.{axis}={mesh.shape[axis]} does not divide dimension {dim} of "
          f"{path}, which has size {leaf.shape[dim]}; {', '.join(map(str, divisors))} would do"
        )
    return NamedSharding(mesh, spec)

  return jax.tree_util.tree_map_with_path(leaf_sharding, tree)


def device_bytes(leaf: jax.Array | jax.ShapeDtypeStruct) -> int:
  """The bytes of an array that one device holds. A shape with a sharding will do too."""
  return math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """The sharding of a batch: rows over data and fsdp."""
  return NamedSharding(mesh, P(BATCH))


def host_rows(array: jax.Array) -> np.ndarray:
  """All rows of a global array, on every process."""
  if array.is_fully_addressable:
    return np.asarray(array)
  from jax.experimental import multihost_utils

  return np.asarray(multihost_utils.process_allgather(array, tiled=True))


def check_batch(examples: int, rows: int, accum_steps: int, mesh: Mesh) -> None:
  """Raises UserError unless the rows of a batch divide over accumulation steps and batch axes.

  examples: config.training.batch_size. rows: the number of rows that hold these examples.
  """
  data, fsdp = mesh.shape["data"], mesh.shape["fsdp"]
  divisor = data * fsdp * accum_steps
  if rows % divisor == 0:
    return
  if rows == examples:
    packed = ""
    multiple = divisor
  else:
    packed = f" examples come to {rows} rows, which"
    # Rows that examples share come in multiples of 8 (data/batches.py).
    multiple = math.lcm(divisor, 8 * accum_steps)
  sufficient = math.ceil(round_up(rows, multiple) * examples / rows)
  raise UserError(
    f"config.training.batch_size={examples}{packed} must be a multiple of mesh.data x "
    f"mesh.fsdp x optimizer.grad_accum_steps = {data} x {fsdp} x {accum_steps}: set it to "
    f"about {sufficient}, or use fewer devices or accumulation steps"
  )


def constrain(x: jax.Array, *axes: str | tuple[str, ...] | None) -> jax.Array:
  """Asks the compiler to split the dimensions of x over mesh axes. Without a mesh, returns x."""
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty or mesh.size == 1:
    return x
  return jax.lax.with_sharding_constraint(x, P(*axes))


def layer_by_layer(path: str, shape: tuple[int, ...]) -> list[P]:
  """The steps by which a stack of layers goes from its split in RULES to whole layers on devices.

  Products of whole matrices need no exchange between devices. Each step moves one mesh axis to the
  dimension of the layers. Where two axes move at once, the compiler gathers the whole array.

  An axis that does not divide the layers gets copies of them. Without a mesh there are no steps.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty or mesh.size == 1:
    return []
  spec = list(parameter_spec(path, len(shape)))
  specs = [P(*spec)]
  layer_axes: tuple[str, ...] = ()  # the axes that split the layers
  for axis in ("fsdp", "tensor", "context", "data"):
    if mesh.shape[axis] == 1:
      continue
    parts = math.prod(mesh.shape[name] for name in (*layer_axes, axis))
    if shape[0] % parts == 0:
      layer_axes = (*layer_axes, axis)
    spec = [layer_axes, *(None if name == axis else name for name in spec[1:])]
    specs.append(P(*spec))
  return specs


def cpu_devices(config: MeshConfig) -> int:
  """The number of devices to make of the CPU: the product of the axes that are set, else one.

  One device uses all cores. Each further device keeps a replica of the state, and gradients must be
  summed over the devices: on two cores that was slower at every shape of benchmarks/train_step.py.

  A mesh of more devices than cores is meant for accelerators. It gets one device here, so that
  `make_mesh` raises UserError.
  """
  product = math.prod(max(getattr(config, axis), 1) for axis in AXES)
  return product if product <= (os.cpu_count() or 1) else 1
