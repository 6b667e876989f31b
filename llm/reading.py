"""What comes from outside is read here: regular files, within limits, and JSON of a declared shape.

A shape is a type that `msgspec` knows: a dataclass, dict[str, int], list[str] and so on, with the
bounds of a number beside it (Annotated[int, msgspec.Meta(ge=0)]). What has another shape is a
UserError that names the file and the field.
"""

import json
import os
import pathlib
import re
import stat
from typing import Any, Callable, TypeVar

import msgspec
from etils import epath

from llm import storage
from llm.core import UserError, first_line

Shape = TypeVar("Shape")
Path = str | pathlib.Path | epath.Path

# Bytes of a file that is read at once, and of a description in JSON.
MOST_BYTES = 2**32
MOST_JSON_BYTES = 2**28

# An escape in JSON that may be half of a character, which no encoding can write.
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
_KINDS = {
  stat.S_IFDIR: "a folder",
  stat.S_IFIFO: "a pipe",
  stat.S_IFCHR: "a device",
  stat.S_IFBLK: "a device",
  stat.S_IFSOCK: "a socket",
}


def check_file(path: Path, most_bytes: int | None = None) -> None:
  """Raises UserError unless a local path is a regular file of at most so many bytes.

  A pipe or a device is refused before it is opened: it may block, or never end.
  """
  try:
    status = os.stat(path)
  except (OSError, ValueError) as error:  # ValueError: a NUL in the name
    raise UserError(f"{path}: {getattr(error, 'strerror', None) or error}")
  if not stat.S_ISREG(status.st_mode):
    kind = _KINDS.get(stat.S_IFMT(status.st_mode), "no file")
    raise UserError(f"{path} is {kind}: give a regular file")
  if most_bytes is not None and status.st_size > most_bytes:
    raise UserError(f"{path} has {status.st_size:,} bytes; at most {most_bytes:,} are read")


def file_bytes(path: Path, most_bytes: int = MOST_BYTES) -> bytes:
  """The content of a file. Raises UserError where it cannot be read, or is too long.

  The length of a file of a bucket is not checked.
  """
  if not storage.is_bucket(str(path)):
    check_file(path, most_bytes)
  try:
    return epath.Path(path).read_bytes()
  except OSError as error:
    raise UserError(f"{path}: {error.strerror or 'it cannot be read'}")


def file_text(path: Path, most_bytes: int = MOST_BYTES) -> str:
  """The content of a file in UTF-8, without a byte-order mark. Raises UserError."""
  try:
    return file_bytes(path, most_bytes).decode("utf-8-sig")
  except UnicodeDecodeError as error:
    raise UserError(f"{path}: not UTF-8 at byte {error.start}; convert it, e.g. with iconv")


def json_value(text: str | bytes, where: str, as_object: Callable | None = None) -> Any:
  """The value of a JSON text. as_object: makes an object of its pairs of key and value.

  Raises UserError, which begins with `where`, on what is not JSON, is nested too deep, or has half
  of a surrogate pair in a string.
  """
  try:
    text = text if isinstance(text, str) else text.decode("utf-8-sig")
    value = json.loads(text, object_pairs_hook=as_object)
    if _SURROGATE.search(text):
      json.dumps(value, ensure_ascii=False).encode()
  except UnicodeEncodeError as error:
    half = error.object[error.start : error.start + 1].encode("ascii", "backslashreplace").decode()
    raise UserError(
      f"{where}: a string has {half}, half of a surrogate pair, which is no character"
    )
  except RecursionError:
    raise UserError(f"{where}: not JSON that can be read: it is nested too deep")
  except ValueError as error:
    raise UserError(f"{where}: not JSON: {first_line(error)}")
  return value


def shaped(value: Any, shape: type[Shape], where: str) -> Shape:
  """A value of JSON as the declared shape.

  Raises UserError, which begins with `where` and names the field, where it has another.
  """
  try:
    return msgspec.convert(value, shape, str_keys=True)
  except msgspec.ValidationError as error:
    message = first_line(error)
    raise UserError(f"{where}: {message[0].lower()}{message[1:]}")


def read_json(path: Path, shape: type[Shape], most_bytes: int = MOST_JSON_BYTES) -> Shape:
  """The content of a JSON file as the declared shape. Raises UserError that names the file."""
  return shaped(json_value(file_bytes(path, most_bytes), str(path)), shape, str(path))
