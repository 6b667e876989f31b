"""What passes and what is dropped: counts at every step, and documents to look at."""

import collections
import contextlib
import json
import pathlib
import time
from typing import Any, Iterator, Mapping

from datatrove.data import Document
from datatrove.io import DataFolder
from datatrove.pipeline.base import PipelineStep

SHOWN = 10  # documents to look at, by task and reason
MOST_REASONS = 100  # of a task
REASON = "_dropped_because"  # in the metadata, where a field of the user's may be called reason
EXCERPT = 2000  # characters of each


class Samples:
  """A file of documents to look at: the first `SHOWN` of every reason, in each task.

  A filter of datatrove writes what it drops into it, as into any of its writers.
  """

  def __init__(self, folder: DataFolder, name: str):
    self.folder = folder
    self.name = name
    self._file: Any = None
    self._count: collections.Counter[str] = collections.Counter()

  def __enter__(self) -> "Samples":
    return self

  def __exit__(self, *exception: Any) -> None:
    if self._file:
      self._file.close()
    self._file = None

  def write(self, document: Document, rank: int) -> None:
    """Keeps a document, if there is room for more of its reason."""
    metadata = document.metadata
    reason = str(metadata.get(REASON) or metadata.get("filter_reason") or self.name)
    if reason not in self._count and len(self._count) == MOST_REASONS:
      return
    self._count[reason] += 1
    if self._count[reason] > SHOWN:
      return
    if self._file is None:
      self._file = self.folder.open(f"{self.name}/{rank:05d}.jsonl", "wt")
    record = {
      "reason": reason,
      "id": document.id,
      "text": document.text[:EXCERPT],
      "metadata": {key: str(value)[:200] for key, value in metadata.items()},
    }
    self._file.write(json.dumps(record) + "\n")


class Passing(PipelineStep):
  """Counts the documents and characters that pass between two steps, and the time until they came.

  That time is that of all blocks before. samples: where to keep some of the documents.
  """

  type = "COUNT"

  def __init__(self, name: str, samples: Samples | None = None):
    self.name = name
    super().__init__()
    self.samples = samples

  def run(self, data: Any, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
    documents = iter(data)
    with self.samples or contextlib.nullcontext():
      while True:
        with self.track_time():
          document = next(documents, None)
        if document is None:
          return
        self.stat_update("documents")
        self.stat_update("characters", value=len(document.text))
        self.stat_update(f"length {len(document.text).bit_length()}")
        if self.samples:
          self.samples.write(document, rank)
        yield document


class Timed(PipelineStep):
  """The block that ends a stage, and the time that it takes itself, in milliseconds."""

  type = "COUNT"

  def __init__(self, block: PipelineStep):
    self.name = block.name
    super().__init__()
    self.block = block

  def run(self, data: Any, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
    waited = 0.0

    def documents() -> Iterator[Document]:
      nonlocal waited
      since = time.perf_counter()
      for document in data:
        waited += time.perf_counter() - since
        yield document
        since = time.perf_counter()

    start = time.perf_counter()
    collections.deque(self.block.run(documents(), rank, world_size) or (), maxlen=0)
    taken = time.perf_counter() - start - waited
    self.stat_update("milliseconds", value=round(1000 * taken))
    yield from ()


class Counts(dict[str, float]):
  """Name -> total of what a step counted in all tasks, and `seconds` that it took."""

  seconds: float = 0.0

  def count(self, name: str) -> int:
    return int(self.get(name, 0))

  def starting(self, prefix: str) -> dict[str, int]:
    """What follows the prefix -> its total, the largest first."""
    totals = {k.removeprefix(prefix): int(v) for k, v in self.items() if k.startswith(prefix)}
    return dict(sorted(totals.items(), key=lambda item: -item[1]))


def of_stage(logs: DataFolder) -> list[Counts]:
  """What each block of a stage counted, summed over the tasks that are done."""
  totals: list[Counts] = []
  for path in logs.list_files("stats"):
    with logs.open(path, "rt") as file:
      blocks = json.load(file)
    for number, block in enumerate(blocks):
      if number == len(totals):
        totals.append(Counts())
      totals[number].seconds += _total(block["time_stats"])
      for name, value in block["stats"].items():
        totals[number][name] = totals[number].get(name, 0) + _total(value)
  return totals


def _total(value: Mapping[str, Any] | float) -> float:
  """A total of datatrove: a number, or a mapping that has more to say."""
  return float(value.get("total") or 0.0) if isinstance(value, Mapping) else float(value)


def read_samples(folder: pathlib.Path, name: str) -> dict[str, list[dict[str, Any]]]:
  """Reason -> documents that a step kept to look at, at most `SHOWN`, of all tasks in turn."""
  by_task = []
  for path in sorted((folder / name).glob("*.jsonl")):
    by_task.append([json.loads(line) for line in path.read_text().splitlines()])
  shown: dict[str, list[dict[str, Any]]] = {}
  for place in range(max(map(len, by_task), default=0)):
    for records in by_task:
      if place < len(records) and len(shown.setdefault(records[place]["reason"], [])) < SHOWN:
        shown[records[place]["reason"]].append(records[place])
  return shown
