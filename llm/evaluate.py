"""Score a checkpoint, or answers in a file, on labelled data.

python -m llm.evaluate --checkpoint=DIR [--config.data.eval=SOURCE] [--config.data.fields=...]
python -m llm.evaluate --predictions=FILE.json --config.data.eval=squad:FILE.json

A checkpoint is scored on the data that it was evaluated on in training, unless config.data.eval
names other data. Figures that are made of records come with a 95% bootstrap interval over the
records. Text-to-text models also write their targets themselves, greedily.
"""

import dataclasses
import json
import pathlib

import jax
import numpy as np
import tabulate
from absl import flags
from etils import epath

from llm import command, core, sharding
from llm import config as config_lib
from llm.checkpoints import locate
from llm.config import Config, DataConfig, MeshConfig
from llm.core import UserError
from llm.data import answers, batches, sources
from llm.inference import writer
from llm.objectives import base
from llm.runs import metrics
from llm.training import consistency, evaluation, reference
from llm.training import experiment as experiment_lib

_CHECKPOINT = flags.DEFINE_string(
  "checkpoint", None, "A workdir, its checkpoints folder or one step."
)
_PREDICTIONS = flags.DEFINE_string(
  "predictions", None, "Answers to score, {id: text}, in place of a checkpoint's."
)
_DATA = {
  "eval": flags.DEFINE_string("config.data.eval", "", "The source to score on."),
  "fields": flags.DEFINE_string("config.data.fields", "", "Renames fields: text=THEIRS,.."),
  "cache": flags.DEFINE_string("config.data.cache", "", "The folder of the cache."),
  "sentences": flags.DEFINE_string("config.data.sentences", "", "split or lines."),
}
_LENGTH = flags.DEFINE_integer(
  "config.training.sequence_length", 0, "Tokens a row; 0: as in training.", lower_bound=0
)
_REFERENCE = flags.DEFINE_string(
  "config.transfer.checkpoint", "", "The reference of preferences, where it was moved."
)
_BATCH_SIZE = flags.DEFINE_integer(
  "config.training.batch_size", 0, "Examples at a time; 0: as in training.", lower_bound=0
)


def _print_figures(
  figures: dict[str, float],
  intervals: dict[str, tuple[float, float]],
  source: str,
  scored: str,
  count: str,
):
  """Prints the figures as a table, and then as one line of JSON.

  scored: the checkpoint or the file that they are about. count: how many records, in words.
  """
  cells = []
  for name, value in sorted(figures.items()):
    interval = ""
    if name in intervals:
      low, high = intervals[name]
      interval = f"[{low:.4f}, {high:.4f}]"
    cells.append((name, f"{value:.4f}", interval))
  print(
    tabulate.tabulate(
      cells,
      headers=(f"{source}, {count}", "", "95% interval"),
      disable_numparse=True,
      colalign=("left", "right", "left"),
    )
  )
  record = {"checkpoint": scored, "source": source, **figures, "intervals": intervals}
  print(json.dumps(metrics.as_json(record)))


def _data(saved: DataConfig) -> DataConfig:
  """The keys of the data that the command line sets, else those of the checkpoint."""
  given = {name: flag.value for name, flag in _DATA.items() if flag.present}
  return config_lib.build(DataConfig, dataclasses.asdict(saved) | given, "config.data")


def _with_reference(saved: Config) -> Config:
  transfer = saved.transfer
  if _REFERENCE.value:
    transfer = dataclasses.replace(transfer, checkpoint=_REFERENCE.value)
  return dataclasses.replace(saved, transfer=transfer)


def _means(outcomes: dict[str, np.ndarray]) -> dict[str, float]:
  return {name: float(values.mean()) for name, values in outcomes.items()}


def _score_predictions(path: str):
  """Prints how good the answers of a file are."""
  data = _data(DataConfig())
  if not data.eval:
    raise UserError("--predictions needs the questions: --config.data.eval=squad:FILE.json")
  source = sources.parse_one(data.eval, data)
  outcomes = answers.of_file(pathlib.Path(path), source)
  intervals = metrics.bootstrap(_means, outcomes)
  count = f"{len(outcomes['f1'])} questions"
  _print_figures(_means(outcomes), intervals, source.spec, path, count)


def _score_checkpoint(step: epath.Path):
  """Prints how good a checkpoint is on its evaluation source."""
  saved = experiment_lib.from_checkpoint(step)
  objective = saved.objective
  data = _data(saved.config.data)
  training = saved.config.training
  # As much at a time as in training, which works through a batch in parts.
  of_part = max(1, training.batch_size // saved.config.optimizer.grad_accum_steps)
  examples = _BATCH_SIZE.value or of_part
  if not data.eval:
    raise UserError(
      "the checkpoint was trained without evaluation data: give --config.data.eval=SOURCE"
    )
  source = sources.parse_one(data.eval, data)
  length = _LENGTH.value or training.sequence_length
  consistency.check_task(objective, saved.config.model, length)
  rows = objective.eval_rows(source, saved.tokenizer, data, saved.config.model, length)
  batch_size = batches.rows_a_batch(examples, 1, [rows], [1.0])
  command.start_cpu()
  mesh = sharding.make_mesh(MeshConfig())
  batch_size = core.round_up(min(batch_size, len(rows)), mesh.size)
  with jax.set_mesh(mesh):
    predict_reference = reference.predictor(
      _with_reference(saved.config), objective, saved.tokenizer, batch_size, mesh, print
    )
    rows = objective.with_reference(rows, predict_reference)
    bundle = experiment_lib.load(step)
    figures, predictions = evaluation.of_checkpoint(
      bundle, objective, rows, length, batch_size, mesh
    )
  outcomes = objective.outcomes(predictions, rows)
  if isinstance(objective, base.Writes):
    outcomes |= objective.written(writer.in_batches(bundle, examples), rows)
  figures = {**figures, **objective.summary(outcomes)}
  intervals = metrics.bootstrap(objective.summary, outcomes)
  _print_figures(figures, intervals, source.spec, str(step), f"{rows.examples} examples")


def main():
  """Scores what the flags name: a file of answers or a checkpoint."""
  if _PREDICTIONS.value:
    _score_predictions(_PREDICTIONS.value)
  elif _CHECKPOINT.value:
    _score_checkpoint(locate.find(_CHECKPOINT.value))
  else:
    raise UserError(
      "--checkpoint is missing: a workdir of llm.train, its checkpoints folder or one step"
    )


if __name__ == "__main__":
  command.run(main)
