"""The cache folder: archives, tokens, packing plans and compiled programs, each made once."""

import functools
import hashlib
import os
import pathlib
import shutil
import tempfile
from typing import Callable

from llm.core import UserError


def cache_dir(configured: str = "") -> pathlib.Path:
  """`configured`, else $PRETUNE_CACHE, else ~/.cache/pretune. Creates the folder.

  Raises UserError where the folder cannot be created.
  """
  path = pathlib.Path(configured or os.environ.get("PRETUNE_CACHE") or "~/.cache/pretune")
  path = path.expanduser().absolute()
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


def made_once(folder: pathlib.Path, make: Callable[[pathlib.Path], None]) -> pathlib.Path:
  """Returns `folder`. Where it does not exist, `make` fills it first.

  `make` fills a temporary folder, which is then renamed. An interrupted run leaves no incomplete
  folder.
  """
  if folder.exists():
    return folder
  folder.parent.mkdir(parents=True, exist_ok=True)
  scratch = pathlib.Path(tempfile.mkdtemp(dir=folder.parent, prefix=".making-"))
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
