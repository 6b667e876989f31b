"""From what a user types as a checkpoint to a verified step of ours.

A workdir, its checkpoints/ or one step; a folder in the layout of transformers, or hf:ORG/NAME, which is
converted once and kept in the cache.
"""
import pathlib

from llm.checkpoints import huggingface, manager
from llm.data import cache


def find(name: str | pathlib.Path, say=print, cache_folder: str = "") -> pathlib.Path:
  """The step folder. Raises UserError where there is none, or it is damaged or not supported."""
  if str(name).startswith("hf:"):
    folder = huggingface.fetch(str(name).removeprefix("hf:"))
  else:
    folder = pathlib.Path(name).expanduser().absolute()
  if not huggingface.is_layout(folder):
    return manager.find(folder, say)
  files = sorted(p for p in folder.iterdir() if p.suffix in (".json", ".safetensors", ".txt", ".model"))
  key = cache.digest(*(part for p in files for part in (p.name, cache.file_digest(p))))
  workdir = cache.made_once(cache.cache_dir(cache_folder) / "converted" / key[:32],
                            lambda scratch: huggingface.convert(folder, scratch))
  return manager.find(workdir, say)
