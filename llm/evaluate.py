"""Score a checkpoint, on the data it was evaluated on or on other data.

python -m llm.evaluate --checkpoint=DIR [--config.data.eval=SOURCE] [--config.data.fields=...]
"""
import dataclasses
import json

import jax
import ml_collections
import tabulate
from absl import flags
from ml_collections import config_flags

from llm import command, sharding
from llm.checkpoints import locate, manager
from llm.config import MeshConfig
from llm.core import UserError, flatten
from llm.data import sources
from llm.training import experiment as experiment_lib
from llm.training import loop, step as step_lib

_CHECKPOINT = flags.DEFINE_string("checkpoint", None, "A workdir, its checkpoints folder or one step.")
_CONFIG = config_flags.DEFINE_config_dict("config", ml_collections.ConfigDict(
    {"data": {"eval": "", "fields": "", "cache": "", "sentences": ""}, "training": {"batch_size": 0}}))


def _replaced(group, overrides):
  """A config group with the overrides that were given."""
  return dataclasses.replace(group, **{k: v for k, v in overrides.items() if v})


def main():
  if not _CHECKPOINT.value:
    raise UserError("--checkpoint is missing: a workdir of llm.train, its checkpoints folder or one step")
  step = locate.find(_CHECKPOINT.value)
  saved = experiment_lib.from_checkpoint(step)
  data = _replaced(saved.config.data, _CONFIG.value.data)
  training = _replaced(saved.config.training, _CONFIG.value.training)
  if not data.eval:
    raise UserError("the checkpoint was trained without evaluation data: give --config.data.eval=SOURCE")
  source, *more = sources.parse(data.eval, data)
  if more:
    raise UserError("config.data.eval must be one source")
  rows = saved.objective.rows(source, saved.tokenizer, data, saved.config.model, training.sequence_length)
  command.use_cpu_cores(training.batch_size)
  mesh = sharding.make_mesh(MeshConfig())
  with jax.set_mesh(mesh):
    params = flatten(manager.restore(step, "params"))
    placed = jax.device_put(params, sharding.shardings(params, mesh))
    marks = {path: [False] for path in params}
    eval_step = step_lib.make_eval_step(saved.model, saved.objective, marks)
    figures = loop.evaluate(eval_step, placed, {}, saved.objective, rows, training.batch_size, mesh)
  print(tabulate.tabulate(sorted(figures.items()), headers=(f"{source.spec}, {len(rows)} rows", ""),
                          floatfmt=".4f"))
  print(json.dumps({"checkpoint": str(step), "source": source.spec, **figures}))


if __name__ == "__main__":
  command.run(main)
