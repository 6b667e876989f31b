"""Folders of runs and checkpoints: on this machine, or in an object store (gs://BUCKET/FOLDER)."""

import importlib.util
import os
import pathlib

from etils import epath

from llm.core import UserError, first_line


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
  try:
    # An empty bucket is a folder to its owner alone. Listing it tells others whether it exists.
    if not bucket.is_dir():
      next(bucket.iterdir(), None)
  except FileNotFoundError:
    raise UserError(f"{path}: there is no such bucket, or your credentials give no access to it")
  except Exception as error:  # gcsfs and the libraries below it raise many types
    raise UserError(f"{path} cannot be reached: {first_line(error)}")
