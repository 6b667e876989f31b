"""The rows of one vocabulary from those of another: same pieces by their string, new ones by their text."""

import dataclasses

import numpy as np

from llm.data.tokenizer import SPECIAL, Tokenizer

PATHS = (  # a row a piece
  "backbone/token/embedding",
  "backbone/output/embedding",
  "head/lm/bias",
  "generator/head/lm/bias",
)


@dataclasses.dataclass(frozen=True)
class Matching:
  """For every piece of a new vocabulary, the rows of an old one that it starts from.

  rows: one id where the piece is shared, several where its text was several pieces, none where the old
  tokenizer had no word for it: that row stays fresh.
  """

  rows: tuple[tuple[int, ...], ...]

  def apply(self, fresh: np.ndarray, loaded: np.ndarray) -> np.ndarray:
    """`fresh` (V x ...) with its rows taken from `loaded`, the mean where there are several."""
    out = np.array(fresh)
    for row, ids in enumerate(self.rows):
      if ids:
        out[row] = loaded[list(ids)].mean(0)
    return out

  def __str__(self) -> str:
    count = [len(ids) for ids in self.rows]
    return (
      f"{sum(n == 1 for n in count):,} rows from one piece, {sum(n > 1 for n in count):,} from the mean of "
      f"several, {count.count(0):,} fresh"
    )


def match(new: Tokenizer, old: Tokenizer) -> Matching:
  """Special pieces by what they are for, others by their string, the rest by what their text was."""
  known = {piece: i for i, piece in enumerate(old.pieces)}
  rows = [(known[piece],) if piece in known else () for piece in new.pieces]
  unsaid = [i for i, found in enumerate(rows) if not found]
  texts = [new.decode([i]).strip() for i in unsaid]
  for i, ids in zip(unsaid, old.encode(texts)):
    rows[i] = tuple(int(t) for t in ids if t != old.unk)
  for name in SPECIAL:
    here, there = getattr(new, name), getattr(old, name)
    if here >= 0:
      rows[here] = (there,) if there >= 0 else ()
  return Matching(tuple(rows))
