"""Accelerators: what one can do by its maker's documents, and slices of them that are not here."""

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

  kinds: tuple[str, ...]  # one of them is in jax's device_kind
  flops: float  # dense, bfloat16
  memory_bandwidth: float = 0  # bytes
  link_bandwidth: float = 0  # bytes through one link to a neighbour, one way
  torus: tuple[int, ...] = ()  # dimensions of at least these sizes close to a ring
  network_bandwidth: float = 0  # bytes to other slices, over the data-centre network


# Google Cloud's pages on each TPU version: peak, HBM bandwidth, "bidirectional ICI bandwidth per chip" (both ways over all
# links: 6 of a 3D torus, 4 of a 2D one), network bandwidth per chip or pod. v4 and v6e's network: Austin et al. 2025, "How to
# Scale Your Model", part 2. tpu7x: two devices a chip, half of its figures each.
TPUS = {
  "v4": Chip(("TPU v4",), 275e12, 1200e9, 50e9, (4, 4, 4), 6.25e9),
  "v5e": Chip(("TPU v5 lite", "TPU v5e"), 197e12, 819e9, 50e9, (16, 16), 3.125e9),
  "v5p": Chip(("TPU v5", "TPU v5p"), 459e12, 2765e9, 100e9, (4, 4, 4), 6.25e9),
  "v6e": Chip(("TPU v6 lite", "TPU v6e"), 918e12, 1638e9, 100e9, (16, 16), 12.5e9),
  "tpu7x": Chip(("TPU7x",), 1153e12, 3690e9, 50e9, (4, 4, 4), 6.25e9),
}
# NVIDIA's data sheets: dense tensor-core peak.
GPUS = tuple(
  Chip((kind,), flops)
  for kind, flops in (
    ("A100", 312e12),
    ("H100", 989e12),
    ("H200", 989e12),
    ("L4", 121e12),
    ("V100", 125e12),
  )
)


def chip_of(device_kind: str) -> Chip | None:
  """The chip that a device is, None where the tables lack it."""
  # The longest name wins: "TPU v5" is part of "TPU v5 lite".
  found = [
    (len(kind), chip)
    for chip in (*TPUS.values(), *GPUS)
    for kind in chip.kinds
    if kind.lower() in device_kind.lower()
  ]
  return max(found, key=lambda pair: pair[0], default=(0, None))[1]


def _shape(chips: int, dimensions: int) -> tuple[int, ...]:
  """The shape of a slice of so many chips, a power of two: as even as it gets."""
  sizes = [1] * dimensions
  for number in range(int(math.log2(chips))):
    sizes[-1 - number % dimensions] *= 2
  return tuple(sorted(sizes, key=lambda size: (size == 1, size)))


@dataclasses.dataclass(frozen=True)
class Topology:
  """Devices that a program can be compiled for."""

  name: str  # v5p:8x8x8, cpu:8
  devices: tuple
  chip: Chip | None  # None: CPU


def mesh(config: MeshConfig, topology: Topology) -> jax.sharding.Mesh:
  """The mesh of a config over the devices of a topology."""
  return sharding.make_mesh(config, list(topology.devices))


def _names() -> str:
  return ", ".join(f"{name}:{'x'.join('4' * len(chip.torus))}" for name, chip in TPUS.items())


def _parsed(text: str) -> str:
  """v5p-1024 or v5p:8x8x8 -> v5p:8x8x8. After a dash stand cores, which are two a chip where the torus has three dimensions.

  Raises UserError.
  """
  plain = re.sub(r"^v7x", "tpu7x", text.lower().replace("v5litepod", "v5e"))
  version, mark, size = re.fullmatch(r"(\w*)([:-]?)(.*)", plain, re.S).groups()
  if re.match("gpu|cuda|nvidia", version) or chip_of(version) in GPUS:
    raise UserError(
      f"--topology={text}: a program for a GPU is compiled on that GPU alone: start llm.train there for a few steps; "
      f"without hardware there are TPUs ({_names()}) and cpu:8"
    )
  if version not in TPUS or not re.fullmatch(
    r"\d+" if mark == "-" else r"[1-9]\d*(x[1-9]\d*)*", size
  ):
    raise UserError(
      f"--topology={text} is not known: expected a TPU version and its shape or count, e.g. {_names()}, v6e-256, "
      "v5p-1024, or cpu:8"
    )
  dimensions = len(TPUS[version].torus)
  if mark == "-":
    chips = int(size) // (2 if dimensions == 3 else 1)
    if chips < 1 or chips & (chips - 1):
      raise UserError(
        f"--topology={text}: give the shape, e.g. {version}:{'x'.join('4' * dimensions)}, where the count is no power of two"
      )
    return f"{version}:{'x'.join(map(str, _shape(chips, dimensions)))}"
  if len(size.split("x")) != dimensions:
    raise UserError(
      f"--topology={text}: {version} has {dimensions} dimensions, e.g. {version}:{'x'.join('4' * dimensions)}"
    )
  return f"{version}:{size}"


def topology(text: str, slices: int) -> Topology:
  """The devices of `slices` slices. Nothing of them need be here; TPUs need libtpu (the extra `tpu`). Raises UserError."""
  if match := re.fullmatch(r"cpu:(\d+)", text):
    count = int(match[1])
    if not 1 <= count <= 1024 or slices > 1:
      raise UserError(f"--topology={text}: a CPU topology is one slice of 1 to 1024 devices")
    jax.config.update("jax_num_cpu_devices", count)
    return Topology(text, tuple(jax.devices("cpu")), None)
  name = _parsed(text)
  if importlib.util.find_spec("libtpu") is None:
    raise UserError(
      f"--topology={text} needs the TPU compiler: pip install -e '.[tpu]'; --topology=cpu:8 needs nothing"
    )
  os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # there is no TPU to be asked what it is
  from jax.experimental import topologies

  more = (
    {"chip_config_name": "megacore"} if name.startswith("v4") else {}
  )  # one device a chip, as on the real ones
  try:
    found = topologies.get_topology_desc(
      platform="tpu", topology_name=name, num_slices=slices, **more
    )
  except Exception as error:  # the compiler's own refusals have no narrower type
    raise UserError(f"--topology={text}: the compiler refuses {name}: {first_line(error)}")
  return Topology(name, tuple(found.devices), TPUS[name.partition(":")[0]])
