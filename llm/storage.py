"""Folders of runs and checkpoints: on this machine, or in an object store (gs://BUCKET/FOLDER)."""

import base64
import importlib.util
import os
import pathlib
import threading
import uuid
from typing import Callable

from etils import epath

from llm.core import UserError, first_line

# Seconds within which a bucket must answer when a command begins.
ANSWERS_WITHIN = 15.0


def is_bucket(path: str | pathlib.PurePath) -> bool:
  """Whether a path lies in an object store.

  An object store writes whole files. It can neither rename nor lock.
  """
  return "://" in str(path)


def folder(path: str | pathlib.PurePath) -> epath.Path:
  """The folder of a run or checkpoint, as the user names it. A local path becomes absolute.

  Raises UserError where the name holds a pattern character, and where a bucket is missing or out of
  reach.
  """
  if patterns := set("*?[") & set(str(path)):
    raise UserError(
      f"{path}: {patterns.pop()} would be read as a pattern when checkpoints are listed there: "
      "choose another name"
    )
  if not is_bucket(path):
    return epath.Path(os.path.abspath(os.path.expanduser(path)))
  _check_bucket(str(path))
  return epath.Path(path)


def _check_bucket(path: str) -> None:
  """Raises UserError unless the bucket of gs://BUCKET/FOLDER can be listed."""
  scheme, _, location = path.partition("://")
  if scheme != "gs" or not location.strip("/"):
    raise UserError(f"{path} cannot hold a run: give a local folder, or gs://BUCKET/FOLDER")
  if not importlib.util.find_spec("gcsfs"):
    raise UserError(f"{path}: buckets need the extra gcs: pip install -e '.[gcs]'")
  from fsspec.config import conf as fsspec_settings

  # Orbax writes without fsspec, so a cached listing would miss its files.
  fsspec_settings.setdefault("gcs", {})["use_listings_cache"] = False
  bucket = epath.Path(f"gs://{location.split('/')[0]}")
  error = _error_of(lambda: _list(bucket))
  if isinstance(error, FileNotFoundError):
    raise UserError(f"{path}: there is no such bucket, or your credentials give no access to it")
  if error:
    raise UserError(f"{path} cannot be reached: {first_line(error)}")


def _list(bucket: epath.Path) -> None:
  """Raises where a bucket cannot be listed."""
  # An empty bucket is a folder to its owner alone. Listing it tells others whether it exists.
  if not bucket.is_dir():
    next(bucket.iterdir(), None)


def _error_of(function: Callable[[], None]) -> Exception | None:
  """What a call raises; a TimeoutError where it does not end within ANSWERS_WITHIN seconds.

  A store that is out of reach is tried again for minutes by the libraries that know it.
  """
  errors: list[Exception | None] = []

  def call():
    try:
      function()
      errors.append(None)
    except Exception as error:  # gcsfs and the libraries below it raise many types
      errors.append(error)

  thread = threading.Thread(target=call, daemon=True)
  thread.start()
  thread.join(ANSWERS_WITHIN)
  return errors[0] if errors else TimeoutError(f"no answer within {ANSWERS_WITHIN:g} s")


def write_whole(path: epath.Path, text: str) -> None:
  """Writes a file whole or not at all, also where others write it at the same time.

  Raises UserError where it cannot be written.
  """
  if is_bucket(path):  # a bucket never holds half a file
    path.write_text(text)
    return
  scratch = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}.tmp")
  try:
    scratch.write_text(text)
    scratch.replace(path)
  except OSError as error:
    scratch.unlink(missing_ok=True)
    raise UserError(f"{path} cannot be written: {error.strerror or error}")


def checksum(path: epath.Path) -> str:
  """The MD5 that an object store keeps of a file, in hexadecimal; "" where it keeps none."""
  import fsspec

  system, name = fsspec.core.url_to_fs(str(path))
  encoded = system.info(name).get("md5Hash", "")
  return base64.b64decode(encoded).hex()
