"""From the checkpoint that a user names to a verified step in this package's layout.

A name is a workdir, its checkpoints/ or one step; a folder in the layout of transformers, a GGUF
file, hf:ORG/NAME on the hub, embedded:minilm or embedded:smollm2. Checkpoints in other layouts are
converted once and kept in the cache.
"""

import os
import pathlib
from typing import Callable

import jax
from etils import epath

from llm import cache, reading, storage
from llm.checkpoints import gguf, huggingface, manager
from llm.core import UserError
from llm.data import embedded

LAYOUT_FILES = (".json", ".jinja", ".safetensors", ".txt", ".model")  # of transformers


def foreign(name: str, cache_folder: pathlib.Path) -> pathlib.Path | None:
  """The folder or file of hf:... or embedded:..., fetched where needed; None for a path.

  Raises UserError where it cannot be fetched.
  """
  if name.startswith("hf:"):
    return huggingface.fetch(name.removeprefix("hf:"))
  if name.startswith("embedded:"):
    return embedded.model(name.removeprefix("embedded:"), cache_folder)
  return None


def exact(name: str, step: epath.Path) -> str:
  """A name of the very step that `find` gave for a name, whatever its workdir saves later.

  What is fetched, built in or converted keeps its name.
  """
  folder = name if storage.is_bucket(name) else os.path.abspath(os.path.expanduser(name))
  return str(step) if step.is_relative_to(folder) else name


def find(
  name: str | pathlib.PurePath, say: Callable[[str], object] = print, cache_folder: str = ""
) -> epath.Path:
  """The verified step folder of a checkpoint. `say` reports steps that are passed over.

  Raises UserError where there is no checkpoint, or it is damaged or not supported.
  """
  cache_path = cache.cache_dir(cache_folder)
  if storage.is_bucket(name):
    return manager.find(name, say)
  path = foreign(str(name), cache_path) or pathlib.Path(os.path.expanduser(name)).absolute()
  if path.is_dir():
    if not huggingface.is_layout(path):
      return manager.find(path, say)
    files = sorted(file for file in path.iterdir() if file.suffix in LAYOUT_FILES)
    return _converted(name, path, huggingface.read, files, cache_path, say)
  if not path.exists():
    raise UserError(f"{path}: no such checkpoint folder")
  reading.check_file(path)
  return _converted(name, path, gguf.read, [path], cache_path, say)


def _converted(
  name: str | pathlib.PurePath,
  path: pathlib.Path,
  read: Callable[[pathlib.Path], huggingface.Converted],
  files: list[pathlib.Path],
  cache_path: pathlib.Path,
  say: Callable[[str], object],
) -> epath.Path:
  """The step in the cache that `read` converts from `path`. A damaged one is converted again.

  files: the files whose content decides whether the cache has it.
  """
  parts: list[str] = []
  for file in files:
    reading.check_file(file)
    parts += [file.name, cache.file_digest(file)]
  key = cache.digest("converted 2", *parts)
  workdir = cache_path / "converted" / key[:32]
  if workdir.exists():
    try:
      return manager.find(workdir, say)
    except UserError:
      say(f"{workdir} is damaged: {name} is converted again")
      cache.discard(workdir)
  if jax.distributed.is_initialized():
    raise UserError(
      f"{name} is not converted on every machine: make a workdir of it by `python -m llm.convert "
      "from_hf` (or from_gguf), in a place that all processes share, and give that"
    )
  cache.made_once(workdir, lambda scratch: huggingface.write(*read(path), scratch, str(path)))
  return manager.find(workdir, say)
