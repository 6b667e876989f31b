"""Masked language modelling, with or without next-sentence prediction (BERT)."""

import dataclasses
import math
import pathlib

import numpy as np

from llm.core import UserError
from llm.data import cache, packing
from llm.data import documents as documents_lib
from llm.models import heads
from llm.objectives import base

LEAST = 8  # tokens of a row that a pair takes at least: three of them are [CLS], [SEP] and [SEP]


@dataclasses.dataclass(frozen=True)
class _Vocabulary:
  """What masking needs to know of a tokenizer."""

  cls: int
  sep: int
  mask: int
  pad: int
  ordinary: np.ndarray  # ids that may replace a token
  starts_word_V: np.ndarray


def _vocabulary(tokenizer) -> _Vocabulary:
  tokenizer.require("cls", "sep", "mask", "pad")
  ordinary = np.setdiff1d(np.arange(tokenizer.vocab_size), tokenizer.special_ids)
  return _Vocabulary(
    tokenizer.cls, tokenizer.sep, tokenizer.mask, tokenizer.pad, ordinary, tokenizer.starts_word_V
  )


@dataclasses.dataclass(frozen=True)
class PackedRows(packing.PlannedRows):
  """Rows without pairs: [CLS] piece [SEP] after one another, each a segment of its own."""

  length: int
  vocabulary: _Vocabulary


@dataclasses.dataclass(frozen=True)
class PairRows:
  """Rows with pairs. An anchor is a run of tokens of one document, of which a pair is drawn.

  anchors: (document, start, stop) in the tokens; row i holds the pairs of anchors offsets[i] ..
  offsets[i+1]. Which part of an anchor is A, and whether B is the rest of it or comes from another
  document, is drawn anew in every epoch; no draw is longer than the anchor, [CLS] and two [SEP].
  """

  documents: documents_lib.Documents
  anchors: np.ndarray
  offsets: np.ndarray
  length: int
  vocabulary: _Vocabulary

  @property
  def tokens(self) -> int:
    return int((self.anchors[:, 2] - self.anchors[:, 1]).sum())

  @property
  def examples(self) -> int:
    return len(self)

  @property
  def slots(self) -> int:
    """N: pairs of a row, at most."""
    return packing.slots(self.length, LEAST)

  @property
  def note(self) -> str:
    fill = (self.tokens + 3 * len(self.anchors)) / (len(self) * self.length)
    return f"{len(self.anchors)} pairs in {len(self)} rows, {fill:.1%} full"

  def __len__(self) -> int:
    return len(self.offsets) - 1

  def __getitem__(self, i: int):
    return self, self.anchors[self.offsets[i] : self.offsets[i + 1]]


def plan_anchors(documents: documents_lib.Documents, room: int, short_share: float) -> np.ndarray:
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
  documents: documents_lib.Documents, length: int, short_share: float, folder: pathlib.Path
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


@dataclasses.dataclass(frozen=True)
class Objective(base.Objective):
  """BERT's pretraining (Devlin et al. 2019, section 3.1 and appendix A.1).

  mask_rate of the tokens are predicted: of these mask_share become [MASK], random_share another
  token, the rest stay. next_sentence: half of the pairs are true, half have their second part from
  another document; without it there are no pairs. short_share of the pairs aim at a random shorter
  length (0.1 in the published code). Rows are packed either way.
  """

  mask_rate: float = 0.15
  mask_share: float = 0.8
  random_share: float = 0.1
  whole_word: bool = False
  next_sentence: bool = True
  short_share: float = 0.1

  def __post_init__(self):
    for name in ("mask_rate", "mask_share", "random_share", "short_share"):
      if not 0 <= getattr(self, name) <= 1 or name == "mask_rate" and self.mask_rate == 0:
        raise UserError(f"config.objective.{name} must lie in [0, 1], not {getattr(self, name)}")
    if self.mask_share + self.random_share > 1:
      raise UserError("config.objective.mask_share + random_share must be at most 1")

  def slots(self, length: int) -> int:
    """M: masked positions of a row of `length` tokens, a fixed number."""
    return max(1, math.ceil(self.mask_rate * length))

  def rows(self, source, tokenizer, data, model, length):
    vocabulary = _vocabulary(tokenizer)
    if length < 8:
      raise UserError(
        f"config.training.sequence_length={length} is too short for masked_lm: 8 at least"
      )
    if not self.next_sentence:
      documents = documents_lib.load(source, tokenizer, "none")
      sizes = np.arange(length - 1) + 2  # [CLS] and [SEP] with every piece
      return PackedRows(
        documents, packing.plan(documents, length, sizes, source.cache), length, vocabulary
      )
    documents = documents_lib.load(source, tokenizer, data.sentences)
    if len(documents) < 2:
      raise UserError(
        f"{source.spec}: next-sentence prediction needs two documents at least (a blank "
        "line parts them); or set config.objective.next_sentence=False"
      )
    anchors, offsets = plan_pairs(documents, length, self.short_share, source.cache)
    if not len(anchors):
      raise UserError(f"{source.spec}: no document has two tokens, which a pair needs")
    return PairRows(documents, anchors, offsets, length, vocabulary)

  def example(self, row, rng):
    rows, content = row
    example = _pairs(rows, content, rng) if self.next_sentence else _packed(rows, content)
    return self._mask(example, rows.vocabulary, rng)

  def _mask(self, example, vocabulary: _Vocabulary, rng) -> dict[str, np.ndarray]:
    tokens = example["tokens"]
    fixed = (example["segments"] == 0) | np.isin(tokens, (vocabulary.cls, vocabulary.sep))
    candidates = np.flatnonzero(~fixed)
    chosen = self._choose(tokens, candidates, vocabulary, rng)
    slots = self.slots(len(tokens))
    positions, targets, weights = (np.zeros(slots, t) for t in (np.int32, np.int32, np.float32))
    positions[: len(chosen)], targets[: len(chosen)] = chosen, tokens[chosen]
    weights[: len(chosen)] = 1.0
    u = rng.random(len(chosen))
    replaced = np.where(u < self.mask_share, vocabulary.mask, tokens[chosen])
    another = vocabulary.ordinary[rng.integers(len(vocabulary.ordinary), size=len(chosen))]
    swap = (u >= self.mask_share) & (u < self.mask_share + self.random_share)
    hidden = tokens.copy()
    hidden[chosen] = np.where(swap, another, replaced)
    return {
      **example,
      "tokens": hidden,
      "masked_positions": positions,
      "masked_targets": targets,
      "masked_weights": weights,
    }

  def _choose(self, tokens, candidates, vocabulary, rng) -> np.ndarray:
    """The positions to predict, sorted: mask_rate of the candidates, one at least."""
    count = min(max(1, round(self.mask_rate * len(candidates))), self.slots(len(tokens)))
    if not self.whole_word:
      return np.sort(rng.permutation(candidates)[:count])
    # A word goes on while the next candidate stands beside it and starts no word.
    begins = vocabulary.starts_word_V[tokens[candidates]] | (np.diff(candidates, prepend=-2) != 1)
    words = np.split(candidates, np.flatnonzero(begins)[1:])
    chosen: list[int] = []
    for i in rng.permutation(len(words)):
      if len(chosen) + len(words[i]) <= count:
        chosen.extend(words[i])
    return np.sort(np.array(chosen or words[rng.integers(len(words))][:count], np.int64))

  def head(self, model):
    return heads.MaskedLMHead(model, self.next_sentence)

  def totals(self, batch):
    totals = {"masked": batch["masked_weights"].sum()}
    if self.next_sentence:
      totals["pairs"] = batch["pair_weights"].sum()
    return totals

  def loss(self, outputs, batch, totals):
    weights, weight = batch["masked_weights"], batch["masked_weights"].sum()
    loss = base.weighted_mean(outputs["losses"], weights, totals["masked"])
    metrics = {
      "mlm_loss": ((outputs["losses"] * weights).sum(), weight),
      "mlm_accuracy": ((outputs["correct"] * weights).sum(), weight),
    }
    if self.next_sentence:
      losses_BxN = base.cross_entropy(outputs["pair_logits"], batch["next_sentence"])
      correct_BxN = outputs["pair_logits"].argmax(-1) == batch["next_sentence"]
      weights_BxN, pairs = batch["pair_weights"], batch["pair_weights"].sum()
      loss += base.weighted_mean(losses_BxN, weights_BxN, totals["pairs"])
      metrics |= {
        "nsp_loss": ((losses_BxN * weights_BxN).sum(), pairs),
        "nsp_accuracy": ((correct_BxN * weights_BxN).sum(), pairs),
      }
    return loss, metrics

  def predict(self, outputs, batch):
    found = {
      name: base.row_sums(outputs[key], batch["masked_weights"])
      for name, key in (("mlm_loss", "losses"), ("mlm_accuracy", "correct"))
    }
    if self.next_sentence:
      correct_BxN = outputs["pair_logits"].argmax(-1) == batch["next_sentence"]
      found["nsp_accuracy"] = base.row_sums(correct_BxN, batch["pair_weights"])
    return found

  def outcomes(self, predictions, rows):
    return predictions

  def summary(self, outcomes):
    return base.mean_of_sums(outcomes)


def _packed(rows: PackedRows, pieces) -> dict[str, np.ndarray]:
  """[CLS] piece [SEP] ... of one packed row."""
  known = rows.vocabulary
  examples = [([known.cls, *piece, known.sep], [0] * (len(piece) + 2)) for piece in pieces]
  return packing.lay_out(examples, rows.length, known.pad)[0]


def _pairs(rows: PairRows, anchors, rng) -> dict[str, np.ndarray]:
  """The pairs of one row; next_sentence is 1 where B follows A in its document."""
  drawn = [_pair(rows, anchor, rng) for anchor in anchors]
  examples = [(tokens, types) for tokens, types, _ in drawn]
  row, firsts = packing.lay_out(examples, rows.length, rows.vocabulary.pad)
  true_pairs = [true_pair for _, _, true_pair in drawn]
  return {
    **row,
    "firsts": packing.in_slots(firsts, rows.slots, np.int32),
    "next_sentence": packing.in_slots(true_pairs, rows.slots, np.int32),
    "pair_weights": packing.in_slots(np.ones(len(drawn)), rows.slots, np.float32),
  }


def _pair(rows: PairRows, anchor, rng) -> tuple[list[int], np.ndarray, bool]:
  """[CLS] A [SEP] B [SEP] of one anchor, its types, and whether B follows A in its document."""
  doc, start, stop = (int(a) for a in anchor)
  true_pair = rng.random() < 0.5
  middle, whole = _split_point(rows.documents, doc, start, stop, rng)
  a = rows.documents.tokens_N[start:middle]
  b = (
    rows.documents.tokens_N[middle:stop]
    if true_pair
    else _elsewhere(rows.documents, doc, stop - middle, whole, rng)
  )
  tokens = [rows.vocabulary.cls, *a, rows.vocabulary.sep, *b, rows.vocabulary.sep]
  types = (np.arange(len(tokens)) >= len(a) + 2).astype(np.int32)
  return tokens, types, true_pair


def _split_point(documents, doc: int, start: int, stop: int, rng) -> tuple[int, bool]:
  """Where B begins, and whether a sentence does: inside a sentence only where there is no other end."""
  ends = documents.sentences[documents.documents[doc] : documents.documents[doc + 1]]
  inside = ends[np.searchsorted(ends, start, "right") : np.searchsorted(ends, stop, "left")]
  if len(inside):
    return int(rng.choice(inside)), True
  return int(rng.integers(start + 1, stop)), False


def _elsewhere(documents, doc: int, wanted: int, whole: bool, rng) -> np.ndarray:
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
