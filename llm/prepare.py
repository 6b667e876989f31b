"""Prepare a corpus: raw dumps to clean text and token shards, every document accounted for.

python -m llm.prepare --config=configs/prepare_wikipedia.py --output=DIR \\
    --config.input='dumps/*.xml.bz2' [--workers=N] [--executor=local|slurm|ray] [--dry_run]

The same command goes on where it stopped: tasks that are done are not run again.
"""

import os

from absl import flags

from llm import command, config_file, storage
from llm.core import UserError

try:
  from llm.corpus import config as corpus_config
  from llm.corpus import executors, preparation, stages
except ImportError as error:
  raise SystemExit(
    f"error: llm.prepare needs the extra corpus ({error}): pip install -e '.[corpus]'"
  ) from None

_CONFIG = config_file.define("configs/prepare_*.py")
_OUTPUT = flags.DEFINE_string("output", None, "The folder of the corpus, or gs://BUCKET/FOLDER.")
_EXECUTOR = flags.DEFINE_enum("executor", "local", executors.NAMES, "Where the tasks run.")
_WORKERS = flags.DEFINE_integer(
  "workers", 0, "Tasks at a time; 0: one for each core of this machine.", lower_bound=0
)
_PARTITION = flags.DEFINE_string("partition", "", "The partition of Slurm to submit to.")
_TIME = flags.DEFINE_string("time", "20:00:00", "The time limit of Slurm for each task.")
_DRY_RUN = flags.DEFINE_bool("dry_run", False, "Show what would be run or submitted, and end.")


def read_config() -> corpus_config.Prepare:
  """The config of the command line. Raises UserError if it is missing or not valid."""
  if _CONFIG.value is None:
    raise UserError("--config is missing, e.g. --config=configs/prepare_text.py")
  return corpus_config.freeze(_CONFIG.value)


def main():
  """Prepares the corpus of --config in --output."""
  settings = read_config()
  if not _OUTPUT.value:
    raise UserError("--output is missing: the folder of the corpus")
  folder = storage.folder(_OUTPUT.value)
  workers = _WORKERS.value or os.cpu_count() or 1
  where = executors.Where(_EXECUTOR.value, workers, _PARTITION.value, _TIME.value)
  if _DRY_RUN.value:
    planned = preparation.planned(settings, folder)
    _show(planned.plan, planned.output, where)
    return
  figures = preparation.prepare(settings, folder, where)
  if figures is None:
    print(f"submitted; the report will be {folder}/report.md")
    return
  came_in, came_out = figures["documents_in"], figures["documents_out"]
  print(
    f"{came_in:,} documents in, {came_out:,} out, {came_in - came_out:,} dropped; "
    f"{figures['tokens']:,} tokens in {folder}/shards"
  )
  for path in figures["damaged"]:
    print(f"damaged: {path}")
  print(
    f"why, and documents to look at: {folder}/report.md\nnext:\n"
    f"  python -m llm.show corpus {folder}\n"
    "  python -m llm.train --config=configs/pretrain_bert.py:tiny --workdir=runs/bert "
    f"--config.data.train=shards:{folder}/shards"
  )


def _show(plan: list[stages.Stage], output: stages.Output, where: executors.Where):
  """Prints the stages, and for Slurm the scripts that would be submitted."""
  for stage in plan:
    blocks = ", ".join(block.name for block in stage.blocks)
    print(f"{stage.name}: {stage.tasks} tasks of {blocks}")
  if where.executor == "slurm":
    for name, script in executors.scripts(plan, output, where):
      print(f"\n# {name}\n{script}")


if __name__ == "__main__":
  command.run(main, check_key=corpus_config.check_key)
