"""Span corruption and prefix language modelling (T5), packed."""

import dataclasses

import numpy as np

from llm.config import key
from llm.core import UserError
from llm.data import documents as documents_lib
from llm.data import packing, pairs
from llm.objectives import causal_lm


@dataclasses.dataclass(frozen=True)
class CorruptedRows(packing.PlannedRows):
  """Rows of packed pieces of documents. Each epoch corrupts a piece anew.

  target_length: tokens of a row's targets. sentinels: the ids of <extra_id_0>, <extra_id_1>, ...
  """

  objective: "Objective"
  target_length: int
  pad: int
  eos: int
  sentinels: np.ndarray

  def example(self, i, rng):
    corrupt = self._cut if self.objective.prefix else self._corrupt
    corrupted = [corrupt(np.asarray(piece, np.int32), rng) for piece in self.pieces(i)]
    return pairs.row(corrupted, self.length, self.target_length, self.pad)

  def _cut(self, piece: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """(input, target): the piece cut at a random place."""
    where = int(rng.integers(1, len(piece)))
    return piece[:where], np.r_[piece[where:], self.eos]

  def _corrupt(self, piece: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """(input, target): the piece without random spans, and these spans."""
    cut_tokens, count = self.objective.noise(len(piece))
    # Kept and cut spans take turns, a kept one first. All have random lengths of 1 or more.
    kept_lengths = _partition(len(piece) - cut_tokens, count, rng)
    cut_lengths = _partition(cut_tokens, count, rng)
    ends = np.cumsum(np.stack([kept_lengths, cut_lengths], 1).ravel())
    spans = np.split(piece, ends[:-1])
    inputs = []
    targets = []
    for kept, cut, sentinel in zip(spans[::2], spans[1::2], self.sentinels[:count]):
      inputs += [kept, [sentinel]]
      targets += [[sentinel], cut]
    return np.concatenate([*inputs, [self.eos]]), np.concatenate([*targets, [self.eos]])


@dataclasses.dataclass(frozen=True)
class Objective(causal_lm.Objective):
  """T5's pretraining (Raffel et al. 2020, sections 3.1.4 and 3.3.4): the decoder writes cut spans.

  noise_density: share of the tokens that are cut. mean_span: mean length of the cut spans. In the
  input, a sentinel stands for each span; in the target, it stands before the span. Both end with
  the end token. prefix: the text is cut once instead, and its second part is the target (section
  3.2.1).
  """

  noise_density: float = key(0.15, above=0, below=1)
  mean_span: float = key(3.0, at_least=1)
  prefix: bool = False

  kinds = ("encoder_decoder",)
  text_loss = ""  # its targets have sentinels too

  def noise(self, length: int) -> tuple[int, int]:
    """(tokens that are cut, number of spans) of a piece of `length` tokens, at least two."""
    cut = min(max(round(length * self.noise_density), 1), length - 1)
    return cut, min(max(round(cut / self.mean_span), 1), length - cut)

  def lengths(self, piece: int) -> tuple[int, int]:
    """The most tokens of (input, target) of a piece, with sentinels and end tokens."""
    if self.prefix:
      return piece, piece
    cut, spans = self.noise(piece)
    return piece - cut + spans + 1, cut + spans + 1

  def longest(self, input_length: int) -> int:
    """The length of the longest piece whose input fits into `input_length` tokens."""
    piece = 2
    while self.lengths(piece + 1)[0] <= input_length:
      piece += 1
    return piece

  def target_length(self, input_length: int) -> int:
    """T: the longest target of a piece whose input fits into `input_length` tokens, S."""
    return max(self.lengths(n)[1] for n in range(2, self.longest(input_length) + 1))

  def rows(self, source, tokenizer, data, model, length):
    tokenizer.require("pad", "eos")
    if length < 8:
      raise UserError(
        f"config.training.sequence_length={length} is too short for span_corruption: 8 at least"
      )
    longest = self.longest(length)
    spans = 0 if self.prefix else self.noise(longest)[1]
    if spans > len(tokenizer.sentinels):
      raise UserError(
        f"the {tokenizer.name} vocabulary has {len(tokenizer.sentinels)} sentinels "
        f"(<extra_id_0>, ..) and sequence_length={length} needs {spans}: set "
        "config.tokenizer.sentinels=100"
      )
    inputs, targets = np.array([self.lengths(n) for n in range(2, longest + 1)]).T
    target_length = self.target_length(length)
    taken = pairs.sizes(inputs, targets, length, target_length)
    sizes = np.r_[0, 0, taken]  # one token cannot be cut
    documents = documents_lib.load(source, tokenizer, "none")
    plan = packing.plan(documents, length, sizes, source.cache)
    if not len(plan):
      raise UserError(f"{source.spec}: no document has two tokens")
    sentinels = np.array(tokenizer.sentinels)
    return CorruptedRows(
      documents, plan, length, self, target_length, tokenizer.pad, tokenizer.eos, sentinels
    )

  def batch_spec(self, model, length):
    return pairs.row_spec(length, self.target_length(length))


def _partition(total: int, parts: int, rng: np.random.Generator) -> np.ndarray:
  """`parts` random positive lengths that sum to `total`, all choices equally likely."""
  ends = np.sort(rng.permutation(total - 1)[: parts - 1]) + 1
  return np.diff(np.r_[0, ends, total])
