"""From files to documents. What cannot be read is counted with its reason, and the rest goes on."""

import csv
import json
import zlib
from typing import Any, Callable, Iterator, NamedTuple

from datatrove.data import Document
from datatrove.pipeline.base import PipelineStep

from llm.core import first_line
from llm.corpus import accounts
from llm.corpus.accounts import Samples
from llm.corpus.inputs import Piece, ending
from llm.data import sources

LONGEST = 64 * 2**20  # bytes of a document
DAMAGED = (OSError, EOFError, zlib.error, UnicodeDecodeError)


class Lost(NamedTuple):
  """A document that cannot be used. text: what there is to look at."""

  reason: str
  id: str
  text: str = ""


Items = Iterator[Document | Lost]


class Reader(PipelineStep):
  """The documents of the pieces of a task.

  read: yields the documents and the lost ones of one piece. It may raise what `DAMAGED` lists; what
  came before counts, and the file is named in the report.
  """

  type = "READER"
  name = "read"

  def __init__(self, read: Callable[[Piece], Items], pieces: list[Piece], dropped: Samples):
    super().__init__()
    self.read = read
    self.pieces = pieces
    self.dropped = dropped

  def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
    with self.dropped as dropped:
      for piece in self.pieces[rank::world_size]:
        self.stat_update("bytes", value=piece.stop - piece.start)
        for item in self._whole_items(piece):
          self.stat_update("documents_in")
          if isinstance(item, Document) and not item.text.strip():
            item = Lost("empty", item.id)
          if isinstance(item, Lost):
            self.stat_update("dropped", f"dropped_{item.reason}")
            metadata = {accounts.REASON: item.reason}
            dropped.write(Document(item.text, item.id, metadata=metadata), rank)
          else:
            yield item

  def _whole_items(self, piece: Piece) -> Items:
    """The items of a piece, up to where it is damaged."""
    items = self.read(piece)
    while True:
      try:
        with self.track_time():
          item = next(items, None)
      except DAMAGED as error:
        if _passes(error):
          raise
        self.stat_update(f"damaged {piece.path}: {first_line(error)}")
        return
      if item is None:
        return
      yield item


def _passes(error: Exception) -> bool:
  """Whether an error is of the system or the network, not of the file: the task is run again."""
  return isinstance(error, ConnectionError | TimeoutError) or (
    isinstance(error, OSError) and error.errno is not None
  )


def text_files(piece: Piece) -> Items:
  """The documents of a file of JSON lines, Parquet, CSV or text."""
  yield from TEXT_FILES[ending(piece.path)](piece)


def _document(record: dict[str, Any], id: str) -> Document | Lost:
  """A document from a record with `text`; its other fields become metadata."""
  text = record.pop("text", None)
  if not isinstance(text, str):
    return Lost("no_text_field", id, str(record)[:500])
  text = _without_surrogates(text)
  id = _without_surrogates(str(record.pop("id", id)))
  metadata = record.pop("metadata", None)
  return Document(text, id, metadata={**(metadata if isinstance(metadata, dict) else {}), **record})


def _without_surrogates(text: str) -> str:
  """Text that UTF-8 can hold: JSON may have lone surrogates."""
  return text.encode("utf-8", "replace").decode("utf-8")


def _jsonl(piece: Piece) -> Items:
  for number, line in enumerate(piece.lines(LONGEST)):
    id = f"{piece.name}:{number}"
    if len(line) > LONGEST:
      yield Lost("too_large", id)
      continue
    if not line.strip():
      continue
    if number == 0 and line.lstrip().startswith(b"["):
      raise OSError("it is a JSON array, expected an object a line")
    try:
      record = json.loads(line)
    except (ValueError, RecursionError) as error:
      yield Lost("not_json", id, first_line(error))
      continue
    yield _document(record, id) if isinstance(record, dict) else Lost("not_an_object", id)


def _text(piece: Piece) -> Items:
  """Blank lines separate the documents."""
  block: list[str] = []
  size = number = 0
  for line in piece.lines(LONGEST):
    stripped = line.decode("utf-8-sig", errors="replace").strip()
    if stripped:
      size += len(line)
      if size <= LONGEST:
        block.append(stripped)
      continue
    if block:
      yield _block(block, size, f"{piece.name}:{number}")
      number += 1
    block = []
    size = 0
  if block:
    yield _block(block, size, f"{piece.name}:{number}")


def _block(lines: list[str], size: int, id: str) -> Document | Lost:
  return Document("\n".join(lines), id) if size <= LONGEST else Lost("too_large", id)


def _csv(piece: Piece) -> Items:
  lines = (line.decode("utf-8-sig", errors="replace") for line in piece.lines(LONGEST))
  csv.field_size_limit(LONGEST)
  reader = csv.DictReader(lines)
  number = 0
  while True:
    id = f"{piece.name}:{number}"
    number += 1
    try:
      record = next(reader, None)
    except csv.Error as error:
      yield Lost("not_csv", id, str(error))
      continue
    if record is None:
      return
    yield _document({k: v for k, v in record.items() if k is not None}, id)


def _parquet(piece: Piece) -> Items:
  import pyarrow
  from pyarrow import parquet

  number = 0
  with piece.open() as file:
    try:
      for batch in parquet.ParquetFile(file).iter_batches(batch_size=256):
        for record in batch.to_pylist():
          yield _document(record, f"{piece.name}:{number}")
          number += 1
    except pyarrow.ArrowException as error:
      raise OSError(first_line(error))


TEXT_FILES: dict[str, Callable[[Piece], Items]] = {
  ".jsonl": _jsonl,
  ".ndjson": _jsonl,
  ".json": _jsonl,  # C4's files
  ".txt": _text,
  ".text": _text,
  ".csv": _csv,
  ".parquet": _parquet,
}


def hub(piece: Piece) -> Items:
  """The documents of a data set of the hub: piece.path is hf:NAME."""
  source = sources.parse_one(piece.path, sources.DataConfig())
  for number, record in enumerate(sources.KINDS["hf"].records(source)):
    record.pop("_where", None)
    yield _document(record, f"{piece.path}:{number}")
