"""Words and sentences as datatrove splits them, by spaCy, many times as fast.

The filters and MinHash spend most of their time on it. Between spaces stand the same few runs of
letters and marks again and again, so each run is split once and its words are kept.
"""

import contextlib
import re
import sys
from typing import Any, Iterator

from datatrove.utils.word_tokenizers import SpaCyTokenizer


@contextlib.contextmanager
def _hidden(module: str) -> Iterator[None]:
  """In here, a module is as if it were not installed."""
  before = sys.modules.get(module)
  sys.modules[module] = None  # pyright: ignore[reportArgumentType]
  try:
    yield
  finally:
    del sys.modules[module]
    if before:
      sys.modules[module] = before


# spaCy imports torch, in seconds, for models that are not used here.
with _hidden("torch"):
  from spacy.lang.lex_attrs import is_punct
  from spacy.pipeline import Sentencizer

MOST_RUNS = 200_000  # that are kept, in about 50 MB
LONGEST_RUN = 64  # characters of a run that is kept
ENDS = frozenset(Sentencizer.default_punct_chars)
# What spaCy makes a word of, though it is none, or leaves out, though it is one.
UNUSUAL = re.compile(r"^\s|\s$|\s\s|[^\S ]|IS_ALPHA")


class Words(SpaCyTokenizer):
  """The tokenizer of English that the blocks of datatrove take as their `language`.

  Its words are those of datatrove, but for two oddities: IS_ALPHA, a name that spaCy keeps for
  itself, and an emoticon that another one with a space in it overlaps, such as ": -)-:".
  """

  def __init__(self) -> None:
    super().__init__("en")
    self._words_of: dict[str, list[str]] = {}

  def __reduce__(self) -> str:
    return "ENGLISH"  # a copy, or what another process gets, is the one of its process

  def word_tokenize(self, text: str) -> list[str]:
    words: list[str] = []
    for run in text.split():
      known = self._words_of.get(run)
      words += self._split(run) if known is None else known
    return words

  def _split(self, run: str) -> list[str]:
    words = super().word_tokenize(run)
    if len(run) <= LONGEST_RUN:
      if len(self._words_of) == MOST_RUNS:
        self._words_of.clear()
      self._words_of[run] = words
    return words

  def span_tokenize(self, text: str) -> list[tuple[int, int]]:
    """(start, end) of each sentence: one begins with the word after a mark that ends one."""
    words = self.word_tokenize(text)
    if not words or UNUSUAL.search(text):
      return super().span_tokenize(text)
    sentences: list[tuple[int, int]] = []
    start = end = 0
    is_ended = False
    for word in words:
      place = text.index(word, end)
      if word in ENDS:
        is_ended = True
      elif is_ended and not is_punct(word):
        sentences.append((start, end))
        start = place
        is_ended = False
      end = place + len(word)
    return [*sentences, (start, end)]


ENGLISH: Any = Words()  # blocks take it, though their `language` is annotated as a name
