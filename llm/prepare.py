"""Prepare a corpus: raw dumps to clean text and token shards, every document accounted for.

python -m llm.prepare --config=configs/prepare_wikipedia.py --output=DIR \\
    --config.input='dumps/*.xml.bz2' [--workers=N] [--executor=local|slurm|ray] [--dry_run]

The same command goes on where it stopped: tasks that are done are not run again.
"""

import functools
import json
import os
from typing import Any

from absl import flags
from ml_collections import config_flags

from llm import cache, command, config, storage
from llm.core import UserError

try:
  from llm.corpus import config as corpus_config
  from llm.corpus import decontamination, executors, inputs, report, stages
except ImportError as error:
  raise SystemExit(
    f"error: llm.prepare needs the extra corpus ({error}): pip install -e '.[corpus]'"
  ) from None
from llm.checkpoints import locate, manager
from llm.data import shards
from llm.data import tokenizer as tokenizer_lib
from llm.runs import workdir

_CONFIG = config_flags.DEFINE_config_file("config", None, "configs/prepare_*.py")
_OUTPUT = flags.DEFINE_string("output", None, "The folder of the corpus, or gs://BUCKET/FOLDER.")
_EXECUTOR = flags.DEFINE_enum("executor", "local", executors.NAMES, "Where the tasks run.")
_WORKERS = flags.DEFINE_integer(
  "workers", 0, "Tasks at a time; 0: one for each core of this machine.", lower_bound=0
)
_PARTITION = flags.DEFINE_string("partition", "", "The partition of Slurm to submit to.")
_TIME = flags.DEFINE_string("time", "20:00:00", "The time limit of Slurm for each task.")
_DRY_RUN = flags.DEFINE_bool("dry_run", False, "Show what would be run or submitted, and end.")

PLAN = "prepare.json"  # in the output: the config and the pieces it was begun with


def main():
  """Prepares the corpus of --config in --output."""
  if _CONFIG.value is None:
    raise UserError("--config is missing, e.g. --config=configs/prepare_text.py")
  if not _OUTPUT.value:
    raise UserError("--output is missing: the folder of the corpus")
  settings = corpus_config.freeze(_CONFIG.value)
  pieces = _pieces(settings)
  folder = storage.folder(_OUTPUT.value)
  output = stages.Output(str(folder))
  given = _tokenizer(settings.tokenizer)
  plan = stages.plan(settings, pieces, output, trains_tokenizer=given is None)
  workers = _WORKERS.value or os.cpu_count() or 1
  where = executors.Where(_EXECUTOR.value, workers, _PARTITION.value, _TIME.value)
  if _DRY_RUN.value:
    _show(plan, output, where)
    return
  folder.mkdir(parents=True, exist_ok=True)
  with workdir.locked(folder):
    _check_plan(folder, settings, pieces)
    if given:
      given.save(folder / "shards" / shards.TOKENIZER)
    if "decontaminate" in settings.steps:
      decontamination.write_index(settings.settings["decontaminate"], output.work)
    executors.run(plan, output, where, functools.partial(report.write, plan, output))
    if where.executor == "local":
      _say_what_came_out(folder, settings)


def _pieces(settings: corpus_config.Prepare) -> list[inputs.Piece]:
  if settings.input.startswith("hf:"):
    return [inputs.Piece(settings.input, 0, 0, 0)]
  _, endings = stages.READERS[settings.reader]
  return inputs.find(settings.input, endings)


def _tokenizer(settings: corpus_config.Tokenizer) -> tokenizer_lib.Tokenizer | None:
  """The tokenizer that the config names; None where one is to be trained."""
  if settings.checkpoint:
    return manager.load_tokenizer(locate.find(settings.checkpoint))
  if settings.name == "sentencepiece" and not settings.path:
    return None
  of_run = config.TokenizerConfig(
    settings.name, settings.path, settings.vocab_size, settings.lowercase, settings.sentinels
  )
  return tokenizer_lib.make(of_run, (), cache.cache_dir())


def _check_plan(folder: Any, settings: corpus_config.Prepare, pieces: list[inputs.Piece]):
  """Raises UserError where the output was begun with another config or other files."""
  now = {
    "config": corpus_config.thaw(settings),
    "pieces": [[p.path, p.start, p.stop, p.size] for p in pieces],
  }
  path = folder / PLAN
  if not path.exists():
    path.write_text(json.dumps(now, indent=1))
    return
  try:
    before = json.loads(path.read_text())
    keys = {**before["config"], **now["config"]}
    other = [
      k for k in keys if before["config"].get(k) != json.loads(json.dumps(now["config"])).get(k)
    ]
    same_files = before["pieces"] == now["pieces"]
  except (ValueError, TypeError, KeyError, AttributeError):
    raise UserError(f"{path} is damaged: give another --output, or delete this one")
  if other:
    raise UserError(
      f"{folder} was begun with another config.{other[0]}: give another --output, or delete it"
    )
  if not same_files:
    raise UserError(f"{folder} was begun with other input files: give another --output")


def _show(plan: list[stages.Stage], output: stages.Output, where: executors.Where):
  """Prints the stages, and for Slurm the scripts that would be submitted."""
  for stage in plan:
    blocks = ", ".join(block.name for block in stage.blocks)
    print(f"{stage.name}: {stage.tasks} tasks of {blocks}")
  if where.executor == "slurm":
    for name, script in executors.scripts(plan, output, where):
      print(f"\n# {name}\n{script}")


def _say_what_came_out(folder: Any, settings: corpus_config.Prepare):
  figures = json.loads((folder / "report.json").read_text())
  documents_in, documents_out = figures["documents_in"], figures["documents_out"]
  if not documents_out:
    emptied = next(step for step in figures["steps"] if not step["documents_out"])
    raise UserError(
      f"no document is left of {documents_in:,}: the step {emptied['name']} dropped the last "
      f"{emptied['documents_in']:,} ({', '.join(emptied['dropped'])}); see {folder}/report.md"
    )
  print(
    f"{documents_in:,} documents in, {documents_out:,} out, {documents_in - documents_out:,} "
    f"dropped; {figures['tokens']:,} tokens in {folder}/shards"
  )
  for where in figures["damaged"]:
    print(f"damaged: {where}")
  print(
    f"why, and documents to look at: {folder}/report.md\nnext:\n"
    f"  python -m llm.show corpus {folder}\n"
    "  python -m llm.train --config=configs/pretrain_bert.py:tiny --workdir=runs/bert "
    f"--config.data.train=shards:{folder}/shards"
  )


if __name__ == "__main__":
  command.run(main, check_key=corpus_config.check_key)
