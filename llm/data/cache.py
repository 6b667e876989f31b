"""Where what was made once is kept: archives, token caches, packing plans, compiled programs."""

import hashlib
import os
import pathlib
import shutil
import tempfile
from typing import Callable

from llm.core import UserError


def cache_dir(configured: str = "") -> pathlib.Path:
  """`configured`, else $PRETUNE_CACHE, else ~/.cache/pretune. Made if it is not there."""
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
  """SHA-256 over the parts, each with its length, so that no two lists collide."""
  sha = hashlib.sha256()
  for part in parts:
    data = part.encode() if isinstance(part, str) else part
    sha.update(len(data).to_bytes(8, "little"))
    sha.update(data)
  return sha.hexdigest()


def file_digest(path) -> str:
  """SHA-256 of a file's bytes."""
  with open(path, "rb") as file:
    return hashlib.file_digest(file, "sha256").hexdigest()


def made_once(folder: pathlib.Path, make: Callable[[pathlib.Path], None]) -> pathlib.Path:
  """`folder`, filled by `make` if it is not there; a run cut off leaves nothing half made."""
  if not folder.exists():
    folder.parent.mkdir(parents=True, exist_ok=True)
    scratch = pathlib.Path(tempfile.mkdtemp(dir=folder.parent, prefix=".making-"))
    try:
      make(scratch)
      try:
        scratch.rename(folder)
      except OSError as error:  # another process was first: what it made is the same
        if not folder.exists():
          raise RuntimeError(f"{scratch} could not be renamed to {folder}") from error
    finally:
      shutil.rmtree(scratch, ignore_errors=True)
  return folder
