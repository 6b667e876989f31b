"""From a config to stages: lists of blocks, each run by so many tasks, one stage after another.

Steps that look at one document at a time share a stage. A step that needs all documents at once
(duplicates.py) ends it.
"""

import dataclasses
import functools
from typing import Any

from datatrove.io import DataFolder
from datatrove.pipeline.base import PipelineStep

from llm.corpus import interim, readers
from llm.corpus.accounts import Passing, Samples, Timed
from llm.corpus.config import READERS, Prepare
from llm.corpus.decontamination import Decontaminate
from llm.corpus.duplicates import Barrier
from llm.corpus.inputs import Piece
from llm.corpus.shards import Tokenize, TrainTokenizer
from llm.corpus.steps import STEPS, OwnStep, imported


@dataclasses.dataclass(frozen=True)
class Stage:
  """Blocks through which tasks pass documents. A stage begins when the one before is done."""

  name: str
  blocks: list[PipelineStep]
  tasks: int


@dataclasses.dataclass(frozen=True)
class Output:
  """The folders of a prepared corpus."""

  path: str

  def folder(self, name: str) -> DataFolder:
    return _folder(f"{self.path}/{name}")

  @property
  def whole(self) -> DataFolder:
    return _folder(self.path)

  @property
  def samples(self) -> DataFolder:
    """Documents to look at."""
    return self.folder("samples")

  @property
  def documents(self) -> DataFolder:
    """The clean documents."""
    return self.folder("documents")

  @property
  def shards(self) -> DataFolder:
    return self.folder("shards")

  @property
  def work(self) -> DataFolder:
    """What one stage leaves for the next."""
    return self.folder("work")

  def logs(self, stage: str) -> DataFolder:
    return self.folder(f"logs/{stage}")


@functools.cache
def _folder(path: str) -> DataFolder:
  return DataFolder(path)


def plan(
  config: Prepare, pieces: list[Piece], output: Output, trains_tokenizer: bool
) -> list[Stage]:
  """All stages of a corpus, in order. Raises UserError on a step that cannot be made."""
  tasks = len(pieces)
  stages: list[Stage] = []
  read, _ = READERS[config.reader]
  if config.input.startswith("hf:"):
    read = readers.hub
  blocks: list[PipelineStep] = [readers.Reader(read, pieces, Samples(output.samples, "read"))]
  blocks.append(Passing("read"))
  begun_by = "read"
  for number, name in enumerate(config.steps):
    step = config.settings.get(name)
    if not isinstance(step, Barrier):
      blocks += [_block(name, step, output), Passing(name)]
      continue
    folder = output.folder(f"work/{number:02d}-{name}")
    passed_on = output.folder(f"work/{number:02d}-{name}/documents")
    ending = [interim.Write(passed_on), Timed(step.signatures(folder))]
    stages.append(Stage(begun_by, [*blocks, *ending], tasks))
    for finding in step.findings(folder):
      stages.append(Stage(f"{name}-{finding.name}", [finding.block], finding.tasks))
    begun_by = name
    blocks = [interim.Read(passed_on), *step.blocks(name, folder, output.samples), Passing(name)]
  kept = Passing("kept", Samples(output.samples, "kept"))
  stages.append(Stage(begun_by, [*blocks, kept, interim.Write(output.documents)], tasks))
  if trains_tokenizer:
    stages.append(Stage("tokenizer", [_tokenizer_training(config, tasks, output)], 1))
  tokenize = Tokenize(output.shards, config.shards.sentences)
  stages.append(Stage("tokenize", [interim.Read(output.documents), tokenize], tasks))
  return [dataclasses.replace(s, name=f"{n:02d}-{s.name}") for n, s in enumerate(stages)]


def _block(name: str, step: Any, output: Output) -> PipelineStep:
  """The block of a step that looks at one document at a time."""
  dropped = Samples(output.samples, name)
  if step is None:
    return OwnStep(name, imported(name, "config.steps", STEPS), dropped)
  if isinstance(step, Decontaminate):
    return step.block(name, dropped, output.work)
  return step.block(name, dropped)


def _tokenizer_training(config: Prepare, tasks: int, output: Output) -> PipelineStep:
  tokenizer = config.tokenizer
  return TrainTokenizer(
    output.documents,
    tasks,
    output.shards,
    tokenizer.vocab_size,
    tokenizer.lowercase,
    tokenizer.sentinels,
    tokenizer.sample,
  )
