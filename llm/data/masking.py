"""Which tokens of a row are predicted, and what stands in their place (BERT)."""

import dataclasses
import math

import numpy as np

from llm.data.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class Masking:
  """mask_rate of the tokens are predicted (Devlin et al. 2019, section 3.1).

  Of these mask_share become [MASK], random_share another token, and the rest stay. whole_word: all
  pieces of a word are hidden together.
  """

  mask_rate: float
  mask_share: float
  random_share: float
  whole_word: bool
  cls: int
  sep: int
  mask: int
  pad: int
  ordinary: np.ndarray  # ids that may replace a token
  starts_word_V: np.ndarray

  def hide(self, row: dict[str, np.ndarray], rng: np.random.Generator) -> dict[str, np.ndarray]:
    """The row with its masked tokens replaced, and what they were, in M slots."""
    tokens = row["tokens"]
    fixed = (row["segments"] == 0) | np.isin(tokens, (self.cls, self.sep))
    chosen = self._choose(tokens, np.flatnonzero(~fixed), rng)
    count, slots = len(chosen), masked_slots(self.mask_rate, len(tokens))
    positions, targets = np.zeros((2, slots), np.int32)
    weights = np.zeros(slots, np.float32)
    positions[:count] = chosen
    targets[:count] = tokens[chosen]
    weights[:count] = 1.0
    u = rng.random(count)
    another = self.ordinary[rng.integers(len(self.ordinary), size=count)]
    is_random = (u >= self.mask_share) & (u < self.mask_share + self.random_share)
    hidden = tokens.copy()
    hidden[chosen] = np.where(u < self.mask_share, self.mask, tokens[chosen])
    hidden[chosen] = np.where(is_random, another, hidden[chosen])
    return {
      **row,
      "tokens": hidden,
      "masked_positions": positions,
      "masked_targets": targets,
      "masked_weights": weights,
    }

  def _choose(
    self, tokens: np.ndarray, candidates: np.ndarray, rng: np.random.Generator
  ) -> np.ndarray:
    """The positions to predict, sorted: mask_rate of the candidates, one at least."""
    count = min(
      max(1, round(self.mask_rate * len(candidates))), masked_slots(self.mask_rate, len(tokens))
    )
    if not self.whole_word:
      return np.sort(rng.permutation(candidates)[:count])
    # A word goes on while the next candidate stands beside it and starts no word.
    begins = self.starts_word_V[tokens[candidates]] | (np.diff(candidates, prepend=-2) != 1)
    words = np.split(candidates, np.flatnonzero(begins)[1:])
    chosen: list[int] = []
    for i in rng.permutation(len(words)):
      if len(chosen) + len(words[i]) <= count:
        chosen.extend(words[i])
    return np.sort(np.array(chosen or words[rng.integers(len(words))][:count], np.int64))


def masked_slots(mask_rate: float, length: int) -> int:
  """M: masked positions of a row of `length` tokens, a fixed number."""
  return max(1, math.ceil(mask_rate * length))


def masking(
  tokenizer: Tokenizer,
  mask_rate: float,
  mask_share: float,
  random_share: float,
  whole_word: bool,
) -> Masking:
  """The masking of a vocabulary. Raises UserError where it lacks a special piece."""
  tokenizer.require("cls", "sep", "mask", "pad")
  return Masking(
    mask_rate,
    mask_share,
    random_share,
    whole_word,
    tokenizer.cls,
    tokenizer.sep,
    tokenizer.mask,
    tokenizer.pad,
    np.setdiff1d(np.arange(tokenizer.vocab_size), tokenizer.special_ids),
    tokenizer.starts_word_V,
  )
