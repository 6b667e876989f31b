"""Masked language modelling, with or without next-sentence prediction (BERT)."""
import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np

from llm.core import UserError
from llm.data import documents as documents_lib
from llm.data import packing
from llm.models import heads
from llm.objectives import base


@dataclasses.dataclass(frozen=True)
class _Vocabulary:
  """What masking needs to know of a tokenizer."""
  cls: int
  sep: int
  mask: int
  pad: int
  ordinary: np.ndarray       # ids that may replace a token
  starts_word_V: np.ndarray


def _vocabulary(tokenizer) -> _Vocabulary:
  tokenizer.require("cls", "sep", "mask", "pad")
  ordinary = np.setdiff1d(np.arange(tokenizer.vocab_size), tokenizer.special_ids)
  return _Vocabulary(tokenizer.cls, tokenizer.sep, tokenizer.mask, tokenizer.pad, ordinary,
                     tokenizer.starts_word_V)


@dataclasses.dataclass(frozen=True)
class PackedRows(packing.PlannedRows):
  """Rows without pairs: [CLS] piece [SEP] after one another, each a segment of its own."""
  length: int
  vocabulary: _Vocabulary


@dataclasses.dataclass(frozen=True)
class PairRows:
  """Rows with pairs. An anchor is a run of sentences of one document that fills a row.

  anchors: (document, start, stop) in the tokens. Which part of the anchor is A, and whether B
  is the rest of it or comes from another document, is drawn anew in every epoch.
  """
  documents: documents_lib.Documents
  anchors: np.ndarray
  length: int
  vocabulary: _Vocabulary

  @property
  def tokens(self) -> int:
    return int((self.anchors[:, 2] - self.anchors[:, 1]).sum())

  def __len__(self) -> int:
    return len(self.anchors)

  def __getitem__(self, i: int):
    return self, self.anchors[i]


def plan_anchors(documents: documents_lib.Documents, room: int) -> np.ndarray:
  """Every document cut at sentence ends into runs of at most `room` tokens: Nx3 int64.

  A sentence longer than a row is cut. Runs of one token are left out: they make no pair.
  """
  anchors = []
  for doc in range(len(documents)):
    ends = documents.sentences[documents.documents[doc]:documents.documents[doc + 1] + 1]
    start = previous = int(ends[0])
    for end in ends[1:].tolist():
      if end - start > room and previous > start:
        anchors.append((doc, start, previous))
        start = previous
      while end - start > room:
        anchors.append((doc, start, start + room))
        start += room
      previous = end
    if previous > start:
      anchors.append((doc, start, previous))
  return np.array([a for a in anchors if a[2] - a[1] > 1], np.int64).reshape(-1, 3)


@dataclasses.dataclass(frozen=True)
class Objective(base.Objective):
  """BERT's pretraining (Devlin et al. 2019, section 3.1 and appendix A.1).

  mask_rate of the tokens are predicted: of these mask_share become [MASK], random_share another
  token, the rest stay. next_sentence: half of the rows are a true pair, half have their second
  part from another document; without it rows are packed. short_share of the pairs are cut to a
  random shorter length (0.1 in the published code).
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
      raise UserError(f"config.training.sequence_length={length} is too short for masked_lm: 8 at least")
    if not self.next_sentence:
      documents = documents_lib.load(source, tokenizer, "none")
      sizes = np.arange(length - 1) + 2   # [CLS] and [SEP] with every piece
      return PackedRows(documents, packing.plan(documents, length, sizes, source.cache), length, vocabulary)
    documents = documents_lib.load(source, tokenizer, data.sentences)
    if len(documents) < 2:
      raise UserError(f"{source.spec}: next-sentence prediction needs two documents at least (a blank "
                      "line parts them); or set config.objective.next_sentence=False")
    anchors = plan_anchors(documents, length - 3)
    if not len(anchors):
      raise UserError(f"{source.spec}: no document has two tokens, which a pair needs")
    return PairRows(documents, anchors, length, vocabulary)

  def example(self, row, rng):
    rows, content = row
    example = (_pair(rows, content, self.short_share, rng) if self.next_sentence
               else _packed(rows, content))
    return self._mask(example, rows.vocabulary, rng)

  def _mask(self, example, vocabulary: _Vocabulary, rng) -> dict[str, np.ndarray]:
    tokens = example["tokens"]
    fixed = (example["segments"] == 0) | np.isin(tokens, (vocabulary.cls, vocabulary.sep))
    candidates = np.flatnonzero(~fixed)
    chosen = self._choose(tokens, candidates, vocabulary, rng)
    slots = self.slots(len(tokens))
    positions, targets, weights = (np.zeros(slots, t) for t in (np.int32, np.int32, np.float32))
    positions[:len(chosen)], targets[:len(chosen)] = chosen, tokens[chosen]
    weights[:len(chosen)] = 1.0
    u = rng.random(len(chosen))
    replaced = np.where(u < self.mask_share, vocabulary.mask, tokens[chosen])
    another = vocabulary.ordinary[rng.integers(len(vocabulary.ordinary), size=len(chosen))]
    swap = (u >= self.mask_share) & (u < self.mask_share + self.random_share)
    hidden = tokens.copy()
    hidden[chosen] = np.where(swap, another, replaced)
    return {**example, "tokens": hidden, "masked_positions": positions, "masked_targets": targets,
            "masked_weights": weights}

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
    metrics = {"mlm_loss": ((outputs["losses"] * weights).sum(), weight),
               "mlm_accuracy": ((outputs["correct"] * weights).sum(), weight)}
    if self.next_sentence:
      log_probs_Bx2 = jax.nn.log_softmax(outputs["pair_logits"])
      losses_B = -jnp.take_along_axis(log_probs_Bx2, batch["next_sentence"][:, None], axis=1)[:, 0]
      correct_B = outputs["pair_logits"].argmax(-1) == batch["next_sentence"]
      weights_B, pairs = batch["pair_weights"], batch["pair_weights"].sum()
      loss += base.weighted_mean(losses_B, weights_B, totals["pairs"])
      metrics |= {"nsp_loss": ((losses_B * weights_B).sum(), pairs),
                  "nsp_accuracy": ((correct_B * weights_B).sum(), pairs)}
    return loss, metrics

  def predict(self, outputs, batch):
    found = {name: base.row_sums(outputs[key], batch["masked_weights"])
             for name, key in (("mlm_loss", "losses"), ("mlm_accuracy", "correct"))}
    if self.next_sentence:
      right_B = outputs["pair_logits"].argmax(-1) == batch["next_sentence"]
      found["nsp_accuracy"] = base.row_sums(right_B[:, None], batch["pair_weights"][:, None])
    return found

  def outcomes(self, predictions, rows):
    return predictions

  def summary(self, outcomes):
    return base.mean_of_sums(outcomes)


def _packed(rows: PackedRows, pieces) -> dict[str, np.ndarray]:
  """[CLS] piece [SEP] ... of one packed row."""
  out = {k: np.zeros(rows.length, np.int32) for k in ("segments", "positions", "types")}
  out["tokens"] = np.full(rows.length, rows.vocabulary.pad, np.int32)
  at = 0
  for number, piece in enumerate(pieces, 1):
    here = slice(at, at + len(piece) + 2)
    out["tokens"][here] = [rows.vocabulary.cls, *piece, rows.vocabulary.sep]
    out["segments"][here] = number
    out["positions"][here] = np.arange(len(piece) + 2)
    at += len(piece) + 2
  return out


def _pair(rows: PairRows, anchor, short_share: float, rng) -> dict[str, np.ndarray]:
  """[CLS] A [SEP] B [SEP] of one anchor; next_sentence is 1 where B follows A in its document."""
  doc, start, stop = (int(a) for a in anchor)
  room = rows.length - 3
  if rng.random() < short_share:
    room = int(rng.integers(2, room + 1))
  stop = min(stop, start + room)
  true_pair = rng.random() < 0.5
  middle, whole = _split_point(rows.documents, doc, start, stop, rng)
  a = rows.documents.tokens_N[start:middle]
  b = (rows.documents.tokens_N[middle:stop] if true_pair
       else _elsewhere(rows.documents, doc, stop - middle, whole, rng))
  used = len(a) + len(b) + 3
  out = {k: np.zeros(rows.length, np.int32) for k in ("segments", "positions", "types")}
  out["tokens"] = np.full(rows.length, rows.vocabulary.pad, np.int32)
  out["tokens"][:used] = [rows.vocabulary.cls, *a, rows.vocabulary.sep, *b, rows.vocabulary.sep]
  out["segments"][:used] = 1
  out["types"][len(a) + 2:used] = 1
  out["positions"][:used] = np.arange(used)
  return {**out, "next_sentence": np.int32(true_pair), "pair_weights": np.float32(1)}


def _split_point(documents, doc: int, start: int, stop: int, rng) -> tuple[int, bool]:
  """Where B begins, and whether a sentence does: inside a sentence only where there is no other end."""
  ends = documents.sentences[documents.documents[doc]:documents.documents[doc + 1]]
  inside = ends[np.searchsorted(ends, start, "right"):np.searchsorted(ends, stop, "left")]
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
  return documents.tokens_N[start:min(end, start + wanted)]
