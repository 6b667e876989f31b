"""Documents between two stages: one file of JSON lines a task, compressed."""

import json
from typing import Any, Iterator

import pyarrow
from datatrove.data import Document
from datatrove.io import DataFolder
from datatrove.pipeline.base import PipelineStep


def file_of(rank: int) -> str:
  """The name of a task's file."""
  return f"{rank:05d}.jsonl.zst"


class Write(PipelineStep):
  """Writes the documents of a task, and passes them on. A task without documents has a file too."""

  type = "WRITE"
  name = "write"

  def __init__(self, folder: DataFolder):
    super().__init__()
    self.folder = folder

  def run(self, data: Any, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
    with (
      self.folder.open(file_of(rank), "wb") as stored,
      pyarrow.CompressedOutputStream(pyarrow.PythonFile(stored, "w"), "zstd") as file,
    ):
      for document in data:
        with self.track_time():
          record = {"text": document.text, "id": document.id, "metadata": document.metadata}
          file.write((json.dumps(record, default=str) + "\n").encode())
        yield document


class Read(PipelineStep):
  """Reads what `Write` wrote in the same task of a stage before."""

  type = "READER"
  name = "read"

  def __init__(self, folder: DataFolder):
    super().__init__()
    self.folder = folder

  def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
    yield from read_documents(self.folder, rank)


def read_documents(folder: DataFolder, rank: int) -> Iterator[Document]:
  """The documents that a task wrote, in order."""
  with (
    folder.open(file_of(rank), "rb") as stored,
    pyarrow.CompressedInputStream(pyarrow.PythonFile(stored), "zstd") as file,
  ):
    rest = b""
    while chunk := file.read(2**20):
      *lines, rest = (rest + chunk).split(b"\n")
      for line in lines:
        yield Document(**json.loads(line))
