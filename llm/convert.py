"""Checkpoints in the layout of transformers, in and out.

python -m llm.convert from_hf --source=DIR|hf:NAME|embedded:minilm --output=DIR      ours, from a folder or the hub
python -m llm.convert from_gguf --source=FILE.gguf|embedded:smollm2 --output=DIR   ours, from a decoder of llama.cpp
python -m llm.convert to_hf   --checkpoint=DIR     --output=DIR      a folder that from_pretrained loads
python -m llm.convert adapters --checkpoint=DIR    --output=DIR      adapters and head alone, for the package peft
"""

import pathlib
import sys

from absl import flags

from llm import command, storage
from llm.checkpoints import gguf, huggingface, locate
from llm.core import UserError
from llm.data import cache

_SOURCE = flags.DEFINE_string(
  "source", None, "A folder in the layout of transformers, hf:ORG/NAME or embedded:minilm."
)
_CHECKPOINT = flags.DEFINE_string(
  "checkpoint", None, "A workdir, its checkpoints folder or one step."
)
_OUTPUT = flags.DEFINE_string("output", None, "The folder to write; must not exist.")


def _output() -> pathlib.Path:
  if not _OUTPUT.value:
    raise UserError("--output is missing: the folder to write")
  if storage.is_bucket(_OUTPUT.value):
    raise UserError(
      f"--output={_OUTPUT.value}: give a folder of this machine; a checkpoint of ours may be copied to a bucket as it is"
    )
  output = pathlib.Path(_OUTPUT.value).expanduser().absolute()
  if output.exists():
    raise UserError(f"--output={output} exists: choose another, or remove it")
  return output


def _take_in(read):
  """What `read` makes of --source becomes a workdir of ours."""
  output = _output()
  if not _SOURCE.value:
    raise UserError("--source is missing: what to convert")
  source = (
    locate.foreign(_SOURCE.value, cache.cache_dir())
    or pathlib.Path(_SOURCE.value).expanduser().absolute()
  )
  cache.made_once(output, lambda scratch: huggingface.write(*read(source), scratch, str(source)))
  print(f"{output} is a checkpoint: `python -m llm.show checkpoint --checkpoint={output}` lists it")


def _give_out(write, what: str):
  """What `write` makes of --checkpoint becomes a folder of theirs."""
  output = _output()
  if not _CHECKPOINT.value:
    raise UserError(
      "--checkpoint is missing: a workdir of llm.train, its checkpoints folder or one step"
    )
  step = locate.find(_CHECKPOINT.value)
  cache.made_once(output, lambda scratch: write(step, scratch))
  print(f"{output} is a folder of {what}: from_pretrained({str(output)!r}) loads it")


VERBS = {
  "from_hf": lambda: _take_in(huggingface.read),
  "from_gguf": lambda: _take_in(gguf.read),
  "to_hf": lambda: _give_out(huggingface.export, "transformers"),
  "adapters": lambda: _give_out(huggingface.export_adapters, "peft"),
}


if __name__ == "__main__":
  command.run_verb("llm.convert", VERBS, sys.argv)
