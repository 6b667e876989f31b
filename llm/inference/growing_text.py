"""A text that grows by tokens and is given out as soon as no later token can change it."""

from typing import Sequence

from llm.data.tokenizer import Tokenizer

INCOMPLETE = "\ufffd"  # what decoders put in the place of half a character


class GrowingText:
  """Takes tokens and gives out text. It ends before the first of `stops`.

  before: tokens whose text goes on; an answer begins without any. Held back are the bytes of an
  unfinished character and what may be the beginning of a stop.
  """

  def __init__(self, tokenizer: Tokenizer, stops: Sequence[str] = (), before: Sequence[int] = ()):
    self.tokenizer = tokenizer
    self.stops = tuple(stops)
    self.ids = list(before)
    self.count = 0  # of the tokens that were taken
    self.stopped = False
    # Texts of tokens depend on their neighbours (spaces, bytes). So the tokens since `first` are
    # decoded together, and what they add to those before `read` is new.
    self._first = 0
    self._read = len(self.ids)
    self._held = ""

  @property
  def recent(self) -> tuple[int, ...]:
    """The last tokens, on which the text of the next one depends."""
    return tuple(self.ids[self._first :])

  def add(self, token: int) -> str:
    """The text that can be given out now."""
    self.ids.append(token)
    self.count += 1
    new = self._new()
    if new.endswith(INCOMPLETE):
      return ""
    self._first, self._read = self._read, len(self.ids)
    self._held += new
    return self._up_to_stop()

  def end(self) -> str:
    """What was held back. Half a character stays as INCOMPLETE."""
    if self.stopped:
      return ""
    self._held += self._new()
    text = self._up_to_stop()
    return text if self.stopped else text + self._held

  def _new(self) -> str:
    """What the tokens from `read` on add."""
    before = self.tokenizer.decode(self.ids[self._first : self._read])
    return self.tokenizer.decode(self.ids[self._first :])[len(before) :]

  def _up_to_stop(self) -> str:
    """Cuts what is held at a stop, and gives out what cannot be part of one."""
    places = [self._held.find(stop) for stop in self.stops if stop in self._held]
    if places:
      self.stopped = True
      text, self._held = self._held[: min(places)], ""
      return text
    safe = len(self._held) - self._beginning_of_stop()
    text, self._held = self._held[:safe], self._held[safe:]
    return text

  def _beginning_of_stop(self) -> int:
    """How many of the last characters held may be the beginning of a stop."""
    longest = 0
    for stop in self.stops:
      for size in range(min(len(stop) - 1, len(self._held)), longest, -1):
        if self._held.endswith(stop[:size]):
          longest = size
          break
    return longest
