"""Rows of sentence pairs, for BERT's next-sentence prediction.

In half of the pairs, the second part follows the first in a document.
"""

import dataclasses
import json
import pathlib
from typing import NamedTuple

import numpy as np

from llm import cache
from llm.data import growing, packing
from llm.data.documents import Documents
from llm.data.masking import Masking

LEAST = 8  # the fewest tokens that a pair takes of a row
SPECIAL = 3  # [CLS], [SEP] and [SEP] of a pair


class PairPlan(NamedTuple):
  """Row i holds the pairs of the anchors offsets[i] .. offsets[i+1] - 1.

  anchors: (document, start, stop) in tokens_N. tokens: of an epoch, without special ones.
  """

  anchors: np.ndarray
  offsets: np.ndarray
  tokens: int


@dataclasses.dataclass(frozen=True)
class PairRows:
  """Rows of pairs. A pair (A, B) is drawn from an anchor, a run of tokens of one document.

  Each epoch draws where A ends in the anchor, and whether B is the rest of the anchor or comes from
  another document. B is never longer than that rest, so a pair always fits its place.
  """

  documents: Documents
  plan: PairPlan
  length: int
  masking: Masking

  @property
  def tokens(self) -> int:
    """The tokens of an epoch, without special ones."""
    return self.plan.tokens

  @property
  def examples(self) -> int:
    """The examples of an epoch: a row is one."""
    return len(self)

  @property
  def note(self) -> str:
    """A line for the header of a run."""
    pairs = len(self.plan.anchors)
    fill = (self.tokens + SPECIAL * pairs) / (len(self) * self.length)
    return f"{pairs} pairs in {len(self)} rows, {fill:.1%} full"

  def __len__(self) -> int:
    return len(self.plan.offsets) - 1

  def example(self, i: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """The pairs of row i, masked."""
    pairs = []
    follows = []
    for anchor in self.plan.anchors[self.plan.offsets[i] : self.plan.offsets[i + 1]]:
      pair, b_follows_a = self._pair(anchor, rng)
      pairs.append(pair)
      follows.append(b_follows_a)
    row, firsts = packing.lay_out(pairs, self.length, self.masking.pad)
    slots = packing.slots(self.length, LEAST)
    row |= {
      "firsts": packing.in_slots(firsts, slots, np.int32),
      "next_sentence": packing.in_slots(follows, slots, np.int32),
      "pair_weights": packing.slots_in_use(len(pairs), slots),
    }
    return self.masking.hide(row, rng)

  def _pair(self, anchor: np.ndarray, rng: np.random.Generator) -> tuple[dict, bool]:
    """[CLS] A [SEP] B [SEP] from one anchor, and whether B follows A in its document."""
    document, start, stop = (int(number) for number in anchor)
    follows = rng.random() < 0.5
    middle, at_sentence = _split_point(self.documents, document, start, stop, rng)
    a = self.documents.tokens_N[start:middle]
    if follows:
      b = self.documents.tokens_N[middle:stop]
    else:
      b = _elsewhere(self.documents, document, stop - middle, at_sentence, rng)
    tokens = [self.masking.cls, *a, self.masking.sep, *b, self.masking.sep]
    return {"tokens": tokens, "types": np.arange(len(tokens)) >= len(a) + 2}, follows


def plan_anchors(bounds: np.ndarray, room: int, short_share: float, first: int = 0) -> np.ndarray:
  """Cuts every document into anchors of at most `room` tokens: Nx3 int64, ordered by start.

  bounds: where each document begins, and the end of the last. first: the number of the first.

  An anchor has `room` tokens. With probability `short_share`, its length is drawn uniformly from
  2 .. `room` instead. It may end inside a sentence, as in BERT's published code. The next anchor
  begins there, so no token is lost. Anchors of one token are left out: they make no pair.

  The lengths are drawn here, with a fixed seed, and not when a row is read. So one plan holds for
  every epoch, and a short anchor leaves no token unused.
  """
  rng = np.random.default_rng(first)
  document = np.flatnonzero(np.diff(bounds))  # the documents with tokens left
  starts = bounds[document]
  groups = [np.zeros((0, 3), np.int64)]
  while len(document):  # each turn cuts one anchor from every such document
    ends = bounds[document + 1]
    is_short = rng.random(len(document)) < short_share
    lengths = np.where(is_short, rng.integers(2, room + 1, len(document)), room)
    stops = np.minimum(starts + lengths, ends)
    # An anchor gives up its last token where the next one would have a single token.
    stops -= (ends - stops == 1) & (stops - starts > 2)
    groups.append(np.stack([document + first, starts, stops], 1))
    has_more = stops < ends
    document = document[has_more]
    starts = stops[has_more]
  anchors = np.concatenate(groups)
  anchors = anchors[anchors[:, 2] - anchors[:, 1] > 1]
  return anchors[np.argsort(anchors[:, 1])].astype(np.int64)


def plan_pairs(
  documents: Documents, length: int, short_share: float, folder: pathlib.Path
) -> PairPlan:
  """The plan of `PairRows`, in rows of `length` tokens.

  short_share: as in `plan_anchors`. folder: the cache, which keeps the plan. It is made and mapped
  in groups of documents, as that of `packing.plan`.
  """
  key = cache.digest("pairs 3", documents.digest, str(length), repr(short_share))
  path = cache.kept(
    folder / "plans" / key[:32],
    lambda scratch: _write_plan(documents.bounds(), length, short_share, scratch),
  )
  anchors = growing.mapped(path / "anchors.npy", columns=3)
  tokens = json.loads((path / "totals.json").read_text())["tokens"]
  return PairPlan(anchors, growing.mapped(path / "offsets.npy"), tokens)


def _write_plan(bounds: np.ndarray, length: int, short_share: float, folder: pathlib.Path) -> None:
  """Writes the arrays and the totals of a plan into a folder."""
  tokens = count = 0
  with (
    growing.Growing(folder / "offsets.npy") as offsets,
    growing.Growing(folder / "anchors.npy") as all_anchors,
  ):
    offsets.add([0])
    for group in packing.groups(len(bounds) - 1):
      of_group = bounds[group.start : group.stop + 1]
      anchors = plan_anchors(of_group, length - SPECIAL, short_share, group.start)
      lengths = anchors[:, 2] - anchors[:, 1]
      rows = packing.into_rows(lengths + SPECIAL, length, LEAST)
      if not rows:
        continue
      all_anchors.add(anchors[np.concatenate(rows)].ravel())
      offsets.add(count + np.cumsum([len(row) for row in rows]))
      count += len(anchors)
      tokens += int(lengths.sum())
  (folder / "totals.json").write_text(json.dumps({"tokens": tokens}))


def _split_point(
  documents: Documents, document: int, start: int, stop: int, rng: np.random.Generator
) -> tuple[int, bool]:
  """Where B begins in an anchor, and whether a sentence begins there.

  It is inside a sentence only where no sentence begins inside the anchor.
  """
  begins = documents.sentences[documents.documents[document] : documents.documents[document + 1]]
  inside = begins[np.searchsorted(begins, start, "right") : np.searchsorted(begins, stop, "left")]
  if len(inside):
    return int(rng.choice(inside)), True
  return int(rng.integers(start + 1, stop)), False


def _elsewhere(
  documents: Documents, document: int, count: int, at_sentence: bool, rng: np.random.Generator
) -> np.ndarray:
  """`count` tokens of another document, or all of its tokens where it has fewer.

  at_sentence: whether they begin where a sentence does, as the true B of this anchor would. So the
  beginning of B does not tell whether it follows A, and its length only where a document is short.
  """
  other = int(rng.integers(len(documents) - 1))
  other += other >= document
  first_sentence = documents.documents[other]
  last_sentence = documents.documents[other + 1]
  begin = int(documents.sentences[first_sentence])
  end = int(documents.sentences[last_sentence])
  last_start = max(begin, end - count)
  if at_sentence:
    starts = documents.sentences[first_sentence:last_sentence]
    start = int(rng.choice(starts[: np.searchsorted(starts, last_start, "right")]))
  else:
    start = int(rng.integers(min(begin + 1, last_start), last_start + 1))
  return documents.tokens_N[start : min(end, start + count)]
