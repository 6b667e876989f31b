"""Rows of a new vocabulary from the rows of another: by equal pieces, else by the pieces' text."""

import dataclasses

import numpy as np

from llm.data.tokenizer import SPECIAL, Tokenizer

PATHS = (  # the parameters with a row for every piece
  "backbone/token/embedding",
  "backbone/output/embedding",
  "head/lm/bias",
  "generator/head/lm/bias",
)


@dataclasses.dataclass(frozen=True)
class Matching:
  """For every piece of a new vocabulary, the rows of an old one that it starts from.

  rows: the old ids of each new piece. A piece that both vocabularies have gets one id. Any other
  piece gets the ids that the old tokenizer gives its text. A row without old ids stays fresh.
  """

  rows: tuple[tuple[int, ...], ...]

  def apply(self, fresh: np.ndarray, loaded: np.ndarray) -> np.ndarray:
    """`fresh` (V x ...) with each row replaced by the mean of its old rows in `loaded`."""
    matched = np.array(fresh)
    for row, ids in enumerate(self.rows):
      if ids:
        matched[row] = loaded[list(ids)].mean(0)
    return matched

  def __str__(self) -> str:
    counts = [len(ids) for ids in self.rows]
    return (
      f"{sum(n == 1 for n in counts):,} rows from one piece, "
      f"{sum(n > 1 for n in counts):,} from the mean of several, {counts.count(0):,} fresh"
    )


def match(new: Tokenizer, old: Tokenizer) -> Matching:
  """Matches special pieces by their purpose, others by their string, and the rest by their text."""
  old_ids = {piece: i for i, piece in enumerate(old.pieces)}
  rows: list[tuple[int, ...]] = [
    (old_ids[piece],) if piece in old_ids else () for piece in new.pieces
  ]
  new_pieces = [i for i, ids in enumerate(rows) if not ids]
  texts = [new.decode([i]).strip() for i in new_pieces]
  for i, ids in zip(new_pieces, old.encode(texts)):
    rows[i] = tuple(int(t) for t in ids if t != old.unk)
  for name in SPECIAL:
    new_id = getattr(new, name)
    old_id = getattr(old, name)
    if new_id >= 0:
      rows[new_id] = (old_id,) if old_id >= 0 else ()
  return Matching(tuple(rows))
