"""From what a user types as a checkpoint to a verified step of ours.

A workdir, its checkpoints/ or one step; a folder in the layout of transformers, hf:ORG/NAME on the hub or
embedded:minilm, which are converted once and kept in the cache.
"""
import pathlib

from llm.checkpoints import huggingface, manager
from llm.data import cache, embedded


def foreign(name: str, cache_folder: pathlib.Path) -> pathlib.Path | None:
  """The folder that hf:... or embedded:... stands for, fetched if need be; None for a path."""
  if name.startswith("hf:"):
    return huggingface.fetch(name.removeprefix("hf:"))
  if name.startswith("embedded:"):
    return embedded.model_folder(name.removeprefix("embedded:"), cache_folder)
  return None


def find(name: str | pathlib.Path, say=print, cache_folder: str = "") -> pathlib.Path:
  """The step folder. Raises UserError where there is none, or it is damaged or not supported."""
  kept = cache.cache_dir(cache_folder)
  folder = foreign(str(name), kept) or pathlib.Path(name).expanduser().absolute()
  if not huggingface.is_layout(folder):
    return manager.find(folder, say)
  files = sorted(p for p in folder.iterdir() if p.suffix in (".json", ".safetensors", ".txt", ".model"))
  key = cache.digest(*(part for p in files for part in (p.name, cache.file_digest(p))))
  workdir = cache.made_once(kept / "converted" / key[:32],
                            lambda scratch: huggingface.convert(folder, scratch))
  return manager.find(workdir, say)
