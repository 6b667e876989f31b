"""Masking (BERT): which tokens of a row are predicted, and what replaces them."""

import dataclasses
import math

import numpy as np

from llm.data import packing
from llm.data.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class Masking:
  """How rows are masked (Devlin et al. 2019, section 3.1).

  mask_rate: the share of tokens that are predicted. Of these, mask_share become [MASK],
  random_share become another token, and the others stay. whole_word: the pieces of a word are
  masked together.
  """

  mask_rate: float
  mask_share: float
  random_share: float
  whole_word: bool
  cls: int
  sep: int
  mask: int
  pad: int
  ordinary: np.ndarray  # the ids that are not special: a random replacement is one of them
  starts_word_V: np.ndarray

  def hide(self, row: dict[str, np.ndarray], rng: np.random.Generator) -> dict[str, np.ndarray]:
    """The row with masked tokens, and with their positions, targets and weights in M slots."""
    tokens = row["tokens"]
    special = (row["segments"] == 0) | np.isin(tokens, (self.cls, self.sep))
    chosen = self._choose(tokens, np.flatnonzero(~special), rng)
    slots = masked_slots(self.mask_rate, len(tokens))
    return {
      **row,
      "tokens": self._replaced(tokens, chosen, rng),
      "masked_positions": packing.in_slots(chosen, slots, np.int32),
      "masked_targets": packing.in_slots(tokens[chosen], slots, np.int32),
      "masked_weights": packing.slots_in_use(len(chosen), slots),
    }

  def _replaced(
    self, tokens: np.ndarray, chosen: np.ndarray, rng: np.random.Generator
  ) -> np.ndarray:
    """The tokens, with those at the chosen positions masked, replaced or kept."""
    uniform = rng.random(len(chosen))
    random_tokens = self.ordinary[rng.integers(len(self.ordinary), size=len(chosen))]
    becomes_mask = uniform < self.mask_share
    becomes_random = ~becomes_mask & (uniform < self.mask_share + self.random_share)
    replaced = tokens.copy()
    replaced[chosen[becomes_mask]] = self.mask
    replaced[chosen[becomes_random]] = random_tokens[becomes_random]
    return replaced

  def _choose(
    self, tokens: np.ndarray, candidates: np.ndarray, rng: np.random.Generator
  ) -> np.ndarray:
    """The positions to predict, in order: mask_rate of the candidates, at least one."""
    count = max(1, round(self.mask_rate * len(candidates)))
    count = min(count, masked_slots(self.mask_rate, len(tokens)))
    if not self.whole_word:
      return np.sort(rng.permutation(candidates)[:count])
    # A candidate continues a word if it follows the candidate before it and starts no word.
    starts_word = self.starts_word_V[tokens[candidates]] | (np.diff(candidates, prepend=-2) != 1)
    words = np.split(candidates, np.flatnonzero(starts_word)[1:])
    chosen: list[int] = []
    for i in rng.permutation(len(words)):
      if len(chosen) + len(words[i]) <= count:
        chosen.extend(words[i])
    if not chosen:  # no word is short enough: part of one is masked
      chosen = list(words[rng.integers(len(words))][:count])
    return np.sort(np.array(chosen, np.int64))


def masked_slots(mask_rate: float, length: int) -> int:
  """M, the number of masked slots of every row of `length` tokens."""
  return max(1, math.ceil(mask_rate * length))


def masking(
  tokenizer: Tokenizer,
  mask_rate: float,
  mask_share: float,
  random_share: float,
  whole_word: bool,
) -> Masking:
  """The masking for a vocabulary. Raises UserError where the vocabulary lacks a special piece."""
  tokenizer.require("cls", "sep", "mask", "pad")
  return Masking(
    mask_rate=mask_rate,
    mask_share=mask_share,
    random_share=random_share,
    whole_word=whole_word,
    cls=tokenizer.cls,
    sep=tokenizer.sep,
    mask=tokenizer.mask,
    pad=tokenizer.pad,
    ordinary=np.setdiff1d(np.arange(tokenizer.vocab_size), tokenizer.special_ids),
    starts_word_V=tokenizer.starts_word_V,
  )
