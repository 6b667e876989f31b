"""The mesh, and the one table that says how every array lies on it.

Axes: `data` (batch), `fsdp` (batch; parameters and optimizer state split), `tensor` (heads,
feed-forward, vocabulary), `context` (token positions).
"""

import math
import os
import re

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from llm.config import MeshConfig
from llm.core import UserError, round_up

AXES = ("data", "fsdp", "tensor", "context")
BATCH = ("data", "fsdp")

# Path -> axes of the trailing dimensions, so that stacked layers need no rule of their own. The
# optimizer's moments end in the same paths. The first match counts; no match is an error.
RULES = (
  (
    r"/(count|v|v_row|v_col)(/|$)",
    (),
  ),  # Adafactor: sums of rows and columns, and whole small arrays
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
  (r"lora_a$", ("fsdp", None)),
  (r"lora_b$", (None, "tensor")),
  (r"(pooler|transform)/kernel$", ("fsdp", "tensor")),
  (r"(next_sentence|classifier|span|detection|embedding_project)/kernel$", ("fsdp", None)),
  (r"(out|down|pooler|transform|next_sentence|classifier|span)/bias$", (None,)),
  (r"(detection|embedding_project)/bias$", (None,)),
  (r"norm[a-z_]*/(scale|bias)$", (None,)),
)


def mesh_shape(config: MeshConfig, num_devices: int) -> dict[str, int]:
  """Axis sizes whose product is num_devices; -1 is filled in.

  Raises UserError if the axes do not fill the devices.
  """
  sizes = {axis: getattr(config, axis) for axis in AXES}
  wild = [axis for axis, size in sizes.items() if size == -1]
  if len(wild) > 1 or any(size < 1 and size != -1 for size in sizes.values()):
    raise UserError(f"config.mesh axes must be positive, at most one of them -1, not {sizes}")
  fixed = int(np.prod([size for size in sizes.values() if size != -1]))
  if wild and num_devices % fixed == 0:
    sizes[wild[0]] = num_devices // fixed
  if int(np.prod(list(sizes.values()))) != num_devices:
    raise UserError(
      f"config.mesh {sizes} does not fill the {num_devices} devices: the product of "
      "its axes must be their number (one axis may be -1)"
    )
  if sizes["data"] % config.slices:
    raise UserError(f"config.mesh.slices={config.slices} must divide mesh.data={sizes['data']}")
  return sizes


def make_mesh(config: MeshConfig, devices=None) -> Mesh:
  """The mesh of `config` over `devices` (default: all)."""
  devices = jax.devices() if devices is None else devices
  sizes = mesh_shape(config, len(devices))
  if config.slices > 1:
    from jax.experimental import mesh_utils

    per_slice = {**sizes, "data": sizes["data"] // config.slices}
    grid = mesh_utils.create_hybrid_device_mesh(
      tuple(per_slice.values()), (config.slices, 1, 1, 1), devices=devices
    )
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))
  automatic = (AxisType.Auto,) * len(AXES)
  try:
    return jax.make_mesh(tuple(sizes.values()), AXES, axis_types=automatic, devices=devices)
  except (
    NotImplementedError
  ):  # an axis that is no product of the slice's own: it shares one of them with another
    from jax.experimental import mesh_utils

    grid = mesh_utils.create_device_mesh(
      tuple(sizes.values()), devices, allow_split_physical_axes=True
    )
    return Mesh(grid, AXES, axis_types=automatic)


def parameter_spec(path: str, ndim: int) -> P:
  """How the array of `ndim` dimensions at `path` is split. Raises KeyError where no rule matches."""
  if ndim == 0:
    return P()
  for pattern, axes in RULES:
    if re.search(pattern, path):
      return P(*(None,) * (ndim - len(axes)), *axes)
  raise KeyError(f"no rule of llm/sharding.py matches the parameter {path!r}")


def shardings(tree, mesh: Mesh):
  """A NamedSharding for every leaf of a tree of parameters or optimizer state.

  Raises UserError naming parameter, dimension, axis and size where an axis does not divide.
  """

  def one(key_path, leaf):
    path = jax.tree_util.keystr(key_path, simple=True, separator="/")
    spec = parameter_spec(path, leaf.ndim)
    for dim, axis in enumerate(spec):
      if axis and leaf.shape[dim] % mesh.shape[axis]:
        would_do = [n for n in range(1, 1 + max(8, mesh.size)) if leaf.shape[dim] % n == 0]
        raise UserError(
          f"config.mesh.{axis}={mesh.shape[axis]} does not divide dimension {dim} of "
          f"{path}, which has size {leaf.shape[dim]}; {', '.join(map(str, would_do))} would do"
        )
    return NamedSharding(mesh, spec)

  return jax.tree_util.tree_map_with_path(one, tree)


def device_bytes(leaf) -> int:
  """What a device holds of an array, or of its shape with a sharding."""
  return math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """Rows of a batch over data and fsdp."""
  return NamedSharding(mesh, P(BATCH))


def check_batch(examples: int, rows: int, accum_steps: int, mesh: Mesh):
  """Raises UserError unless the rows of a batch divide over accumulation steps and batch axes.

  examples: config.training.batch_size, which came to so many rows.
  """
  data, fsdp = mesh.shape["data"], mesh.shape["fsdp"]
  together = data * fsdp * accum_steps
  if rows % together:
    come_to = "" if rows == examples else f" examples come to {rows} rows, which"
    # Where examples share rows, these come as multiples of 8 (data/batches.py).
    multiple = together if rows == examples else math.lcm(together, 8 * accum_steps)
    enough = math.ceil(round_up(rows, multiple) * examples / rows)
    raise UserError(
      f"config.training.batch_size={examples}{come_to} must be a multiple of mesh.data x "
      f"mesh.fsdp x optimizer.grad_accum_steps = {data} x {fsdp} x {accum_steps}: set it to "
      f"about {enough}, or take fewer devices or parts"
    )


def constrain(x: jax.Array, *axes) -> jax.Array:
  """Asks the compiler to split x's dimensions over mesh axes; nothing where no mesh is set."""
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty or mesh.size == 1:
    return x
  return jax.lax.with_sharding_constraint(x, P(*axes))


def layer_by_layer(path: str, shape: tuple[int, ...]) -> list[P]:
  """How a stack at `path` goes from its place in the table to whole layers on each device, in steps.

  A product of whole matrices needs no exchange. Each step moves one axis to the dimension of the
  layers: the compiler exchanges what one step moves, and gathers all of it where two move at once.
  An axis that does not divide the layers holds copies of them.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty or mesh.size == 1:
    return []
  spec = list(parameter_spec(path, len(shape)))
  specs, over = [P(*spec)], ()
  for axis in ("fsdp", "tensor", "context", "data"):
    if mesh.shape[axis] == 1:
      continue
    parts = math.prod(mesh.shape[name] for name in (*over, axis))
    over = over if shape[0] % parts else (*over, axis)
    spec = [over, *(None if name == axis else name for name in spec[1:])]
    specs.append(P(*spec))
  return specs


def cpu_devices(config: MeshConfig) -> int:
  """How many devices the CPU becomes: as many as the axes that are set ask for, else one.

  A device uses all cores. Several devices would each keep a replica of the state, and sum
  gradients: on two cores that was slower at every shape of `benchmarks/train_step.py`. More devices
  than cores are a mesh of accelerators, which `make_mesh` refuses here.
  """
  wanted = math.prod(max(getattr(config, axis), 1) for axis in AXES)
  return wanted if wanted <= (os.cpu_count() or 1) else 1
