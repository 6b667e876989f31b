"""The story of a preparation: find the input, plan the stages, run them, report."""

import functools
import json
from typing import Any, NamedTuple

from etils import epath

from llm import cache
from llm.checkpoints import locate, manager
from llm.core import UserError
from llm.corpus import config as corpus_config
from llm.corpus import decontamination, executors, inputs, report, stages
from llm.data import shards, tokenizer_training
from llm.data import tokenizer as tokenizer_lib
from llm.runs import workdir

PLAN = "prepare.json"  # in the output: the config and the pieces that it was begun with


class Planned(NamedTuple):
  """What a preparation will do. tokenizer: the one that the config names; None trains one."""

  plan: list[stages.Stage]
  output: stages.Output
  pieces: list[inputs.Piece]
  tokenizer: tokenizer_lib.Tokenizer | None


def planned(settings: corpus_config.Prepare, folder: epath.Path) -> Planned:
  """The plan of a corpus in `folder`. The input is listed here. Raises UserError on bad input."""
  output = stages.Output(str(folder))
  pieces = _pieces(settings)
  tokenizer = _given_tokenizer(settings.tokenizer)
  plan = stages.plan(settings, pieces, output, trains_tokenizer=tokenizer is None)
  return Planned(plan, output, pieces, tokenizer)


def prepare(
  settings: corpus_config.Prepare, folder: epath.Path, where: executors.Where
) -> dict[str, Any] | None:
  """Prepares a corpus in `folder`, or goes on with it. Returns the figures of report.json.

  On Slurm the stages are only submitted: None. Raises UserError on bad input, on a folder that
  another config or other files began, where a task fails, and where no document is left.
  """
  plan, output, pieces, tokenizer = planned(settings, folder)
  index = {}
  if "decontaminate" in settings.steps:
    index = decontamination.index(settings.settings["decontaminate"])
  given = {
    "tokenizer": tokenizer.digest() if tokenizer else "",
    "decontamination": cache.digest(*(array.tobytes() for array in index.values())),
  }
  folder.mkdir(parents=True, exist_ok=True)
  with workdir.locked(folder):
    _check_plan(folder, settings, pieces, given)
    if tokenizer:
      tokenizer.save(folder / "shards" / shards.TOKENIZER)
    if index:
      decontamination.write_index(index, output.work)
    executors.run(plan, output, where, functools.partial(report.write, plan, output))
  if where.executor == "slurm":
    return None
  figures = json.loads((folder / "report.json").read_text())
  _check_documents(figures, settings, folder)
  return figures


def _check_documents(figures: dict[str, Any], settings: corpus_config.Prepare, folder: epath.Path):
  """Raises UserError where no document could be read, or none is left."""
  if not figures["documents_in"]:
    raise UserError(
      f"config.input={settings.input}: no document could be read; "
      f"{'; '.join(figures['damaged']) or 'there is none in it'}"
    )
  if not figures["documents_out"]:
    emptied = next(step for step in figures["steps"] if not step["documents_out"])
    raise UserError(
      f"no document is left of {figures['documents_in']:,}: the step {emptied['name']} dropped the "
      f"last {emptied['documents_in']:,} ({', '.join(emptied['dropped'])}); see {folder}/report.md"
    )


def _pieces(settings: corpus_config.Prepare) -> list[inputs.Piece]:
  if settings.input.startswith("hf:"):
    return [inputs.Piece(settings.input, 0, 0, 0)]
  _, endings = corpus_config.READERS[settings.reader]
  return inputs.find(settings.input, endings)


def _given_tokenizer(settings: corpus_config.Tokenizer) -> tokenizer_lib.Tokenizer | None:
  """The tokenizer that the config names; None where one is to be trained."""
  if settings.checkpoint:
    return manager.load_tokenizer(locate.find(settings.checkpoint))
  if settings.name == "sentencepiece" and not settings.path:
    return None
  return tokenizer_training.make(settings, (), cache.cache_dir())


def _check_plan(
  folder: epath.Path,
  settings: corpus_config.Prepare,
  pieces: list[inputs.Piece],
  given: dict[str, str],
):
  """Raises UserError where the output was begun with another config or other files.

  given: digests of what the config names and that may change: tokenizer, evaluation texts.
  """
  files = [[piece.path, piece.start, piece.stop, piece.size] for piece in pieces]
  plan = {"config": corpus_config.thaw(settings), "pieces": files, "given": given}
  now = json.loads(json.dumps(plan))
  path = folder / PLAN
  if not path.exists():
    path.write_text(json.dumps(now, indent=1))
    return
  try:
    before = json.loads(path.read_text())
    groups = [*now["config"], *before["config"]]
    other = [g for g in groups if before["config"].get(g) != now["config"].get(g)]
    same_files = before["pieces"] == now["pieces"]
    changed = [name for name in given if before["given"][name] != given[name]]
  except (ValueError, TypeError, KeyError, AttributeError):
    raise UserError(f"{path} is damaged: give another --output, or delete this one")
  if other:
    raise UserError(
      f"{folder} was begun with another config.{other[0]}: give another --output, or delete it"
    )
  if changed:
    raise UserError(
      f"{folder} was begun with another {changed[0]} than {settings.input} gets now: give another "
      "--output"
    )
  if not same_files:
    raise UserError(f"{folder} was begun with other input files: give another --output")
