"""Folders of this machine and of object stores (gs://BUCKET/FOLDER), as every command takes them."""

import importlib.util
import os
import pathlib

from etils import epath

from llm.core import UserError, first_line


def is_bucket(path: pathlib.PurePath) -> bool:
  """Whether a folder lies in an object store: files are written whole or not at all, and nothing is renamed or locked."""
  return "://" in str(path)


def folder(path: str | pathlib.PurePath) -> epath.Path:
  """A workdir or a checkpoint as the user gave it: a folder of this machine, made absolute, or gs://BUCKET/... .

  Raises UserError where the bucket cannot be reached.
  """
  if pattern := set("*?[") & set(str(path)):
    raise UserError(
      f"{path}: {pattern.pop()} would be read as a pattern by those who look for checkpoints there: choose another name"
    )
  if not is_bucket(path):
    return epath.Path(os.path.abspath(os.path.expanduser(path)))
  scheme, _, rest = str(path).partition("://")
  if scheme != "gs" or not rest.strip("/"):
    raise UserError(f"{path} is no place for a run: give a folder, or gs://BUCKET/FOLDER")
  if not importlib.util.find_spec("gcsfs"):
    raise UserError(f"{path}: buckets need the extra gcs: pip install -e '.[gcs]'")
  import fsspec

  fsspec.config.conf.setdefault("gcs", {})["use_listings_cache"] = (
    False  # Orbax writes behind its back
  )
  bucket = epath.Path(f"gs://{rest.split('/')[0]}")
  try:
    if not bucket.is_dir():  # which an empty one is to nobody but its owner
      next(bucket.iterdir(), None)
  except FileNotFoundError:
    raise UserError(f"{path}: there is no such bucket, or your credentials may not see it")
  except Exception as error:  # gcsfs and what it stands on have many kinds
    raise UserError(f"{path} cannot be reached: {first_line(error)}")
  return epath.Path(path)
