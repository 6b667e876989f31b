"""Files that may be compressed, as their endings say."""

import bz2
import gzip
import pathlib
from typing import BinaryIO, cast

COMPRESSIONS = (".gz", ".bz2", ".zst")


def ending(path: pathlib.PurePath) -> str:
  """The ending of a compressed file; "" for any other file."""
  return path.suffix if path.suffix in COMPRESSIONS else ""


def open_decompressed(path: pathlib.Path) -> BinaryIO:
  """Opens a file for reading bytes, decompressed by its ending."""
  return decompressed(open(path, "rb"), path)


def decompressed(stored: BinaryIO, path: pathlib.PurePath) -> BinaryIO:
  """The decompressed bytes of an open file, by the ending of its path."""
  if ending(path) == ".gz":
    return cast(BinaryIO, gzip.GzipFile(fileobj=stored))
  if ending(path) == ".bz2":
    return cast(BinaryIO, bz2.BZ2File(stored))
  if ending(path) == ".zst":
    import pyarrow

    return pyarrow.CompressedInputStream(pyarrow.PythonFile(stored), "zstd")
  return stored
