"""A dry run: what a run would be. It trains a few steps in memory and writes no workdir."""

import dataclasses
import json
import statistics
import tempfile
import time
from typing import Any, Callable, Collection

import jax
import tabulate
from etils import epath

from llm import config as config_lib
from llm.config import Config
from llm.core import TrainState
from llm.data import batches as batches_lib
from llm.performance import flops
from llm.runs.log import duration
from llm.training import evaluation, header, in_words, loop, reference, room
from llm.training import optimizer as optimizer_lib
from llm.training import plan as plan_lib
from llm.training import sampler as sampler_lib
from llm.training import state as state_lib
from llm.training.experiment import OF_THE_MACHINE, Training

# Steps and batches of an evaluation that are timed, after a first one that compiles.
TIMED = 3

# What settles a key that the config leaves open.
SETTLED_BY = {
  "model.vocab_size": "the tokenizer",
  "model.init_std": "the width",
  "optimizer.learning_rate": "config.recipe",
  "training.steps": "the data and config.recipe",
  "training.epochs": "turned into steps",
  "training.eval_every": "an epoch",
  "training.save_every": "an epoch",
  "training.sequence_length": "the positions of the checkpoint",
  "transfer.checkpoint": "its best step, or its newest",
  "training.keep_best": "the objective",
  **{f"model.{name}": "this machine" for name in OF_THE_MACHINE},
}


def run(
  config: Config,
  file: str,
  overridden: Collection[str],
  say: Callable = print,
  use_devices: Callable | None = None,
):
  """Prints the resolved keys, the header of the run, the time that it will take and a batch.

  file: the config file. overridden: keys of the command line, as GROUP.NAME. use_devices: as of
  `loop.train`. Raises UserError as a run would.
  """
  experiment, mesh = loop.on_mesh(config, None, say, use_devices)
  if jax.process_index():
    say = loop.silent
  say(keys(config, experiment.config, file, overridden))
  with jax.set_mesh(mesh), tempfile.TemporaryDirectory() as scratch:
    experiment = reference.attached(experiment, mesh, say)
    planned = room.plan_that_fits(experiment, mesh)
    state, origin = state_lib.first_state(experiment, planned, None, epath.Path(scratch), say)
    parameters = flops.count_parameters(planned.params, experiment.config.model.vocab_size)
    header.show(experiment, mesh, parameters, origin, 0, say)
    header.show_baselines(experiment, say)
    sampler = reference.sampler(experiment, planned.frozen_masks, mesh, say)
    say(_time(experiment, planned, state, mesh, sampler))
  first = in_words.row(experiment.batches[0], 0, experiment.tokenizer, experiment.objective)
  say(f"batch 0, row 0: {first}")
  say("a dry run: no workdir was written")


def keys(config: Config, resolved: Config, file: str, overridden: Collection[str]) -> str:
  """A line for each key: its value in the run, and where it comes from."""
  given = config_lib.thaw(config)
  defaults: dict[str, Any] = {
    group: dataclasses.asdict(cls()) for group, cls in config_lib.GROUPS.items()
  }
  left_open = {
    "objective": "the data",
    "model": "the checkpoint" if config.transfer.checkpoint else "default",
  }
  lines = []
  for group, values in config_lib.thaw(resolved).items():
    for name, value in values.items():
      key = f"{group}.{name}"
      if value != given[group].get(name):
        origin = SETTLED_BY[key] if key in SETTLED_BY else left_open[group]
      elif key in overridden:
        origin = "the command line"
      elif group == "objective" or value != defaults[group][name]:
        origin = file
      else:
        origin = "default"
      lines.append((f"config.{key}", json.dumps(value), origin))
  return tabulate.tabulate(lines, headers=("key", "value", "from"), disable_numparse=True)


def _time(
  experiment: Training,
  planned: plan_lib.Plan,
  state: TrainState,
  mesh: Any,
  sampler: sampler_lib.Sampler,
) -> str:
  """The time that the run will take, by a few steps of it."""
  training = experiment.config.training
  pace = optimizer_lib.pace(experiment.config.optimizer, training.steps)
  seconds = []
  batches = batches_lib.stream(experiment.batches, 0, 1 + TIMED, mesh, prefetch=1)
  for number in range(1 + TIMED):
    started_at = time.perf_counter()
    actor = sampler.at(state.trained, state.frozen, number)
    made = experiment.objective.on_policy(next(batches), experiment.batches.rows, actor, train=True)
    state, _ = jax.block_until_ready(planned.train_step(state, made.batch, training.seed, pace))
    seconds.append(time.perf_counter() - started_at)
  compilation, *others = seconds
  step = statistics.median(others)
  total = compilation + step * training.steps
  line = (
    f"time        {compilation:.1f} s until the first step, {step:.3g} s a step, "
    f"{training.steps:,} steps {duration(step * training.steps)}"
  )
  if experiment.eval_rows is not None:
    evaluations = -(-training.steps // (training.eval_every or training.steps))
    of_each = _evaluation_seconds(experiment, state, planned.eval_step, mesh, sampler)
    total += evaluations * of_each
    line += f", {evaluations} evaluations of {duration(of_each)}"
  return f"{line}: about {duration(total)}"


def _evaluation_seconds(
  experiment: Training,
  state: TrainState,
  eval_step: Callable,
  mesh: Any,
  sampler: sampler_lib.Sampler,
) -> float:
  """Seconds of an evaluation, by its first batches."""
  batch_size = experiment.batches.batch_size
  rows: Any = experiment.eval_rows
  limit = experiment.config.training.eval_batches
  count = min(-(-len(rows) // batch_size), limit or len(rows))

  def seconds_of(batches: int) -> float:
    started_at = time.perf_counter()
    evaluation.evaluate(
      eval_step,
      state.trained,
      state.frozen,
      experiment.objective,
      rows,
      batch_size,
      mesh,
      batches,
      actor=sampler.at(state.trained, state.frozen, 0),
    )
    return time.perf_counter() - started_at

  seconds_of(1)
  timed = min(count, TIMED)
  return seconds_of(timed) / timed * count
