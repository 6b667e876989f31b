"""Span corruption and prefix language modelling (T5), packed."""

import dataclasses

import numpy as np

from llm.core import UserError
from llm.data import documents as documents_lib
from llm.data import packing, pairs
from llm.objectives import causal_lm


@dataclasses.dataclass(frozen=True)
class CorruptedRows(packing.PlannedRows):
  """Rows of a packing plan; how each piece is corrupted is drawn anew in every epoch."""

  input_length: int
  target_length: int
  pad: int
  eos: int
  sentinels: np.ndarray


@dataclasses.dataclass(frozen=True)
class Objective(causal_lm.Objective):
  """T5's pretraining (Raffel et al. 2020, sections 3.1.4 and 3.3.4): what was cut out is written by the decoder.

  noise_density of the tokens go, in spans of mean_span on average; each is marked by a sentinel in the
  input and after the same sentinel in the target; both end with the end token. prefix: instead, the text
  is cut once and its second part is the target (section 3.2.1).
  """

  noise_density: float = 0.15
  mean_span: float = 3.0
  prefix: bool = False

  def __post_init__(self):
    if not 0 < self.noise_density < 1:
      raise UserError(
        f"config.objective.noise_density must lie between 0 and 1, not {self.noise_density}"
      )
    if not self.mean_span >= 1:
      raise UserError(f"config.objective.mean_span must be at least 1, not {self.mean_span}")

  def noise(self, length: int) -> tuple[int, int]:
    """(tokens that go, spans they go in) of a piece of `length` tokens, two at least."""
    gone = min(max(round(length * self.noise_density), 1), length - 1)
    return gone, min(max(round(gone / self.mean_span), 1), length - gone)

  def lengths(self, piece: int) -> tuple[int, int]:
    """Tokens of input and target of a piece, at most: sentinels and end tokens included."""
    if self.prefix:
      return piece, piece
    gone, spans = self.noise(piece)
    return piece - gone + spans + 1, gone + spans + 1

  def longest(self, input_length: int) -> int:
    """The longest piece whose input fits."""
    piece = 2
    while self.lengths(piece + 1)[0] <= input_length:
      piece += 1
    return piece

  def rows(self, source, tokenizer, data, model, length):
    tokenizer.require("pad", "eos")
    if model.name != "t5":
      raise UserError(
        f"config.objective.name=span_corruption needs an encoder and a decoder: model.name=t5, not {model.name}"
      )
    if length < 8:
      raise UserError(
        f"config.training.sequence_length={length} is too short for span_corruption: 8 at least"
      )
    longest = self.longest(length)
    spans = 0 if self.prefix else self.noise(longest)[1]
    if spans > len(tokenizer.sentinels):
      raise UserError(
        f"the {tokenizer.name} vocabulary has {len(tokenizer.sentinels)} sentinels (<extra_id_0>, ..) and "
        f"sequence_length={length} needs {spans}: set config.tokenizer.sentinels=100"
      )
    inputs, targets = np.array([self.lengths(n) for n in range(2, longest + 1)]).T
    target_length = int(targets.max())
    sizes = np.r_[
      0, 0, pairs.sizes(inputs, targets, length, target_length)
    ]  # one token cannot be cut
    documents = documents_lib.load(source, tokenizer, "none")
    plan = packing.plan(documents, length, sizes, source.cache)
    if not len(plan):
      raise UserError(f"{source.spec}: no document has two tokens")
    return CorruptedRows(
      documents,
      plan,
      length,
      target_length,
      tokenizer.pad,
      tokenizer.eos,
      np.array(tokenizer.sentinels),
    )

  def example(self, row, rng):
    rows, pieces = row
    corrupt = self._cut if self.prefix else self._corrupt
    made = [corrupt(np.asarray(piece, np.int32), rows, rng) for piece in pieces]
    return pairs.row(made, rows.input_length, rows.target_length, rows.pad)

  def _cut(self, piece, rows, rng):
    where = int(rng.integers(1, len(piece)))
    return piece[:where], np.r_[piece[where:], rows.eos]

  def _corrupt(self, piece, rows, rng):
    gone, count = self.noise(len(piece))
    # Kept and cut spans take turns, a kept one first, all of random lengths of 1 or more.
    ends = np.cumsum(
      np.stack([_partition(len(piece) - gone, count, rng), _partition(gone, count, rng)], 1).ravel()
    )
    spans = np.split(piece, ends[:-1])
    marks = rows.sentinels[:count, None]
    inputs = np.concatenate([np.r_[kept, mark] for kept, mark in zip(spans[::2], marks)])
    targets = np.concatenate([np.r_[mark, cut] for cut, mark in zip(spans[1::2], marks)])
    return np.r_[inputs, rows.eos], np.r_[targets, rows.eos]


def _partition(total: int, parts: int, rng) -> np.ndarray:
  """`parts` positive lengths that sum to `total`, each such choice as likely."""
  ends = np.sort(rng.permutation(total - 1)[: parts - 1]) + 1
  return np.diff(np.r_[0, ends, total])
