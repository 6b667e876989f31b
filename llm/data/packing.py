"""Packing: which pieces of documents, or which examples, share a row. Planned once, so that any row
can be read alone.

Best-fit decreasing (Johnson 1974) over pieces of documents. Greedy packers over a
stream cannot give row i without rows 0 .. i-1, nor the same rows to another number of hosts.
"""

import dataclasses
import pathlib
from typing import Mapping, Sequence

import numpy as np

from llm.data import cache
from llm.data.documents import Documents


@dataclasses.dataclass(frozen=True)
class Plan:
  """Row i holds the pieces offsets[i] .. offsets[i+1]; a piece is (start, length) in tokens_N."""

  offsets: np.ndarray
  starts: np.ndarray
  lengths: np.ndarray
  cut_documents: int  # documents that did not fit one piece

  def __len__(self) -> int:
    return len(self.offsets) - 1

  def row(self, i: int) -> list[tuple[int, int]]:
    """(start, length) of the pieces of row i."""
    span = slice(self.offsets[i], self.offsets[i + 1])
    return list(zip(self.starts[span].tolist(), self.lengths[span].tolist()))

  def fill(self, row_tokens: int) -> float:
    """Share of row_tokens x rows that are document tokens."""
    return float(self.lengths.sum()) / (len(self) * row_tokens)


@dataclasses.dataclass(frozen=True)
class PlannedRows:
  """Rows of a packing plan: the pieces of documents that share each, in rows of `length` tokens."""

  documents: Documents
  plan: Plan
  length: int

  @property
  def tokens(self) -> int:
    return int(self.plan.lengths.sum())

  @property
  def examples(self) -> int:
    return len(self)

  @property
  def note(self) -> str:
    return (
      f"{len(self.documents)} documents in {len(self)} rows, {self.plan.fill(self.length):.1%} full; "
      f"{self.plan.cut_documents} are longer than a row"
    )

  def __len__(self) -> int:
    return len(self.plan)

  def pieces(self, i: int) -> list[np.ndarray]:
    """The ids of each piece of row i."""
    return [self.documents.tokens_N[start : start + size] for start, size in self.plan.row(i)]


def best_fit_decreasing(lengths: np.ndarray, capacity: int) -> list[np.ndarray]:
  """Bins of piece indices, each bin's lengths summing to at most `capacity`.

  Longest pieces first, each into the fullest bin that still takes it; pieces of one length and bins
  of one room are handled together, so the cost is in distinct lengths, not pieces.
  """
  order = np.argsort(-lengths, kind="stable")
  rooms: list[list] = [
    [] for _ in range(capacity + 1)
  ]  # room -> bins, a bin being a list of arrays
  splits = np.flatnonzero(np.diff(lengths[order])) + 1
  for group in np.split(order, splits):
    length = int(lengths[group[0]]) if len(group) else 0
    waiting = group
    for room in range(length, capacity + 1):
      if not len(waiting):
        break
      bins = rooms[room]
      while bins and len(waiting):
        fits = room // length
        chosen = bins.pop()
        chosen.append(waiting[:fits])
        rooms[room - length * len(waiting[:fits])].append(chosen)
        waiting = waiting[fits:]
    per_bin = capacity // length if length else 1
    for first in range(0, len(waiting), per_bin):
      pieces = waiting[first : first + per_bin]
      rooms[capacity - length * len(pieces)].append([pieces])
  return [np.concatenate(b) for room in rooms for b in room]


def slots(length: int, least: int) -> int:
  """N: examples that a row of `length` tokens has room for where each takes `least` at least."""
  return max(1, length // least)


def into_rows(sizes: np.ndarray, length: int, least: int) -> list[np.ndarray]:
  """Numbers of the examples that share each row, at most `slots(length, least)` of them.

  sizes: tokens of each example. One that is shorter than `least` takes that much, so no row runs
  out of slots before it runs out of tokens.
  """
  return best_fit_decreasing(np.clip(sizes, least, length), length)


def lay_out(
  examples: Sequence[Mapping[str, Sequence]], length: int, pad: int
) -> tuple[dict[str, np.ndarray], np.ndarray]:
  """Examples after one another -> the arrays of a row, T long each, and where each example begins.

  An example is a dict of `tokens` and what else goes with each token. Each becomes a segment of its
  own, and positions restart in it.
  """
  row = {name: np.zeros(length, np.int32) for name in ("segments", "positions")}
  for name, values in examples[0].items():
    real = np.asarray(values).dtype.kind == "f"
    row[name] = np.zeros(length, np.float32 if real else np.int32)
  row["tokens"][:] = pad
  firsts, at = [], 0
  for number, example in enumerate(examples, 1):
    here = slice(at, at + len(example["tokens"]))
    for name, values in example.items():
      row[name][here] = values
    row["segments"][here] = number
    row["positions"][here] = np.arange(here.stop - at)
    firsts.append(at)
    at = here.stop
  return row, np.array(firsts, np.int32)


def in_slots(values: Sequence | np.ndarray, count: int, dtype: type) -> np.ndarray:
  """A value for each example of a row -> one for each of `count` slots, 0 in those left empty."""
  return np.pad(np.asarray(values, dtype), (0, count - len(values)))


def slots_in_use(count: int, slots: int) -> np.ndarray:
  """The weights of the slots of a row that has `count` examples."""
  return in_slots(np.ones(count), slots, np.float32)


def by_example(packed: list[np.ndarray], values_RxN: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Values by row and slot -> (numbers of the examples of these R rows, ascending; their values).

  An evaluation that was cut short has fewer rows than were packed. N may have dimensions after it.
  """
  seen = packed[: len(values_RxN)]
  numbers = np.concatenate(seen)
  values = np.concatenate([values[: len(row)] for values, row in zip(values_RxN, seen)])
  order = np.argsort(numbers)
  return numbers[order], values[order]


def _pieces(documents: Documents, piece: int) -> tuple[np.ndarray, np.ndarray, int]:
  """Documents cut into pieces of at most `piece` tokens: starts, lengths, documents cut."""
  bounds = documents.bounds()
  sizes = np.diff(bounds)
  counts = -(-sizes // piece)
  which = np.repeat(np.arange(len(sizes)), counts)
  nth = np.arange(len(which)) - np.repeat(np.cumsum(counts) - counts, counts)
  starts = bounds[which] + nth * piece
  return starts, np.minimum(piece, bounds[which + 1] - starts), int((counts > 1).sum())


def plan(documents: Documents, row_tokens: int, sizes: np.ndarray, folder: pathlib.Path) -> Plan:
  """The packing of documents into rows of row_tokens.

  sizes[n]: what a piece of n tokens takes of a row, up to the longest piece; 0 where such pieces are left out.
  Kept in `folder` beside the token cache.
  """

  def write(scratch):
    starts, lengths, cut = _pieces(documents, len(sizes) - 1)
    taken = sizes[lengths] > 0
    starts, lengths = starts[taken], lengths[taken]
    bins = best_fit_decreasing(sizes[lengths], row_tokens)
    order = np.concatenate(bins)
    np.savez(
      scratch / "plan.npz",
      starts=starts[order],
      lengths=lengths[order],
      cut=cut,
      offsets=np.cumsum([0, *map(len, bins)]),
    )

  key = cache.digest(
    "best fit 2", documents.digest, str(row_tokens), np.asarray(sizes, "<i8").tobytes()
  )
  with np.load(cache.made_once(folder / "plans" / key[:32], write) / "plan.npz") as saved:
    return Plan(saved["offsets"], saved["starts"], saved["lengths"], int(saved["cut"]))
