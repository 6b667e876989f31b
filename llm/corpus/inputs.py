"""The files of a corpus, on this machine or in a bucket, cut into pieces: a piece is a task."""

import dataclasses
import io
import os
import pathlib
import re
from typing import Any, BinaryIO, Iterator, cast

import fsspec

from llm.core import UserError, first_line
from llm.data import compressed

# A file that can be read from within is cut into pieces of about so many bytes.
PIECE = 64 * 2**20
# Every stream of a bz2 file begins so: its header, its block size, and the digits of pi.
BZ2_STREAM = re.compile(rb"BZh[1-9]1AY&SY")
CHUNK = 2**20


@dataclasses.dataclass(frozen=True)
class Piece:
  """A file, or the part of it whose records begin at bytes start .. stop-1. size: of the file."""

  path: str
  start: int
  stop: int
  size: int

  @property
  def name(self) -> str:
    """Where the piece is from: the file, and the byte where it begins."""
    file = self.path.rsplit("/", 1)[-1]
    return f"{file}@{self.start}" if self.start else file

  def open(self) -> BinaryIO:
    """The file as its bytes are stored."""
    stored: Any = fsspec.open(self.path, "rb")
    return cast(BinaryIO, io.BufferedReader(stored.open()))  # files of buckets lack methods

  def chunks(self) -> Iterator[bytes]:
    """The decompressed bytes of the piece. Raises OSError or EOFError where it is damaged.

    A piece of a bz2 file holds the streams that begin in it. Any other file is taken whole.
    """
    if self.path.endswith(".bz2"):
      yield from _bz2_streams(self)
      return
    with self.open() as stored, decompressed(stored, self.path) as file:
      while chunk := file.read(CHUNK):
        yield chunk

  def beyond(self) -> Iterator[bytes]:
    """What follows the piece, for what begins in it and ends behind it."""
    if self.stop < self.size:
      yield from dataclasses.replace(self, start=self.stop, stop=self.size).chunks()

  def lines(self, longest: int) -> Iterator[bytes]:
    """The lines that begin in the piece, and the first `longest` bytes of what is longer.

    Raises OSError or EOFError where it is damaged.
    """
    is_cut = self.stop < self.size or self.start > 0
    with self.open() as stored, decompressed(stored, self.path) as file:
      if self.start:
        file.seek(self.start - 1)
        _rest_of_line(file)
      while not (is_cut and file.tell() >= self.stop):
        line = file.readline(longest + 1)
        if not line:
          return
        if len(line) > longest and not line.endswith(b"\n"):
          _rest_of_line(file)
        yield line


def _rest_of_line(file: BinaryIO) -> None:
  while (rest := file.readline(CHUNK)) and not rest.endswith(b"\n"):
    pass


def decompressed(stored: BinaryIO, path: str) -> BinaryIO:
  """A file that is read decompressed, by the ending of its path."""
  name = pathlib.PurePath(path)
  if not compressed.ending(name):
    return stored
  file: Any = compressed.decompressed(stored, name)
  return cast(BinaryIO, io.BufferedReader(file))  # streams of pyarrow have no readline


def _bz2_streams(piece: Piece) -> Iterator[bytes]:
  """The decompressed streams that begin in the piece: those of a multistream dump can be told."""
  import bz2

  with piece.open() as file:
    offset = _first_stream(file, piece)
    if offset is None:
      return
    file.seek(offset)
    data = file.read(CHUNK)
    while data and offset < piece.stop:
      stream = bz2.BZ2Decompressor()
      while not stream.eof:
        if not data:
          raise EOFError("the file is cut off")
        offset += len(data)
        yield stream.decompress(data, CHUNK)
        while not stream.eof and not stream.needs_input:
          yield stream.decompress(b"", CHUNK)  # a megabyte may stand for gigabytes
        data = b"" if stream.eof else file.read(CHUNK)
      data = stream.unused_data
      offset -= len(data)
      data = data or file.read(CHUNK)


def _first_stream(file: BinaryIO, piece: Piece) -> int | None:
  """Where the first stream of the piece begins; None where none does."""
  if piece.start == 0:
    return 0
  overlap = 9  # a header may lie across two chunks
  file.seek(piece.start)
  offset = piece.start
  tail = b""
  while offset < piece.stop + overlap and (data := file.read(CHUNK)):
    data = tail + data
    if match := BZ2_STREAM.search(data):
      first = offset - len(tail) + match.start()
      return first if first < piece.stop else None
    offset += len(data) - len(tail)
    tail = data[-overlap:]
  return None


def ending(path: str) -> str:
  """The ending of a path without that of its compression: .jsonl of a.jsonl.gz.

  The files of a dump of Wikipedia have their pages behind it: .xml-p10p30302.bz2.
  """
  for compression in compressed.COMPRESSIONS:
    path = path.removesuffix(compression)
  path = re.sub(r"\.xml-p\d+p\d+[^/.]*$", ".xml", path)
  return "." + path.rsplit("/", 1)[-1].rsplit(".", 1)[-1].lower()


def find(spec: str, endings: tuple[str, ...]) -> list[Piece]:
  """The pieces of paths, patterns and folders, with commas between them, in order.

  A folder stands for the files in it, and in its subfolders, that have one of the endings. Paths
  may lie in a bucket (gs://). Raises UserError where there is no file, and on an unknown ending.
  """
  files: dict[str, int] = {}
  for part in filter(None, (part.strip() for part in spec.split(","))):
    files |= _files_of(part, endings)
  if not files:
    raise UserError(f"config.input={spec}: name files, patterns or folders")
  return [piece for path, size in sorted(files.items()) for piece in _cut(path, size)]


def _files_of(part: str, endings: tuple[str, ...]) -> dict[str, int]:
  """Path -> bytes of the files that a path, a pattern or a folder names."""
  system, path = _system(part)
  try:
    details: Any = system.glob(path, detail=True)
    files = {
      name: entry
      for name, entry in details.items()
      if entry["type"] == "file" or entry.get("islink") and system.isfile(name)
    }
    for folder in (name for name, entry in details.items() if entry["type"] == "directory"):
      _expect_no_linked_folder(folder)
      inside: Any = system.find(folder, detail=True)
      files |= {
        name: entry
        for name, entry in inside.items()
        if ending(name) in endings and not _is_left_out(name.removeprefix(folder))
      }
  except (OSError, ValueError) as error:
    raise UserError(f"config.input={part}: {first_line(error)}")
  if not details:
    raise UserError(f"config.input={part}: no such file, and no file matches it as a pattern")
  if not files:
    raise UserError(
      f"config.input={part}: no file in the folder ends in {' or '.join(endings)}, compressed "
      "or not"
    )
  for name in files:
    if ending(name) not in endings:
      raise UserError(
        f"config.input={part}: {name} ends in {ending(name)}, expected {' or '.join(endings)}, "
        "compressed (.gz, .bz2, .zst) or not"
      )
    if ending(name) == ".parquet" and not name.endswith(".parquet"):
      raise UserError(f"config.input={part}: {name}: Parquet files are not compressed as a whole")
  return {system.unstrip_protocol(name): entry["size"] for name, entry in files.items()}


def _is_left_out(path: str) -> bool:
  """Whether a path in a folder is hidden, or a .json that may say something of the data."""
  return "/." in path or path.endswith(".json")


def _expect_no_linked_folder(folder: str):
  """Raises UserError on a link to a folder, into which nothing would look."""
  for place, names, _ in os.walk(folder):
    for name in names:
      if os.path.islink(path := os.path.join(place, name)):
        raise UserError(f"{path} is a link to a folder: name it in config.input too, or remove it")


def _system(part: str) -> tuple[fsspec.AbstractFileSystem, str]:
  """The file system of a path, and the path in it."""
  try:
    return fsspec.core.url_to_fs(part, **({} if "://" in part else {"auto_mkdir": False}))
  except ImportError as error:
    raise UserError(f"config.input={part}: {first_line(error)}; for gs:// install the extra gcs")
  except ValueError as error:
    raise UserError(f"config.input={part}: {first_line(error)}")


def _cut(path: str, size: int) -> list[Piece]:
  """The pieces of a file: one, where it cannot be read from within."""
  is_dump = ending(path) == ".xml" and path.endswith(".bz2")
  can_be_cut = is_dump or path.endswith(".jsonl")
  count = max(1, round(size / PIECE)) if can_be_cut else 1
  bounds = [size * number // count for number in range(count + 1)]
  return [Piece(path, *span, size) for span in zip(bounds, bounds[1:])]
