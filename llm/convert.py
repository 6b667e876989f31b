"""Convert checkpoints from and to the layouts of other packages.

A folder of transformers, or one of the hub, becomes a checkpoint of ours:
  python -m llm.convert from_hf --source=DIR|hf:NAME|embedded:minilm --output=DIR [--tokenizer=PATH]
A decoder of llama.cpp becomes a checkpoint of ours:
  python -m llm.convert from_gguf --source=FILE.gguf|embedded:smollm2 --output=DIR
A checkpoint of ours becomes a folder that from_pretrained of transformers loads:
  python -m llm.convert to_hf --checkpoint=DIR --output=DIR
Its adapters and head, alone, become a folder of the package peft:
  python -m llm.convert adapters --checkpoint=DIR --output=DIR
Token shards become text, JSON lines in parts:
  python -m llm.convert shards --source=DIR --output=DIR
"""

import itertools
import json
import os
import pathlib
import sys
from typing import Callable

import tqdm
from absl import flags

from llm import cache, command, storage
from llm.checkpoints import export, gguf, huggingface, locate
from llm.config import DataConfig
from llm.core import UserError
from llm.data import sources

_SOURCE = flags.DEFINE_string(
  "source",
  None,
  "A folder of transformers, hf:ORG/NAME, a GGUF file, embedded:NAME, or shards of llm.prepare.",
)
_TOKENIZER = flags.DEFINE_string(
  "tokenizer", None, "A file or a folder, for weights that come without a tokenizer."
)
_CHECKPOINT = flags.DEFINE_string(
  "checkpoint", None, "A workdir, its checkpoints folder or one step."
)
_OUTPUT = flags.DEFINE_string("output", None, "The folder to write; must not exist.")

DOCUMENTS_A_FILE = 100_000


def _output() -> pathlib.Path:
  """The folder to write. Raises UserError if it exists or is not on this machine."""
  if not _OUTPUT.value:
    raise UserError("--output is missing: the folder to write")
  if storage.is_bucket(_OUTPUT.value):
    raise UserError(
      f"--output={_OUTPUT.value}: give a folder of this machine; a checkpoint of ours may be "
      "copied to a bucket as it is"
    )
  output = pathlib.Path(os.path.expanduser(_OUTPUT.value)).absolute()
  if output.exists():
    raise UserError(f"--output={output} exists: choose another, or remove it")
  return output


def _import_with(read: Callable[[pathlib.Path], huggingface.Converted]):
  """Writes what `read` makes of --source as a workdir of ours."""
  output = _output()
  if not _SOURCE.value:
    raise UserError("--source is missing: what to convert")
  source = locate.foreign(_SOURCE.value, cache.cache_dir())
  if source is None:
    source = pathlib.Path(os.path.expanduser(_SOURCE.value)).absolute()

  def write(folder: pathlib.Path):
    huggingface.write(*read(source), folder, str(source))

  cache.made_once(output, write)
  print(f"{output} is a checkpoint: `python -m llm.show checkpoint --checkpoint={output}` lists it")


def _read_published(source: pathlib.Path) -> huggingface.Converted:
  """What --source holds, in the layout of transformers, with --tokenizer."""
  if not _TOKENIZER.value:
    return huggingface.read(source)
  return huggingface.read(source, pathlib.Path(os.path.expanduser(_TOKENIZER.value)))


def _export_with(write: Callable[..., None], package: str):
  """Writes --checkpoint as a folder of another package, by `write(step, folder)`."""
  output = _output()
  if not _CHECKPOINT.value:
    raise UserError(
      "--checkpoint is missing: a workdir of llm.train, its checkpoints folder or one step"
    )
  step = locate.find(_CHECKPOINT.value)
  cache.made_once(output, lambda folder: write(step, folder))
  print(f"{output} is a folder of {package}: from_pretrained({str(output)!r}) loads it")


def _shards_to_text():
  """Writes the documents of the shards of --source as files of JSON lines."""
  output = _output()
  if not _SOURCE.value:
    raise UserError("--source is missing: the shards/ of llm.prepare")
  source = sources.parse_one(f"shards:{_SOURCE.value}", DataConfig())

  def write(folder: pathlib.Path):
    records = iter(tqdm.tqdm(source.records(), unit=" documents", disable=None))
    numbers = itertools.count()
    while part := list(itertools.islice(records, DOCUMENTS_A_FILE)):
      with open(folder / f"{next(numbers):05d}.jsonl", "w", encoding="utf-8") as file:
        file.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in part)

  cache.made_once(output, write)
  print(f"{output} holds the documents: --config.data.train=jsonl:{output} trains on them")


VERBS = {
  "from_hf": lambda: _import_with(_read_published),
  "from_gguf": lambda: _import_with(gguf.read),
  "to_hf": lambda: _export_with(export.to_transformers, "transformers"),
  "adapters": lambda: _export_with(export.to_peft, "peft"),
  "shards": _shards_to_text,
}


if __name__ == "__main__":
  command.run_verb("llm.convert", VERBS, sys.argv)
