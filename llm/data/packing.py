"""Packing: several pieces of documents, or several examples, share a row.

A plan is made once, by best-fit decreasing (Johnson 1974), so any row can be read alone. A greedy
packer over a stream needs rows 0 .. i-1 to give row i, and its rows depend on the number of hosts.
"""

import dataclasses
import json
import pathlib
from typing import Any, Iterator, Mapping, Sequence

import numpy as np

from llm import cache
from llm.data import growing
from llm.data.documents import Documents

GROUP = 2**20  # documents that are packed together
ARRAYS = ("offsets", "starts", "lengths")  # of a plan, a file each


@dataclasses.dataclass(frozen=True)
class Plan:
  """Row i holds the pieces offsets[i] .. offsets[i+1] - 1.

  starts, lengths: of each piece, in the tokens_N of its documents. tokens: of all pieces.
  cut_documents: the number of documents in more than one piece.
  """

  offsets: np.ndarray
  starts: np.ndarray
  lengths: np.ndarray
  tokens: int
  cut_documents: int

  def __len__(self) -> int:
    return len(self.offsets) - 1

  def row(self, i: int) -> list[tuple[int, int]]:
    """The (start, length) of each piece of row i."""
    span = slice(self.offsets[i], self.offsets[i + 1])
    return list(zip(self.starts[span].tolist(), self.lengths[span].tolist()))

  def fill(self, row_tokens: int) -> float:
    """The share of document tokens in rows of `row_tokens` tokens."""
    return self.tokens / (len(self) * row_tokens)


@dataclasses.dataclass(frozen=True)
class PlannedRows:
  """The documents of a plan, in rows of `length` tokens."""

  documents: Documents
  plan: Plan
  length: int

  @property
  def tokens(self) -> int:
    """The tokens of an epoch."""
    return self.plan.tokens

  @property
  def examples(self) -> int:
    """The examples of an epoch: a row is one."""
    return len(self)

  @property
  def note(self) -> str:
    """A line for the header of a run."""
    fill = self.plan.fill(self.length)
    return (
      f"{len(self.documents)} documents in {len(self)} rows, {fill:.1%} full; "
      f"{self.plan.cut_documents} are longer than a row"
    )

  def __len__(self) -> int:
    return len(self.plan)

  def pieces(self, i: int) -> list[np.ndarray]:
    """The ids of each piece of row i."""
    return [self.documents.tokens_N[start : start + size] for start, size in self.plan.row(i)]


def best_fit_decreasing(lengths: np.ndarray, capacity: int) -> list[np.ndarray]:
  """Bins of piece indices. The lengths of a bin sum to at most `capacity`.

  The longest pieces come first, each in the fullest bin with room for it. Pieces of equal length
  are handled together, and so are bins of equal room: the cost grows with the number of distinct
  lengths, not of pieces.
  """
  order = np.argsort(-lengths, kind="stable")
  # bins_with_room[n]: the bins with room for n more tokens. A bin is a list of arrays of indices.
  bins_with_room: list[list[list[np.ndarray]]] = [[] for _ in range(capacity + 1)]
  splits = np.flatnonzero(np.diff(lengths[order])) + 1
  for pieces in np.split(order, splits):
    length = int(lengths[pieces[0]]) if len(pieces) else 0
    left = _fill_open_bins(bins_with_room, pieces, length)
    per_bin = capacity // length if length else 1
    for first in range(0, len(left), per_bin):
      new_bin = left[first : first + per_bin]
      bins_with_room[capacity - length * len(new_bin)].append([new_bin])
  return [np.concatenate(b) for bins in bins_with_room for b in bins]


def _fill_open_bins(
  bins_with_room: list[list[list[np.ndarray]]], pieces: np.ndarray, length: int
) -> np.ndarray:
  """Puts pieces of one length into open bins, the fullest first. Returns the pieces left over."""
  for room in range(length, len(bins_with_room)):
    if not len(pieces):
      break
    bins = bins_with_room[room]
    while bins and len(pieces):
      fitting = pieces[: room // length]
      pieces = pieces[len(fitting) :]
      fullest = bins.pop()
      fullest.append(fitting)
      bins_with_room[room - length * len(fitting)].append(fullest)
  return pieces


def slots(length: int, least: int) -> int:
  """N: the most examples in a row of `length` tokens, where each takes at least `least` tokens."""
  return max(1, length // least)


def into_rows(sizes: np.ndarray, length: int, least: int) -> list[np.ndarray]:
  """The numbers of the examples of each row, at most `slots(length, least)` of them.

  sizes: the tokens of each example. A size below `least` counts as `least`, so a row has a slot for
  every example that its tokens have room for.
  """
  return best_fit_decreasing(np.clip(sizes, least, length), length)


def lay_out(
  examples: Sequence[Mapping[str, Sequence | np.ndarray]], length: int, pad: int
) -> tuple[dict[str, np.ndarray], np.ndarray]:
  """Examples, one after another -> the arrays of a row, and the position where each example begins.

  An example has `tokens`, and other arrays of one value a token. Each example becomes a segment, in
  which positions start at 0. The arrays of the row have T = `length` values, int32 or float32.
  """
  row: dict[str, np.ndarray] = {}
  row["segments"] = np.zeros(length, np.int32)
  row["positions"] = np.zeros(length, np.int32)
  for name, values in examples[0].items():
    is_float = np.asarray(values).dtype.kind == "f"
    row[name] = np.zeros(length, np.float32 if is_float else np.int32)
  row["tokens"][:] = pad
  firsts = []
  start = 0
  for number, example in enumerate(examples, 1):
    stop = start + len(example["tokens"])
    for name, values in example.items():
      row[name][start:stop] = values
    row["segments"][start:stop] = number
    row["positions"][start:stop] = np.arange(stop - start)
    firsts.append(start)
    start = stop
  return row, np.array(firsts, np.int32)


def in_slots(values: Sequence | np.ndarray, count: int, dtype: Any) -> np.ndarray:
  """One value an example, or a masked token -> one a slot, for `count` slots. Empty ones get 0."""
  return np.pad(np.asarray(values, dtype), (0, count - len(values)))


def slots_in_use(count: int, slots: int) -> np.ndarray:
  """The weights of the slots of a row, of which `count` are in use: 1 for each of them, then 0."""
  return in_slots(np.ones(count), slots, np.float32)


def by_example(packed: list[np.ndarray], values_RxN: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Values of R rows with N slots -> (the numbers of their examples, ascending; their values).

  packed: the numbers of the examples of each row. An evaluation with a limit has values of the
  first rows alone. values_RxN may have further dimensions.
  """
  evaluated = packed[: len(values_RxN)]
  numbers = np.concatenate(evaluated)
  values = np.concatenate([values[: len(row)] for values, row in zip(values_RxN, evaluated)])
  order = np.argsort(numbers)
  return numbers[order], values[order]


def _pieces(bounds: np.ndarray, longest: int) -> tuple[np.ndarray, np.ndarray, int]:
  """Cuts documents into pieces of at most `longest` tokens.

  bounds: where each document begins, and the end of the last. Returns the starts and lengths of the
  pieces, and the number of documents that were cut.
  """
  counts = -(-np.diff(bounds) // longest)  # the pieces of each document
  # For each piece: its document, and the number of that document's first piece.
  document = np.repeat(np.arange(len(counts)), counts)
  first_piece = np.repeat(np.cumsum(counts) - counts, counts)
  starts = bounds[document] + (np.arange(len(document)) - first_piece) * longest
  lengths = np.minimum(longest, bounds[document + 1] - starts)
  return starts, lengths, int((counts > 1).sum())


def plan(documents: Documents, row_tokens: int, sizes: np.ndarray, folder: pathlib.Path) -> Plan:
  """The plan that packs documents into rows of `row_tokens` tokens.

  sizes[n]: the tokens of a row that a piece of n tokens takes; 0 leaves such pieces out. The
  longest piece has len(sizes) - 1 tokens. folder: the cache, which keeps the plan.

  Documents are packed in groups of GROUP, so that memory is bounded: the plan is written group by
  group, and mapped.
  """
  key = cache.digest(
    "best fit 3", documents.digest, str(row_tokens), np.asarray(sizes, "<i8").tobytes()
  )
  path = cache.kept(
    folder / "plans" / key[:32],
    lambda scratch: _write_plan(documents.bounds(), row_tokens, sizes, scratch),
  )
  totals = json.loads((path / "totals.json").read_text())
  offsets, starts, lengths = (growing.mapped(path / f"{name}.npy") for name in ARRAYS)
  return Plan(offsets, starts, lengths, totals["tokens"], totals["cut_documents"])


def _write_plan(
  bounds: np.ndarray, row_tokens: int, sizes: np.ndarray, folder: pathlib.Path
) -> None:
  """Writes the arrays and the totals of a plan into a folder."""
  tokens = cut_documents = count = 0
  with (
    growing.Growing(folder / "offsets.npy") as offsets,
    growing.Growing(folder / "starts.npy") as all_starts,
    growing.Growing(folder / "lengths.npy", "<i4") as all_lengths,
  ):
    offsets.add([0])
    for group in groups(len(bounds) - 1):
      starts, lengths, cut = _pieces(bounds[group.start : group.stop + 1], len(sizes) - 1)
      packed = sizes[lengths] > 0
      starts = starts[packed]
      lengths = lengths[packed]
      bins = best_fit_decreasing(sizes[lengths], row_tokens)
      if not bins:
        continue
      order = np.concatenate(bins)
      all_starts.add(starts[order])
      all_lengths.add(lengths[order])
      offsets.add(count + np.cumsum([len(b) for b in bins]))
      count += len(order)
      tokens += int(lengths.sum())
      cut_documents += cut
  totals = {"tokens": tokens, "cut_documents": cut_documents}
  (folder / "totals.json").write_text(json.dumps(totals))


def groups(count: int) -> Iterator[range]:
  """The numbers of `count` documents in groups of GROUP."""
  for start in range(0, count, GROUP):
    yield range(start, min(start + GROUP, count))
