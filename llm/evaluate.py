"""Score a checkpoint, on the data it was evaluated on or on other data; or answers in a file.

python -m llm.evaluate --checkpoint=DIR [--config.data.eval=SOURCE] [--config.data.fields=...]
python -m llm.evaluate --predictions=FILE.json --config.data.eval=squad:FILE.json

Figures that are made of records come with a 95% bootstrap interval over the records. Text-to-text models also write
their targets themselves, greedily.
"""

import dataclasses
import json
import pathlib

import jax
import ml_collections
import tabulate
from absl import flags
from ml_collections import config_flags

from llm import command, core, sharding
from llm.checkpoints import locate
from llm.config import DataConfig, MeshConfig
from llm.core import UserError
from llm.data import answers, batches, sources
from llm.inference import writer
from llm.objectives import base
from llm.runs import metrics
from llm.training import evaluation, reference
from llm.training import experiment as experiment_lib

_CHECKPOINT = flags.DEFINE_string(
  "checkpoint", None, "A workdir, its checkpoints folder or one step."
)
_PREDICTIONS = flags.DEFINE_string(
  "predictions", None, "Answers to score, {id: text}, in place of a checkpoint's."
)
_CONFIG = config_flags.DEFINE_config_dict(
  "config",
  ml_collections.ConfigDict(
    {
      "data": {"eval": "", "fields": "", "cache": "", "sentences": ""},
      "training": {"batch_size": 0},
    }
  ),
)


def _show(figures: dict, intervals: dict, source: str, of: str, count: str):
  """The table, and all as one line of JSON."""
  cells = [
    (name, f"{value:.4f}", "[{:.4f}, {:.4f}]".format(*intervals[name]) if name in intervals else "")
    for name, value in sorted(figures.items())
  ]
  print(
    tabulate.tabulate(
      cells,
      headers=(f"{source}, {count}", "", "95% interval"),
      disable_numparse=True,
      colalign=("left", "right", "left"),
    )
  )
  print(json.dumps({"checkpoint": of, "source": source, **figures, "intervals": intervals}))


def _answers():
  data = dataclasses.replace(DataConfig(), **{k: v for k, v in _CONFIG.value.data.items() if v})
  if not data.eval:
    raise UserError("--predictions needs the questions: --config.data.eval=squad:FILE.json")
  source = sources.parse_one(data.eval, data)
  outcomes = answers.of_file(pathlib.Path(_PREDICTIONS.value), source)
  means = lambda drawn: {name: float(values.mean()) for name, values in drawn.items()}
  _show(
    means(outcomes),
    metrics.bootstrap(means, outcomes),
    source.spec,
    _PREDICTIONS.value,
    f"{len(outcomes['f1'])} questions",
  )


def _replaced(group, overrides):
  """A config group with the overrides that were given."""
  return dataclasses.replace(group, **{k: v for k, v in overrides.items() if v})


def main():
  if _PREDICTIONS.value:
    return _answers()
  if not _CHECKPOINT.value:
    raise UserError(
      "--checkpoint is missing: a workdir of llm.train, its checkpoints folder or one step"
    )
  step = locate.find(_CHECKPOINT.value)
  saved = experiment_lib.from_checkpoint(step)
  data = _replaced(saved.config.data, _CONFIG.value.data)
  training = _replaced(saved.config.training, _CONFIG.value.training)
  if not data.eval:
    raise UserError(
      "the checkpoint was trained without evaluation data: give --config.data.eval=SOURCE"
    )
  source = sources.parse_one(data.eval, data)
  rows = saved.objective.eval_rows(
    source, saved.tokenizer, data, saved.config.model, training.sequence_length
  )
  batch_size = batches.rows_a_batch(training.batch_size, 1, [rows], [1.0])
  command.start_cpu()
  mesh = sharding.make_mesh(MeshConfig())
  batch_size = core.round_up(batch_size, mesh.size)
  with jax.set_mesh(mesh):
    rows = saved.objective.with_reference(
      rows,
      reference.predictor(saved.config, saved.objective, saved.tokenizer, batch_size, mesh, print),
    )
    bundle = experiment_lib.load(step)
    figures, predictions = evaluation.of_checkpoint(
      bundle, saved.objective, rows, training.sequence_length, batch_size, mesh
    )
  outcomes = saved.objective.outcomes(predictions, rows)
  if isinstance(saved.objective, base.Writes):
    outcomes |= saved.objective.written(writer.in_batches(bundle, training.batch_size), rows)
  _show(
    {**figures, **saved.objective.summary(outcomes)},
    metrics.bootstrap(saved.objective.summary, outcomes),
    source.spec,
    str(step),
    f"{rows.examples} examples",
  )


if __name__ == "__main__":
  command.run(main)
