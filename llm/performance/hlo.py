"""What a compiled program sends between its devices, read from its text."""

import collections
import dataclasses
import math
import re

import numpy as np
from jax.sharding import Mesh

# Bytes of a number, by HLO's name of its type.
BYTES = {
  "pred": 1,
  "s8": 1,
  "u8": 1,
  "s16": 2,
  "u16": 2,
  "bf16": 2,
  "f16": 2,
  "s32": 4,
  "u32": 4,
  "f32": 4,
  "s64": 8,
  "u64": 8,
  "f64": 8,
}
# Opcodes of the exchanges.
KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute", "send")
COMPUTATION = re.compile(r"(?P<entry>ENTRY )?%?(?P<name>[\w.-]+)")
INSTRUCTION = re.compile(
  r"^\s+(?:ROOT )?%?(?P<name>[\w.-]+) = (?P<shape>\(.*?\)|\S+) "
  r"(?P<opcode>[\w-]+)\((?P<arguments>.*)$"
)
# Devices as an array of ids that is reshaped and transposed: [2,4]<=[8], [4,2]<=[2,4]T(1,0).
IOTA_GROUPS = re.compile(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
# Devices as axes of a mesh: mesh['a'=2,'b'=4] {'a'}. Its devices are in the order of their ids, or
# in that of a list, device_ids=(0,2,1,3), or of a transposed array, device_ids=([4,2]T(1,0)).
MESH_GROUPS = re.compile(
  r"replica_groups=mesh\[(?P<axes>.*?)\]"
  r"(?:, device_ids=\((?:(?P<ids>[\d,]+)|\[(?P<dims>[\d,]+)\](?:T\((?P<order>[\d,]+)\))?)\))?"
  r" \{(?P<group>.*?)\}"
)

# An instruction: its name, shape, opcode and arguments (its operands, a bracket, its attributes).
Instruction = dict[str, str]
Computations = dict[str, list[Instruction]]


@dataclasses.dataclass(frozen=True)
class Collective:
  """One exchange between devices.

  kind: one of KINDS. axes: of the mesh, or ("slices",). times: how often a step does it. sent:
  bytes that a device sends each time, by the ring algorithms. shape: of the whole array, which is
  the result of a gather and the input of a reduction. source: op_name, where in the model it comes
  from.
  """

  kind: str
  axes: tuple[str, ...]
  times: int
  sent: float
  shape: str
  source: str


def collectives(text: str, mesh: Mesh) -> list[Collective]:
  """Every exchange of a compiled program.

  The compiler may copy an exchange or write it in parts. All of them have one channel, and count
  once.
  """
  computations, entry = _computations(text)
  times = _times(computations, entry)
  by_channel: dict[str | tuple[str, str], Collective] = {}
  for name, instructions in computations.items():
    shapes = {instruction["name"]: instruction["shape"] for instruction in instructions}
    for instruction in instructions:
      if not times[name] or not _is_exchange(instruction):
        continue
      exchange = _exchange(instruction, name, times[name], shapes, mesh)
      channel = re.search(r"channel_id=(\d+)", instruction["arguments"])
      key = channel[1] if channel else (name, instruction["name"])
      by_channel[key] = _larger(by_channel.get(key, exchange), exchange)
  return list(by_channel.values())


def _larger(a: Collective, b: Collective) -> Collective:
  return b if (b.times, b.sent) > (a.times, a.sent) else a


def _opcode(instruction: Instruction) -> str:
  """The opcode; an exchange that is only started here counts as done here."""
  return instruction["opcode"].removesuffix("-start")


def _is_exchange(instruction: Instruction) -> bool:
  kind = _opcode(instruction)
  if kind not in KINDS:
    return False
  return kind == "send" or len(set(_group(instruction["arguments"]))) > 1


def _exchange(
  instruction: Instruction, computation: str, times: int, shapes: dict[str, str], mesh: Mesh
) -> Collective:
  """The exchange that an instruction does.

  computation: the name of the one that it stands in. shapes: by name, of the instructions there.
  """
  kind = _opcode(instruction)
  shape = instruction["shape"]
  if computation.startswith("all-reduce-scatter"):
    # A sum, of which each device then keeps its part.
    kind = "reduce-scatter"
  elif kind == "reduce-scatter":
    # Its input is larger than its result.
    operand = re.match(r"%?([\w.-]+)", instruction["arguments"])
    shape = shapes.get(operand[1], shape) if operand else shape
  group = _group(instruction["arguments"])
  source = re.search(r'op_name="(.*?)"', instruction["arguments"])
  return Collective(
    kind=kind,
    axes=_axes(group, mesh) if group else ("slices",),
    times=times,
    sent=_sent(kind, _bytes(shape), max(len(group), 1)),
    shape=re.sub(r"\{.*?\}", "", shape),
    source=source[1] if source else "",
  )


def _computations(text: str) -> tuple[Computations, str]:
  """The instructions of each computation by its name, and the name of the entry."""
  computations: Computations = {}
  entry = ""
  instructions = None
  for line in text.splitlines():
    if line.rstrip().endswith("{") and not line.startswith(" ") and "->" in line:
      header = COMPUTATION.match(line)
      assert header, line
      instructions = computations[header["name"]] = []
      if header["entry"]:
        entry = header["name"]
    elif instructions is not None and (instruction := INSTRUCTION.match(line)):
      instructions.append(instruction.groupdict())
  return computations, entry


def _times(computations: Computations, entry: str) -> collections.Counter[str]:
  """How often a step runs each computation."""
  times = collections.Counter()

  def visit(name: str, count: int):
    times[name] += count
    for instruction in computations[name]:
      executions = count * _executions(computations, instruction)
      for inner in _called(instruction):
        if inner in computations:
          visit(inner, executions)

  visit(entry, 1)
  return times


def _called(instruction: Instruction) -> list[str]:
  """The computations that an instruction runs, without the condition of a loop."""
  arguments = instruction["arguments"]
  names = re.findall(r"(?:calls|body|to_apply)=%?([\w.-]+)", arguments)
  for branches in re.findall(r"branch_computations=\{(.*?)\}", arguments):
    names += re.findall(r"%([\w.-]+)", branches)
  return names


def _executions(computations: Computations, instruction: Instruction) -> int:
  """How often an instruction runs what it calls: several times where it is a loop."""
  arguments = instruction["arguments"]
  if known := re.search(r'known_trip_count":\{"n":"(\d+)"', arguments):
    return int(known[1])
  condition = re.search(r"condition=%?([\w.-]+)", arguments)
  body = re.search(r"body=%?([\w.-]+)", arguments)
  if condition and body:
    return _trips(computations, condition[1], body[1])
  return 1


def _trips(computations: Computations, condition: str, body: str) -> int:
  """How often a loop runs that counts from 0 to a constant."""
  limit = max(_constants(computations, condition).values(), default=1)
  return -(-limit // _increment(computations, condition, body))


def _increment(computations: Computations, condition: str, body: str) -> int:
  """What a loop adds to its counter: 1, or more where the compiler unrolled it.

  It is 1 too where the addition cannot be identified.
  """
  reads = [i for i in computations[condition] if i["opcode"] == "get-tuple-element"]
  index = re.search(r"index=(\d+)", reads[0]["arguments"]) if len(reads) == 1 else None
  results = _operands(computations[body][-1])
  if not index or int(index[1]) >= len(results):
    return 1
  counter = results[int(index[1])]
  constants = _constants(computations, body)
  increments = [1]
  for instruction in computations[body]:
    if instruction["name"] == counter and instruction["opcode"] == "add":
      increments += [constants.get(operand, 1) for operand in _operands(instruction)]
  return max(increments)


def _constants(computations: Computations, name: str) -> dict[str, int]:
  """The whole numbers in a computation and in those that it calls, by the name of the constant."""
  constants = {}
  for instruction in computations[name]:
    number = re.match(r"(\d+)\)", instruction["arguments"])
    if number and instruction["opcode"] == "constant":
      constants[instruction["name"]] = int(number[1])
    for called in re.findall(r"calls=%?([\w.-]+)", instruction["arguments"]):
      constants |= _constants(computations, called)
  return constants


def _operands(instruction: Instruction) -> list[str]:
  return re.findall(r"%([\w.-]+)", instruction["arguments"].partition(")")[0])


def _bytes(shape: str) -> int:
  """Bytes of the largest array in a shape.

  The shape of an exchange that is started is a tuple of its input and its output.
  """
  sizes = [
    BYTES.get(kind, 4) * math.prod(map(int, filter(None, dims.split(","))))
    for kind, dims in re.findall(r"(\w+)\[([\d,]*)\]", shape)
  ]
  return max(sizes, default=0)


def _sent(kind: str, size: int, devices: int) -> float:
  """Bytes that each device sends: around a ring, everything but its own part.

  An all-reduce sends twice as much: the sums go around too.
  """
  if kind in ("collective-permute", "send"):
    return size
  rounds = 2 if kind == "all-reduce" else 1
  return size * (devices - 1) / devices * rounds


def _group(arguments: str) -> list[int]:
  """The devices of the first group of an exchange, however HLO writes it; [] where it has none."""
  if pairs := re.search(r"source_target_pairs=\{\{(\d+),(\d+)\}", arguments):
    return [int(pairs[1]), int(pairs[2])]
  if listed := re.search(r"replica_groups=\{\{([\d,]+)\}", arguments):
    return _numbers(listed[1])
  if iota := IOTA_GROUPS.search(arguments):
    groups = _iota(iota[2], iota[3]).reshape(_numbers(iota[1]))
    return groups[0].tolist()
  if by_axes := MESH_GROUPS.search(arguments):
    sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", by_axes["axes"])}
    if by_axes["ids"]:
      ids = np.array(_numbers(by_axes["ids"]))
    else:
      ids = _iota(by_axes["dims"] or str(math.prod(sizes.values())), by_axes["order"])
    group_axes = re.findall(r"'(\w+)'", by_axes["group"])
    first_group = tuple(slice(None) if name in group_axes else 0 for name in sizes)
    return ids.reshape(list(sizes.values()))[first_group].ravel().tolist()
  return []


def _numbers(text: str) -> list[int]:
  """Text like 1,2 -> [1, 2]."""
  return [int(number) for number in text.split(",")]


def _iota(dims: str, order: str | None) -> np.ndarray:
  """0, 1, .. in an array of shape `dims`, its axes then transposed to `order`."""
  ids = np.arange(math.prod(_numbers(dims))).reshape(_numbers(dims))
  return ids.transpose(_numbers(order)) if order else ids


def _axes(group: list[int], mesh: Mesh) -> tuple[str, ...]:
  """The axes of the mesh along which the devices of a group differ."""
  positions = np.array([np.unravel_index(device, mesh.devices.shape) for device in group])
  return tuple(
    axis for axis, column in zip(mesh.axis_names, positions.T) if len(set(column.tolist())) > 1
  )
