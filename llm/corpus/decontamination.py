"""Documents that share long runs of words with an evaluation source."""

import dataclasses
from typing import Any, Iterator, NamedTuple, Sequence

import numpy as np
import xxhash
from datatrove.data import Document
from datatrove.io import DataFolder
from datatrove.pipeline.base import PipelineStep
from datatrove.pipeline.filters.base_filter import BaseFilter

from llm.config import DataConfig, key
from llm.core import UserError
from llm.data import embedded, sources, suspicions

INDEX = "decontamination.npz"


@dataclasses.dataclass(frozen=True)
class Decontaminate:
  """Drops documents that have a run of words in common with an evaluation source.

  Runs of 13 words as for GPT-3 (Brown et al. 2020, appendix C). A shorter evaluation text counts as
  a whole, if it has at least `least` words.
  """

  # Evaluation sources: ("embedded:reviews[test]", "jsonl:dev.jsonl").
  against: tuple = ()
  words: int = key(13, at_least=1)
  least: int = key(8, at_least=1)

  def block(self, name: str, dropped: Any, folder: DataFolder) -> PipelineStep:
    """folder: of the index."""
    return DecontaminationFilter(self, dropped, folder)


class Runs(NamedTuple):
  """The runs of one length. hashes: sorted, uint64. source: of each, its number."""

  hashes: np.ndarray
  source: np.ndarray


def index(step: Decontaminate) -> dict[str, np.ndarray]:
  """The runs of words of all evaluation sources, as the arrays of the index.

  Raises UserError where no source is named, one cannot be read, or one has no run.
  """
  if not step.against:
    raise UserError(
      "config.decontaminate.against names no evaluation source, e.g. "
      "\"('embedded:reviews[test]',)\"; leave decontaminate out of config.steps to do without"
    )
  runs_of_length: dict[int, dict[int, int]] = {}  # words of a run -> hash -> number of its source
  for number, spec in enumerate(step.against):
    for words in _long_enough(spec, step.least):
      length = min(step.words, len(words))
      runs = runs_of_length.setdefault(length, {})
      for digest in hashed_runs(words, length):
        runs.setdefault(digest, number)
  arrays = {}
  for length, runs in sorted(runs_of_length.items()):
    hashes = np.array(sorted(runs), np.uint64)
    arrays[f"hashes_{length}"] = hashes
    arrays[f"source_{length}"] = np.array([runs[int(h)] for h in hashes], np.uint16)
  return arrays


def _long_enough(spec: str, least: int) -> Iterator[list[str]]:
  """The words of each text of a source that has at least `least`. Raises UserError on none."""
  empty = True
  for record in sources.parse_one(spec, DataConfig()).records():
    for text in suspicions.texts_of(record):
      words = embedded.words_of(text).split()
      if len(words) >= least:
        empty = False
        yield words
  if empty:
    raise UserError(
      f"config.decontaminate.against: no text of {spec} has {least} words "
      "(config.decontaminate.least)"
    )


def write_index(arrays: dict[str, np.ndarray], folder: DataFolder) -> None:
  """Writes the index for the filter of every task."""
  with folder.open(INDEX, "wb") as file:
    np.savez(file, **arrays)  # pyright: ignore[reportArgumentType]


def read_index(folder: DataFolder) -> dict[int, Runs]:
  """Words of a run -> the runs of that length."""
  with folder.open(INDEX, "rb") as file:
    content = np.load(file)
    lengths = [int(name.removeprefix("hashes_")) for name in content if "hashes_" in name]
    return {n: Runs(content[f"hashes_{n}"], content[f"source_{n}"]) for n in lengths}


def hashed_runs(words: Sequence[str], length: int) -> list[int]:
  """The hash of every run of `length` words, in order."""
  starts = range(len(words) - length + 1)
  return [xxhash.xxh64_intdigest(" ".join(words[i : i + length])) for i in starts]


class DecontaminationFilter(BaseFilter):
  """Drops documents with a run of words of the index, and says which run and which source."""

  name = "decontaminate"

  def __init__(self, step: Decontaminate, dropped: Any, folder: DataFolder):
    super().__init__(dropped)
    self.step = step
    self.folder = folder
    self._index: dict[int, Runs] | None = None

  def filter(self, doc: Document) -> bool | tuple[bool, str]:
    if self._index is None:
      self._index = read_index(self.folder)
    words = embedded.words_of(doc.text).split()
    for length, runs in self._index.items():
      hashes = np.array(hashed_runs(words, length), np.uint64)
      places = np.searchsorted(runs.hashes, hashes)
      places = np.minimum(places, len(runs.hashes) - 1)
      shared = np.flatnonzero(runs.hashes[places] == hashes)
      if len(shared):
        first = int(shared[0])
        doc.metadata["shared"] = " ".join(words[first : first + length])
        source = self.step.against[runs.source[places[first]]]
        return False, f"shares words with {source}"
    return True
