"""Rows of sentence pairs, of which half follow one another in a document (BERT's next sentence)."""

import dataclasses
import pathlib

import numpy as np

from llm.data import cache, packing
from llm.data.documents import Documents
from llm.data.masking import Masking

LEAST = 8  # tokens of a row that a pair takes at least: three of them are [CLS], [SEP] and [SEP]


@dataclasses.dataclass(frozen=True)
class PairRows:
  """Rows of pairs. An anchor is a run of tokens of one document, of which a pair is drawn.

  anchors: (document, start, stop) in the tokens; row i holds the pairs of anchors offsets[i] ..
  offsets[i+1]. Which part of an anchor is A, and whether B is the rest of it or comes from another
  document, is drawn anew in every epoch; no draw is longer than the anchor, [CLS] and two [SEP].
  """

  documents: Documents
  anchors: np.ndarray
  offsets: np.ndarray
  length: int
  masking: Masking

  @property
  def tokens(self) -> int:
    return int((self.anchors[:, 2] - self.anchors[:, 1]).sum())

  @property
  def examples(self) -> int:
    return len(self)

  @property
  def note(self) -> str:
    fill = (self.tokens + 3 * len(self.anchors)) / (len(self) * self.length)
    return f"{len(self.anchors)} pairs in {len(self)} rows, {fill:.1%} full"

  def __len__(self) -> int:
    return len(self.offsets) - 1

  def example(self, i: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
    anchors = self.anchors[self.offsets[i] : self.offsets[i + 1]]
    drawn = [self._pair(anchor, rng) for anchor in anchors]
    pairs = [pair for pair, _ in drawn]
    row, firsts = packing.lay_out(pairs, self.length, self.masking.pad)
    slots = packing.slots(self.length, LEAST)
    row |= {
      "firsts": packing.in_slots(firsts, slots, np.int32),
      "next_sentence": packing.in_slots([follows for _, follows in drawn], slots, np.int32),
      "pair_weights": packing.slots_in_use(len(drawn), slots),
    }
    return self.masking.hide(row, rng)

  def _pair(self, anchor: np.ndarray, rng: np.random.Generator) -> tuple[dict, bool]:
    """[CLS] A [SEP] B [SEP] of one anchor, and whether B follows A in its document."""
    document, start, stop = (int(number) for number in anchor)
    follows = rng.random() < 0.5
    middle, whole = _split_point(self.documents, document, start, stop, rng)
    a = self.documents.tokens_N[start:middle]
    if follows:
      b = self.documents.tokens_N[middle:stop]
    else:
      b = _elsewhere(self.documents, document, stop - middle, whole, rng)
    tokens = [self.masking.cls, *a, self.masking.sep, *b, self.masking.sep]
    return {"tokens": tokens, "types": np.arange(len(tokens)) >= len(a) + 2}, follows


def plan_anchors(documents: Documents, room: int, short_share: float) -> np.ndarray:
  """Every document cut into runs of at most `room` tokens: Nx3 int64, in order.

  A run has `room` tokens, or with the chance `short_share` fewer, 2 at least, each number as
  likely. It ends inside a sentence where that fills the row, as in BERT's published code, but the
  next run goes on there and no token is lost. Runs of one token are left out: they make no pair.

  Lengths are drawn from a seed of their own, before a run is made: so the plan holds for every
  epoch, and no short run leaves tokens unused.
  """
  rng = np.random.default_rng(0)
  bounds = documents.bounds()
  going = np.flatnonzero(np.diff(bounds))  # documents that have tokens left
  starts = bounds[going]
  anchors = [np.zeros((0, 3), np.int64)]
  while len(going):  # one run of each of them at a time
    short = rng.random(len(going)) < short_share
    lengths = np.where(short, rng.integers(2, room + 1, len(going)), room)
    stops = np.minimum(starts + lengths, bounds[going + 1])
    stops -= (bounds[going + 1] - stops == 1) & (stops - starts > 2)  # one token alone is no pair
    anchors.append(np.stack([going, starts, stops], 1))
    left = stops < bounds[going + 1]
    going, starts = going[left], stops[left]
  anchors = np.concatenate(anchors)
  anchors = anchors[anchors[:, 2] - anchors[:, 1] > 1]
  return anchors[np.argsort(anchors[:, 1])].astype(np.int64)


def plan_pairs(
  documents: Documents, length: int, short_share: float, folder: pathlib.Path
) -> tuple[np.ndarray, np.ndarray]:
  """(anchors, offsets) of `PairRows`. Kept in `folder` beside the token cache."""

  def write(scratch):
    anchors = plan_anchors(documents, length - 3, short_share)
    rows = packing.into_rows(anchors[:, 2] - anchors[:, 1] + 3, length, LEAST)
    np.savez(
      scratch / "plan.npz",
      anchors=anchors[np.concatenate(rows)] if rows else anchors,
      offsets=np.cumsum([0, *map(len, rows)]),
    )

  key = cache.digest("pairs 2", documents.digest, str(length), repr(short_share))
  with np.load(cache.made_once(folder / "plans" / key[:32], write) / "plan.npz") as saved:
    return saved["anchors"], saved["offsets"]


def _split_point(
  documents: Documents, doc: int, start: int, stop: int, rng: np.random.Generator
) -> tuple[int, bool]:
  """Where B begins, and whether a sentence does: inside a sentence only where there is no other end."""
  ends = documents.sentences[documents.documents[doc] : documents.documents[doc + 1]]
  inside = ends[np.searchsorted(ends, start, "right") : np.searchsorted(ends, stop, "left")]
  if len(inside):
    return int(rng.choice(inside)), True
  return int(rng.integers(start + 1, stop)), False


def _elsewhere(
  documents: Documents, doc: int, wanted: int, whole: bool, rng: np.random.Generator
) -> np.ndarray:
  """`wanted` tokens of another document, at a sentence's start if `whole`, inside one if not.

  So neither the length of B nor how it begins tells whether the pair is true. A document that has
  less gives what it has.
  """
  other = int(rng.integers(len(documents) - 1))
  other += other >= doc
  first, last = documents.documents[other], documents.documents[other + 1]
  begin, end = int(documents.sentences[first]), int(documents.sentences[last])
  if whole:
    start = int(documents.sentences[int(rng.integers(first, last))])
  else:
    start = int(rng.integers(min(begin + 1, end - 1), end))
  start = max(begin, min(start, end - wanted))
  return documents.tokens_N[start : min(end, start + wanted)]
