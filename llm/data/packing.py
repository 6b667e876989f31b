"""Packing: which pieces of documents share a row. Planned once, so that any row can be read alone.

Best-fit decreasing (Johnson 1974) over pieces of documents. Greedy packers over a
stream cannot give row i without rows 0 .. i-1, nor the same rows to another number of hosts.
"""
import dataclasses
import pathlib

import numpy as np

from llm.data import cache
from llm.data.documents import Documents


@dataclasses.dataclass(frozen=True)
class Plan:
  """Row i holds the pieces offsets[i] .. offsets[i+1]; a piece is (start, length) in tokens_N."""
  offsets: np.ndarray
  starts: np.ndarray
  lengths: np.ndarray
  cut_documents: int     # documents that did not fit one piece

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
  """Rows of a packing plan: the pieces of documents that share each."""
  documents: Documents
  plan: Plan

  @property
  def tokens(self) -> int:
    return int(self.plan.lengths.sum())

  def __len__(self) -> int:
    return len(self.plan)

  def __getitem__(self, i: int):
    return self, [self.documents.tokens_N[start:start + size] for start, size in self.plan.row(i)]


def best_fit_decreasing(lengths: np.ndarray, capacity: int) -> list[np.ndarray]:
  """Bins of piece indices, each bin's lengths summing to at most `capacity`.

  Longest pieces first, each into the fullest bin that still takes it; pieces of one length and bins
  of one room are handled together, so the cost is in distinct lengths, not pieces.
  """
  order = np.argsort(-lengths, kind="stable")
  rooms: list[list] = [[] for _ in range(capacity + 1)]   # room -> bins, a bin being a list of arrays
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
      pieces = waiting[first:first + per_bin]
      rooms[capacity - length * len(pieces)].append([pieces])
  return [np.concatenate(b) for room in rooms for b in room]


def at_most(count: int, bins: list[np.ndarray]) -> list[np.ndarray]:
  """The bins, those with more than `count` pieces split."""
  return [part for one in bins for part in np.split(one, range(count, len(one), count))]


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
    np.savez(scratch / "plan.npz", starts=starts[order], lengths=lengths[order], cut=cut,
             offsets=np.cumsum([0, *map(len, bins)]))
  key = cache.digest("best fit 2", documents.digest, str(row_tokens), np.asarray(sizes, "<i8").tobytes())
  with np.load(cache.made_once(folder / "plans" / key[:32], write) / "plan.npz") as saved:
    return Plan(saved["offsets"], saved["starts"], saved["lengths"], int(saved["cut"]))
