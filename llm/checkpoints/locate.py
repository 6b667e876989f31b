"""From what a user types as a checkpoint to a verified step of ours.

A workdir, its checkpoints/ or one step; a folder in the layout of transformers, a GGUF file, hf:ORG/NAME on the hub,
embedded:minilm or embedded:smollm2, which are converted once and kept in the cache.
"""

import pathlib

import jax
from etils import epath

from llm import storage
from llm.checkpoints import gguf, huggingface, manager
from llm.core import UserError
from llm.data import cache, embedded


def foreign(name: str, cache_folder: pathlib.Path) -> pathlib.Path | None:
  """The folder or file that hf:... or embedded:... stands for, fetched if need be; None for a path."""
  if name.startswith("hf:"):
    return huggingface.fetch(name.removeprefix("hf:"))
  if name.startswith("embedded:"):
    return embedded.model(name.removeprefix("embedded:"), cache_folder)
  return None


def find(name: str | pathlib.PurePath, say=print, cache_folder: str = "") -> epath.Path:
  """The step folder. Raises UserError where there is none, or it is damaged or not supported."""
  kept = cache.cache_dir(cache_folder)
  if storage.is_bucket(name):
    return manager.find(name, say)
  path = foreign(str(name), kept) or pathlib.Path(name).expanduser().absolute()
  if path.is_file():
    read, files = gguf.read, [path]
  elif huggingface.is_layout(path):
    read = huggingface.read
    files = sorted(
      p for p in path.iterdir() if p.suffix in (".json", ".jinja", ".safetensors", ".txt", ".model")
    )
  else:
    return manager.find(path, say)
  key = cache.digest(
    "converted 2", *(part for p in files for part in (p.name, cache.file_digest(p)))
  )
  if jax.distributed.is_initialized() and not (kept / "converted" / key[:32]).exists():
    raise UserError(
      f"{name} is not converted on every machine: make a workdir of it by `python -m llm.convert from_hf` (or from_gguf), "
      "in a place that all processes share, and give that"
    )
  workdir = cache.made_once(
    kept / "converted" / key[:32],
    lambda scratch: huggingface.write(*read(path), scratch, str(path)),
  )
  return manager.find(workdir, say)
