"""What a compiled program sends between its devices, read from its text."""

import collections
import dataclasses
import math
import re

import numpy as np
from jax.sharding import Mesh

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
KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute", "send")
INSTRUCTION = re.compile(
  r"^\s+(?:ROOT )?%?(?P<name>[\w.-]+) = (?P<shape>\(.*?\)|\S+) (?P<opcode>[\w-]+)\((?P<rest>.*)$"
)


@dataclasses.dataclass(frozen=True)
class Collective:
  """One exchange: how often a step does it, over which mesh axes, and what a device then sends."""

  kind: str
  axes: tuple[str, ...]
  times: int
  sent: float  # bytes a device sends each time, by the ring algorithms
  shape: str  # of the whole: what a gather gives, what a reduction takes
  source: str  # op_name: where it comes from


def _computations(text: str) -> tuple[dict[str, list[dict]], str]:
  """name -> instructions, and the name of the entry."""
  found, entry, body = {}, "", None
  for line in text.splitlines():
    if line.rstrip().endswith("{") and not line.startswith(" ") and "->" in line:
      name = re.match(r"(ENTRY )?%?([\w.-]+)", line)
      body = found[name[2]] = []
      entry = name[2] if name[1] else entry
    elif body is not None and (match := INSTRUCTION.match(line)):
      body.append(match.groupdict())
  return found, entry


def _constants(computations, name: str) -> dict[str, int]:
  """The whole numbers of a computation and of those that it calls."""
  found = {}
  for instruction in computations[name]:
    if instruction["opcode"] == "constant" and (
      number := re.match(r"(\d+)\)", instruction["rest"])
    ):
      found[instruction["name"]] = int(number[1])
    for other in re.findall(r"calls=%?([\w.-]+)", instruction["rest"]):
      found |= _constants(computations, other)
  return found


def _operands(instruction: dict) -> list[str]:
  return re.findall(r"%([\w.-]+)", instruction["rest"].partition(")")[0])


def _step(computations, condition: str, body: str) -> int:
  """What a loop adds to its counter: one, where nothing else is found, or several where the compiler unrolled it."""
  read = [i for i in computations[condition] if i["opcode"] == "get-tuple-element"]
  place = len(read) == 1 and re.search(r"index=(\d+)", read[0]["rest"])
  results = _operands(computations[body][-1])
  if not place or int(place[1]) >= len(results):
    return 1
  name, constants = results[int(place[1])], _constants(computations, body)
  added = [i for i in computations[body] if i["name"] == name and i["opcode"] == "add"]
  return max([1, *(constants.get(operand, 1) for i in added for operand in _operands(i))])


def _trips(computations, condition: str, body: str) -> int:
  """How often a loop runs that counts from 0 to a constant."""
  limit = max(_constants(computations, condition).values(), default=1)
  return -(-limit // _step(computations, condition, body))


def _times(computations, entry: str) -> dict[str, int]:
  """How often a step runs each computation."""
  times = collections.Counter()

  def visit(name: str, count: int):
    times[name] += count
    for instruction in computations[name]:
      rest = instruction["rest"]
      inner = re.findall(r"(?:calls|body|to_apply)=%?([\w.-]+)", rest)
      inner += re.findall(
        r"%([\w.-]+)", "".join(re.findall(r"branch_computations=\{(.*?)\}", rest))
      )
      condition = re.search(r"condition=%?([\w.-]+)", rest)
      body = re.search(r"body=%?([\w.-]+)", rest)
      known = re.search(r'known_trip_count":\{"n":"(\d+)"', rest)
      trips = (
        int(known[1]) if known else _trips(computations, condition[1], body[1]) if condition else 1
      )
      for other in inner:
        if other in computations:
          visit(other, count * trips)

  visit(entry, 1)
  return times


def _bytes(shape: str) -> int:
  """Of the largest array in a shape: a started exchange has its input and its output in a tuple."""
  sizes = [
    BYTES.get(kind, 4) * math.prod(map(int, filter(None, dims.split(","))))
    for kind, dims in re.findall(r"(\w+)\[([\d,]*)\]", shape)
  ]
  return max(sizes, default=0)


def _numbers(text: str) -> list[int]:
  return [int(number) for number in text.split(",")]


def _iota(dims: str, order: str | None) -> np.ndarray:
  """0, 1, .. in an array of `dims`, transposed."""
  ids = np.arange(math.prod(_numbers(dims))).reshape(_numbers(dims))
  return ids.transpose(_numbers(order)) if order else ids


def _group(rest: str) -> list[int]:
  """The devices of the first group of an exchange, in any of the three ways that they are written."""
  if pairs := re.search(r"source_target_pairs=\{\{(\d+),(\d+)\}", rest):
    return [int(pairs[1]), int(pairs[2])]
  if listed := re.search(r"replica_groups=\{\{([\d,]+)\}", rest):
    return list(map(int, listed[1].split(",")))
  if iota := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", rest):
    return _iota(iota[2], iota[3]).reshape(_numbers(iota[1]))[0].tolist()
  if named := re.search(
    r"replica_groups=mesh\[(.*?)\](?:, device_ids=\((?:([\d,]+)|\[([\d,]+)\](?:T\(([\d,]+)\))?)\))?"
    r" \{(.*?)\}",
    rest,
  ):
    axes, ids, dims, order, taken = named.groups()
    sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", axes)}
    ids = _numbers(ids) if ids else _iota(dims or str(math.prod(sizes.values())), order)
    ids = np.reshape(ids, list(sizes.values()))
    taken = re.findall(r"'(\w+)'", taken)
    return ids[tuple(slice(None) if name in taken else 0 for name in sizes)].ravel().tolist()
  return []


def _axes(group: list[int], mesh: Mesh) -> tuple[str, ...]:
  """The axes along which the devices of a group differ."""
  places = np.array([np.unravel_index(device, mesh.devices.shape) for device in group])
  return tuple(
    axis for axis, column in zip(mesh.axis_names, places.T) if len(set(column.tolist())) > 1
  )


def _sent(kind: str, size: int, devices: int) -> float:
  """Bytes that each device sends: around a ring, all but its own part; twice where a sum goes back to all."""
  if kind in ("collective-permute", "send"):
    return size
  return size * (devices - 1) / devices * (2 if kind == "all-reduce" else 1)


def collectives(text: str, mesh: Mesh) -> list[Collective]:
  """Every exchange of a compiled program. One that the compiler wrote in pieces, or copied, counts once by its channel."""
  computations, entry = _computations(text)
  times, found = _times(computations, entry), {}
  for name, instructions in computations.items():
    shapes = {i["name"]: i["shape"] for i in instructions}
    for instruction in instructions:
      kind, rest = instruction["opcode"].removesuffix("-start"), instruction["rest"]
      if kind not in KINDS or not times[name]:
        continue
      group = _group(rest)
      if kind != "send" and len(set(group)) < 2:
        continue
      shape = instruction["shape"]
      if name.startswith("all-reduce-scatter"):  # a sum of which each device then keeps its part
        kind = "reduce-scatter"
      elif kind == "reduce-scatter":  # its input is larger than what it gives
        operand = re.match(r"%?([\w.-]+)", rest)
        shape = shapes.get(operand[1], shape) if operand else shape
      channel = re.search(r"channel_id=(\d+)", rest)
      key = channel[1] if channel else (name, instruction["name"])
      source = re.search(r'op_name="(.*?)"', rest)
      one = Collective(
        kind,
        _axes(group, mesh) if group else ("slices",),
        times[name],
        _sent(kind, _bytes(shape), max(len(group), 1)),
        re.sub(r"\{.*?\}", "", shape),
        source[1] if source else "",
      )
      found[key] = max(found.get(key, one), one, key=lambda c: (c.times, c.sent))
  return list(found.values())
