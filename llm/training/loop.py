"""The training loop: train, evaluate, save, stop cleanly."""

import contextlib
import json
import os
import pathlib
import time
from typing import Callable

import jax
import numpy as np

from llm import sharding, storage
from llm.checkpoints import manager
from llm.config import Config
from llm.core import UserError
from llm.data import batches as batches_lib
from llm.models import precision, transformer
from llm.performance import flops
from llm.runs import workdir as workdir_lib
from llm.runs.log import Log, duration
from llm.runs.meter import Meter
from llm.runs.stop import Stop, Stopped
from llm.training import evaluation, partition, reference
from llm.training import experiment as experiment_lib
from llm.training import state as state_lib
from llm.training import step as step_lib


def _header(experiment, mesh, params: int, origin: str, start: int, say):
  config = experiment.config
  batches = experiment.batches
  length, examples = config.training.sequence_length, batches.examples()
  tokens = batches.batch_size * length
  shared = "" if examples == batches.batch_size else f", about {examples:,.0f} examples"
  steps = config.training.steps
  shape = " x ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
  say(f"devices     {mesh.size} x {mesh.devices.flat[0].device_kind}, mesh {shape}")
  say(f"dtype       {precision.explained(config.model.dtype)}")
  say(
    f"model       {config.model.name}, {params:,} parameters, objective {config.objective['name']}"
  )
  say(
    f"batch       {batches.batch_size} rows x {length} = {tokens:,} tokens a "
    f"step{shared}, {steps:,} steps, "
    f"{batches.tokens() * steps / params:.3g} tokens a parameter"
  )
  for name, (epochs, seen) in zip(experiment.names, batches.usage(steps)):
    say(f"data        {name}: {seen:,.0f} tokens, {epochs:.3g} epochs")
  for name, rows in zip(experiment.names, batches.rows):
    if note := getattr(rows, "note", ""):
      say(f"            {name}: {note}")
  if config.data.workers > (os.cpu_count() or 1):
    say(
      f"hint        config.data.workers={config.data.workers} are more than this machine's {os.cpu_count()} "
      "cores: they will wait for each other"
    )
  if mesh.devices.flat[0].platform == "tpu":
    why_not = transformer.cannot(
      "splash", config.model, config.training.sequence_length, mesh.shape["context"], True
    )
    say(
      "attention   splash"
      if not why_not and config.model.attention != "reference"
      else f"attention   reference, a T x T array in memory ({why_not or 'as the config says'})"
    )
  say(f"parameters  {origin}" + (f", step {start}" if start else ""))


def train(
  config: Config,
  workdir: str | pathlib.PurePath,
  *,
  go_on: bool = False,
  say=print,
  use_devices: Callable | None = None,
) -> dict:
  """Runs a config to its end in `workdir` and returns what result.json holds.

  use_devices(mesh config): called before JAX is first used. Raises UserError on bad input and
  Stopped after a signal, both with everything saved.
  """
  workdir = storage.folder(workdir)
  stop = Stop()
  with stop.listening():
    seen = manager.steps(workdir / "checkpoints")
    own = manager.newest_valid(workdir / "checkpoints", say)
    experiment = experiment_lib.prepare(config, own, say)
    if use_devices:
      use_devices(config.mesh)
    mesh = sharding.make_mesh(config.mesh)
    sharding.check_batch(
      config.training.batch_size,
      experiment.batches.batch_size,
      config.optimizer.grad_accum_steps,
      mesh,
    )
    transformer.check_platform(config.model, mesh.devices.flat[0].platform)
    if jax.process_index():
      say = lambda *_: None
    with jax.set_mesh(mesh):
      workdir_lib.agree(config, workdir)
      with workdir_lib.locked(workdir):
        if seen != manager.steps(workdir / "checkpoints"):
          raise UserError(
            f"another run went on in {workdir} meanwhile: start again, from where it is now"
          )
        experiment = reference.attached(experiment, mesh, say)
        workdir_lib.claim(workdir, config, go_on)
        return _train(experiment, own, workdir, mesh, stop, say)


@contextlib.contextmanager
def _profiler(text: str, folder: pathlib.Path):
  """Gives a function to call before every step, which profiles those of `text`, e.g. "10:15"."""
  first, last = _profile_range(text)
  running = False

  def at(step: int, state):
    nonlocal running
    if step == first:
      jax.profiler.start_trace(str(folder / "profile"))
      running = True
    elif running and step == last:
      jax.block_until_ready(state)
      jax.profiler.stop_trace()
      running = False

  try:
    yield at
  finally:
    if running:
      jax.profiler.stop_trace()


def _train(experiment, own, workdir, mesh, stop: Stop, say) -> dict:
  config, objective = experiment.config, experiment.objective
  training, steps = config.training, config.training.steps
  began = time.time()
  state, optimizer, marks, origin = state_lib.first_state(experiment, own, workdir, mesh, say)
  start = int(state.step)
  _say_extension(own, config, start, say)
  train_step = step_lib.make_train_step(
    experiment.model,
    objective,
    optimizer,
    marks,
    config.optimizer.grad_accum_steps,
    jax.tree.map(lambda x: x.sharding, state),
  )
  eval_step = step_lib.make_eval_step(experiment.model, objective, marks)
  params = jax.eval_shape(lambda: partition.merge(state.trained, state.frozen, marks))
  count = flops.count_parameters(params, config.model.vocab_size)
  workdir_lib.write_json(workdir / "run.json", workdir_lib.run_record())
  _header(experiment, mesh, count, origin, start, say)
  mfu_of_pace = _mfu(experiment, params, mesh, say)
  saver = manager.Manager(workdir, training.keep, training.keep_best, experiment.tokenizer)
  growing = workdir_lib.Growing(workdir)
  log = Log(growing, start, steps)
  stream = batches_lib.stream(
    experiment.batches, start, steps, mesh, config.data.prefetch, config.data.workers
  )
  batch_size = experiment.batches.batch_size
  meter = Meter(start, experiment.batches.tokens())
  figures, done, asked = {}, start, 0

  def evaluated() -> dict:
    return (
      evaluation.evaluate(
        eval_step,
        state.trained,
        state.frozen,
        objective,
        experiment.eval_rows,
        batch_size,
        mesh,
        training.eval_batches,
        stop,
      )
      or {}
    )

  try:
    with _profiler(training.profile, growing.folder) as profile:
      for number in range(start, steps):
        profile(number, state)
        with meter.spending("input"):
          batch = next(stream)
        with meter.spending("compile") if number == start else contextlib.nullcontext():
          state, found = train_step(state, batch, training.seed)
        meter.waiting.append(found)
        done, last = number + 1, number + 1 == steps
        log.advance()
        if _due(done, training.log_every, last):
          shown = meter.figures(done)
          log.metrics(done, {**shown, "mfu": mfu_of_pace(shown["tokens_per_second"])})
        results = {}
        if experiment.eval_rows is not None and _due(done, training.eval_every, last):
          meter.settle(done)  # what trains still is not evaluation
          with meter.spending("evaluation"):
            results = evaluated()
          if results:
            figures = results
            log.metrics(done, results, "eval")
        asked = stop.asked()
        if _due(done, training.save_every, last) or asked or training.keep_best and results:
          meter.settle(done)
          log.flush()
          with meter.spending("checkpoint"):
            saver.save(
              done,
              partition.merge(state.trained, state.frozen, marks),
              state.opt_state,
              {**experiment.description(), "metrics": results},
            )
        if asked:
          break
  finally:
    try:
      saver.close()
    finally:
      stream.close()
      log.close()
      growing.copy()
  if asked:
    say(f"saved step {done}; the same command goes on from there")
    raise Stopped(128 + asked)
  finished = workdir / "result.json"
  if start >= steps and finished.exists():
    say(f"already done: step {start} in {workdir}")
    return json.loads(finished.read_text())
  if (
    start >= steps and experiment.eval_rows is not None
  ):  # stopped between its last save and its result
    figures = evaluated()
    if asked := stop.asked():
      raise Stopped(128 + asked)
  pace = float(np.median(meter.paces)) if meter.paces else None
  seconds = time.time() - began
  result = {
    "step": done,
    "parameters": count,
    "origin": origin,
    "seconds": seconds,
    "shares": meter.shares(seconds),
    "tokens_per_second": pace,
    "mfu": pace and mfu_of_pace(pace),
    "data": {
      name: {"epochs": epochs, "tokens": seen}
      for name, (epochs, seen) in zip(experiment.names, experiment.batches.usage(done))
    },
    "eval": figures,
  }
  workdir_lib.write_json(finished, result)
  say(f"done: step {done} in {workdir}, {duration(result['seconds'])}")
  return result


def _due(step: int, every: int, last: bool) -> bool:
  """Whether something that happens every so many steps (0: at the end only) happens now."""
  return last or bool(every) and step % every == 0


def _mfu(experiment, params, mesh, say) -> Callable[[float], float]:
  """A function from (real) tokens a second to the share of the peak that the model's FLOPs are."""
  peak, source = flops.peak_flops(mesh, precision.of(experiment.config.model))
  a_row = flops.row_flops(experiment, params)
  a_step = a_row * experiment.batches.batch_size
  say(f"peak        {peak / 1e9:,.0f} GFLOP/s ({source}), {a_step / 1e9:,.1f} GFLOP a step")
  return lambda pace: a_step / experiment.batches.tokens() * pace / peak


def _say_extension(own, config: Config, start: int, say):
  """Says what more steps than the checkpoint was made for do to the schedule."""
  if not own:
    return
  old = manager.describe(own)["config"]["training"]["steps"]
  if old != config.training.steps:
    say(
      f"the run was planned for {old} steps and now for {config.training.steps}: the "
      f"{config.optimizer.schedule} schedule is that of the new length from step {start} on, so the learning "
      "rate jumps to where a run of that length would have it"
    )


def _profile_range(text: str) -> tuple[int, int]:
  if not text:
    return -1, -1
  first, _, last = text.partition(":")
  if not (first.isdigit() and last.isdigit() and int(first) < int(last)):
    raise UserError(f"config.training.profile={text!r} is not of the form '10:15'")
  return int(first), int(last)
