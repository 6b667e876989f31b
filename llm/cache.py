"""The cache folder: archives, tokens, packing plans and compiled programs, each made once.

A folder of the cache has a record of its content, by which it is verified whenever it is opened.
What is damaged is named and made again.
"""

import contextlib
import fcntl
import functools
import hashlib
import json
import os
import pathlib
import shutil
import sys
import tempfile
import uuid
from typing import Callable, Iterator

from llm import reading
from llm.core import UserError

# In a folder of the cache: the size, time of change (ns) and SHA-256 of every other file.
RECORD = "content.json"
# A larger file is taken for unchanged where its size and time of change are those of the record.
# So opening a folder takes no longer than a tenth of a second or so for each of its files.
HASHED_BYTES = 2**27


def cache_dir(configured: str = "") -> pathlib.Path:
  """`configured`, else $PRETUNE_CACHE, else ~/.cache/pretune. Creates the folder.

  Raises UserError where the folder cannot be created.
  """
  path = pathlib.Path(configured or os.environ.get("PRETUNE_CACHE") or "~/.cache/pretune")
  path = pathlib.Path(os.path.expanduser(path)).absolute()
  try:
    path.mkdir(parents=True, exist_ok=True)
  except OSError as error:
    raise UserError(
      f"cannot make the cache folder {path}: {error.strerror}; "
      "set config.data.cache or PRETUNE_CACHE to a folder that can be written"
    )
  return path


def digest(*parts: str | bytes) -> str:
  """SHA-256 of the parts, in hexadecimal. Each part's length is hashed before it.

  So ("ab", "c") and ("a", "bc") have different digests.
  """
  sha = hashlib.sha256()
  for part in parts:
    data = part.encode() if isinstance(part, str) else part
    sha.update(len(data).to_bytes(8, "little"))
    sha.update(data)
  return sha.hexdigest()


def file_digest(path: str | os.PathLike[str]) -> str:
  """SHA-256 of a file's bytes, in hexadecimal. A file that stays the same is read once."""
  status = os.stat(path)
  return _digest_of(os.fspath(path), status.st_ino, status.st_size, status.st_mtime_ns)


@functools.lru_cache(maxsize=None)
def _digest_of(path: str, inode: int, size: int, changed_ns: int) -> str:
  with open(path, "rb") as file:
    return hashlib.file_digest(file, "sha256").hexdigest()


def kept(folder: pathlib.Path, make: Callable[[pathlib.Path], None]) -> pathlib.Path:
  """Returns a folder of the cache. Where it does not exist or is damaged, `make` fills it first."""

  def make_with_record(scratch: pathlib.Path) -> None:
    make(scratch)
    _write_record(scratch)

  if folder.exists() and not fault(folder):
    return folder
  with _alone(folder):
    # Another process may have made it meanwhile.
    if folder.exists() and (reason := fault(folder)):
      print(f"{folder}: {reason}; it is made again", file=sys.stderr, flush=True)
      discard(folder)
    return made_once(folder, make_with_record)


@contextlib.contextmanager
def _alone(folder: pathlib.Path) -> Iterator[None]:
  """Keeps other processes from making the folder; where files cannot be locked, nothing is kept."""
  folder.parent.mkdir(parents=True, exist_ok=True)
  path = folder.parent / f".lock-{folder.name}"
  with open(path, "w") as lock:
    with contextlib.suppress(OSError):
      fcntl.flock(lock, fcntl.LOCK_EX)
    try:
      yield
    finally:
      path.unlink(missing_ok=True)  # who waits for it finds the folder made
      with contextlib.suppress(OSError):
        fcntl.flock(lock, fcntl.LOCK_UN)  # a forked process may have it open too


def fault(folder: pathlib.Path) -> str:
  """What is wrong with a folder of the cache; "" where it is as it was made."""
  if not (folder / RECORD).exists():
    return "it has no record of its content"
  try:
    entries = reading.read_json(folder / RECORD, dict[str, tuple[int, int, str]])
  except UserError as error:
    return str(error)
  for name, (size, changed, sha256) in entries.items():
    path = folder / name
    try:
      status = path.stat()
    except (OSError, ValueError):
      return f"{name} is missing"
    if not path.is_file() or status.st_size != size:
      return f"{name} has not the {size:,} bytes that were written"
    as_recorded = size > HASHED_BYTES and status.st_mtime_ns == changed
    if not as_recorded and file_digest(path) != sha256:
      return f"the SHA-256 of {name} is not the one that was written"
  return ""


def _write_record(folder: pathlib.Path) -> None:
  entries = {}
  for path in sorted(filter(pathlib.Path.is_file, folder.rglob("*"))):
    status = path.stat()
    name = path.relative_to(folder).as_posix()
    entries[name] = (status.st_size, status.st_mtime_ns, file_digest(path))
  (folder / RECORD).write_text(json.dumps(entries))


def discard(folder: pathlib.Path) -> None:
  """Removes a folder of the cache. Another process may do so too, or have its files mapped."""
  with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".damaged-") as grave:
    with contextlib.suppress(FileNotFoundError):
      folder.rename(pathlib.Path(grave) / folder.name)


def made_once(folder: pathlib.Path, make: Callable[[pathlib.Path], None]) -> pathlib.Path:
  """Returns `folder`. Where it does not exist, `make` fills it first.

  `make` fills a temporary folder, which is then renamed. An interrupted run leaves no incomplete
  folder.
  """
  if folder.exists():
    return folder
  folder.parent.mkdir(parents=True, exist_ok=True)
  scratch = folder.parent / f".making-{uuid.uuid4().hex}"
  scratch.mkdir()  # others may read it, as the umask says; what tempfile makes, they may not
  try:
    make(scratch)
    try:
      scratch.rename(folder)
    except OSError as error:
      # If another process has made the folder meanwhile, its content is the same.
      if not folder.exists():
        raise RuntimeError(f"{scratch} could not be renamed to {folder}") from error
  finally:
    shutil.rmtree(scratch, ignore_errors=True)
  return folder
