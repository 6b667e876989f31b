"""Accelerators: what one reaches by its maker's documents, and slices that are not here."""

import dataclasses
import importlib.util
import math
import os
import re

import jax

from llm import sharding
from llm.config import MeshConfig
from llm.core import UserError, first_line


@dataclasses.dataclass(frozen=True)
class Chip:
  """What one JAX device reaches, per second. Of GPUs only the peak is used."""

  # Names of the chip; JAX's device_kind contains one of them.
  kinds: tuple[str, ...]
  # Dense, in bfloat16.
  flops: float
  # Bytes a second.
  memory_bandwidth: float = 0
  # Bytes a second through one link to a neighbour, one way.
  link_bandwidth: float = 0
  # A dimension of the slice closes to a ring where it has at least so many chips.
  torus: tuple[int, ...] = ()
  # Bytes a second to other slices, over the data-centre network.
  network_bandwidth: float = 0


# From Google Cloud's page on each TPU version: the peak, the HBM bandwidth, "bidirectional ICI
# bandwidth per chip" (both ways over all links: 6 of a 3D torus, 4 of a 2D one), and the network
# bandwidth per chip or pod. The network of v4 and v6e: Austin et al. 2025, "How to Scale Your
# Model", part 2. A chip of tpu7x is two devices, so each has half of its figures.
TPUS = {
  "v4": Chip(("TPU v4",), 275e12, 1200e9, 50e9, (4, 4, 4), 6.25e9),
  "v5e": Chip(("TPU v5 lite", "TPU v5e"), 197e12, 819e9, 50e9, (16, 16), 3.125e9),
  "v5p": Chip(("TPU v5", "TPU v5p"), 459e12, 2765e9, 100e9, (4, 4, 4), 6.25e9),
  "v6e": Chip(("TPU v6 lite", "TPU v6e"), 918e12, 1638e9, 100e9, (16, 16), 12.5e9),
  "tpu7x": Chip(("TPU7x",), 1153e12, 3690e9, 50e9, (4, 4, 4), 6.25e9),
}
# From NVIDIA's data sheets: the peak of the tensor cores, dense.
GPUS = (
  Chip(("A100",), 312e12),
  Chip(("H100",), 989e12),
  Chip(("H200",), 989e12),
  Chip(("L4",), 121e12),
  Chip(("L40S",), 362e12),
  Chip(("V100",), 125e12),
)


def chip_of(device_kind: str) -> Chip | None:
  """The chip that a JAX device is; None where the tables lack it."""
  matching_chip = None
  matching_kind = ""
  for chip in (*TPUS.values(), *GPUS):
    for kind in chip.kinds:
      # The longest name wins: "TPU v5" is part of "TPU v5 lite".
      is_named = re.search(rf"\b{re.escape(kind)}\b", device_kind, re.IGNORECASE)
      if is_named and len(kind) > len(matching_kind):
        matching_chip = chip
        matching_kind = kind
  return matching_chip


@dataclasses.dataclass(frozen=True)
class Topology:
  """Devices that a program can be compiled for.

  name: e.g. v5p:8x8x8 or cpu:8. chip: None on CPU.
  """

  name: str
  devices: tuple
  chip: Chip | None


def mesh(config: MeshConfig, topology: Topology) -> jax.sharding.Mesh:
  """The mesh of a config over the devices of a topology. Raises UserError where they do not fit."""
  return sharding.make_mesh(config, list(topology.devices))


def topology(text: str, slices: int) -> Topology:
  """The devices of `slices` slices, none of which need be here.

  text: the value of --topology. Raises UserError where it is not known, and where the TPU compiler
  is missing (libtpu, the extra `tpu`).
  """
  if cpu := re.fullmatch(r"cpu:(\d+)", text):
    return _cpu_topology(text, int(cpu[1]), slices)
  name = _parsed(text)
  version = name.partition(":")[0]
  if importlib.util.find_spec("libtpu") is None:
    raise UserError(
      f"--topology={text} needs the TPU compiler: pip install -e '.[tpu]'; "
      "--topology=cpu:8 needs nothing"
    )
  # There is no TPU whose metadata could be asked for.
  os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
  from jax.experimental import topologies

  options = {}
  if version == "v4":  # one device a chip, as JAX shows real ones
    options["chip_config_name"] = "megacore"
  try:
    description = topologies.get_topology_desc(
      platform="tpu", topology_name=name, num_slices=slices, **options
    )
  except Exception as error:  # the compiler's own refusals have no narrower type
    raise UserError(f"--topology={text}: the compiler refuses {name}: {first_line(error)}")
  return Topology(name, tuple(description.devices), TPUS[version])


def _cpu_topology(text: str, count: int, slices: int) -> Topology:
  if not 1 <= count <= 1024 or slices > 1:
    raise UserError(f"--topology={text}: a CPU topology is one slice of 1 to 1024 devices")
  jax.config.update("jax_num_cpu_devices", count)
  return Topology(text, tuple(jax.devices("cpu")), None)


def _parsed(text: str) -> str:
  """The name of a TPU slice by its shape: v5p-1024 or v5p:8x8x8 -> v5p:8x8x8.

  The number after a dash counts cores. A chip has two where the torus has three dimensions.
  Raises UserError.
  """
  plain = re.sub(r"^v7x", "tpu7x", text.lower().replace("v5litepod", "v5e"))
  match = re.fullmatch(r"(\w*)([:-]?)(.*)", plain, re.S)
  assert match  # every part may be empty: any text matches
  version, separator, size = match.groups()
  if re.match("gpu|cuda|nvidia", version) or chip_of(version) in GPUS:
    raise UserError(
      f"--topology={text}: a program for a GPU is compiled on that GPU alone: start llm.train "
      f"there for a few steps; without hardware there are TPUs ({_examples()}) and cpu:8"
    )
  size_pattern = r"\d+" if separator == "-" else r"[1-9]\d*(x[1-9]\d*)*"
  if version not in TPUS or not re.fullmatch(size_pattern, size):
    raise UserError(
      f"--topology={text} is not known: expected a TPU version and its shape or count, e.g. "
      f"{_examples()}, v6e-256, v5p-1024, or cpu:8"
    )
  if separator == "-":
    return _by_shape(text, version, cores=int(size))
  dimensions = len(TPUS[version].torus)
  if len(size.split("x")) != dimensions:
    raise UserError(
      f"--topology={text}: {version} has {dimensions} dimensions, e.g. {_example(version)}"
    )
  return f"{version}:{size}"


def _by_shape(text: str, version: str, cores: int) -> str:
  """The name by its shape of a slice of so many cores. Raises UserError."""
  dimensions = len(TPUS[version].torus)
  chips = cores // (2 if dimensions == 3 else 1)
  if chips < 1 or chips & (chips - 1):
    raise UserError(
      f"--topology={text}: give the shape, e.g. {_example(version)}, where the count is no power "
      "of two"
    )
  return f"{version}:{'x'.join(map(str, _shape(chips, dimensions)))}"


def _shape(chips: int, dimensions: int) -> tuple[int, ...]:
  """The most even shape of a slice of so many chips, a power of two."""
  sizes = [1] * dimensions
  for number in range(int(math.log2(chips))):
    sizes[-1 - number % dimensions] *= 2
  return tuple(sorted(sizes, key=lambda size: (size == 1, size)))


def _example(version: str) -> str:
  """A slice of a TPU version: v5p:4x4x4."""
  return f"{version}:{'x'.join('4' * len(TPUS[version].torus))}"


def _examples() -> str:
  return ", ".join(map(_example, TPUS))
