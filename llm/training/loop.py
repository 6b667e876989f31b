"""The training loop: train, evaluate, save, stop cleanly."""

import contextlib
import json
import pathlib
import time
from typing import Any, Callable

import jax
import numpy as np
from etils import epath
from jax.sharding import Mesh

from llm import sharding, storage
from llm.checkpoints import manager
from llm.config import Config
from llm.core import UserError
from llm.data import batches as batches_lib
from llm.models import precision
from llm.performance import flops
from llm.runs import workdir as workdir_lib
from llm.runs.log import Log, duration
from llm.runs.meter import Meter
from llm.runs.profiler import profiling
from llm.runs.stop import Stop, Stopped
from llm.training import evaluation, header, partition, reference
from llm.training import experiment as experiment_lib
from llm.training import optimizer as optimizer_lib
from llm.training import state as state_lib
from llm.training import step as step_lib
from llm.training.experiment import Training


def train(
  config: Config,
  workdir: str | pathlib.PurePath,
  *,
  go_on: bool = False,
  say: Callable = print,
  use_devices: Callable | None = None,
) -> dict:
  """Runs a config to its end in `workdir` and returns what result.json holds.

  use_devices(mesh config): called before JAX is first used. Raises UserError on bad input and
  Stopped after a signal, both with everything saved.
  """
  workdir = storage.folder(workdir)
  stop = Stop()
  with stop.listening():
    steps_before = manager.steps(workdir / "checkpoints")
    own = manager.newest_valid(workdir / "checkpoints", say)
    experiment = experiment_lib.prepare(config, own, say)
    if use_devices:
      use_devices(config.mesh)
    mesh = sharding.make_mesh(config.mesh)
    experiment = experiment.on(mesh)
    rows, accum_steps = experiment.batches.batch_size, config.optimizer.grad_accum_steps
    sharding.check_batch(config.training.batch_size, rows, accum_steps, mesh)
    if jax.process_index():
      say = _silent
    with jax.set_mesh(mesh):
      workdir_lib.agree(config, workdir)
      with workdir_lib.locked(workdir):
        if steps_before != manager.steps(workdir / "checkpoints"):
          raise UserError(
            f"another run went on in {workdir} meanwhile: start again, from where it is now"
          )
        experiment = reference.attached(experiment, mesh, say)
        workdir_lib.claim(workdir, config, go_on)
        return _Run(experiment, own, workdir, mesh, stop, say).to_its_end()


def _silent(*_: Any):
  """What processes other than the first say."""


class _Run:
  """One run at work: its state, its compiled steps, and what it leaves behind."""

  def __init__(
    self,
    experiment: Training,
    own: epath.Path | None,
    workdir: epath.Path,
    mesh: Mesh,
    stop: Stop,
    say: Callable,
  ):
    config = experiment.config
    self.experiment, self.config, self.objective = experiment, config, experiment.objective
    self.workdir, self.mesh, self.stop, self.say = workdir, mesh, stop, say
    self.began = time.time()
    self.figures: dict[str, float] = {}  # of the last evaluation
    self.eval_rows = experiment.eval_rows
    self.state, optimizer, self.marks, self.origin = state_lib.first_state(
      experiment, own, workdir, mesh, say
    )
    self.start, self.steps = int(self.state.step), config.training.steps
    self.train_step = step_lib.make_train_step(
      experiment.model,
      self.objective,
      optimizer,
      self.marks,
      config.optimizer.grad_accum_steps,
      jax.tree.map(lambda x: x.sharding, self.state),
    )
    self.eval_step = step_lib.make_eval_step(experiment.model, self.objective, self.marks)
    params = jax.eval_shape(self.params)
    self.parameters = flops.count_parameters(params, config.model.vocab_size)
    workdir_lib.write_json(workdir / "run.json", workdir_lib.run_record())
    _say_extension(own, config, self.start, say)
    header.show(experiment, mesh, self.parameters, self.origin, self.start, say)
    self.mfu = _mfu(experiment, params, mesh, say)
    self.saver = manager.Manager(
      workdir, config.training.keep, config.training.keep_best, experiment.tokenizer
    )
    self.growing = workdir_lib.Growing(workdir)
    self.log = Log(self.growing, self.start, self.steps)
    self.meter = Meter(self.start, experiment.batches.tokens())
    self.stream = batches_lib.stream(
      experiment.batches, self.start, self.steps, mesh, config.data.prefetch, config.data.workers
    )

  def to_its_end(self) -> dict:
    """Every step that is left; then the result. Raises Stopped after a signal."""
    training = self.config.training
    done, asked = self.start, 0
    try:
      with profiling(training.profile, self.growing.folder) as before_step:
        for number in range(self.start, self.steps):
          before_step(number, self.state)
          self.take_step(number)
          done, last = number + 1, number + 1 == self.steps
          if _due(done, training.log_every, last):
            self.report(done)
          results = {}
          if self.eval_rows is not None and _due(done, training.eval_every, last):
            results = self.evaluate(done)
          asked = self.stop.asked()
          if _due(done, training.save_every, last) or asked or training.keep_best and results:
            self.save(done, results)
          if asked:
            break
    finally:
      self.close()
    if asked:
      self.say(f"saved step {done}; the same command goes on from there")
      raise Stopped(128 + asked)
    return self.finish(done)

  def take_step(self, number: int):
    """One update by batch `number`."""
    with self.meter.spending("input"):
      batch = next(self.stream)
    first = number == self.start
    with self.meter.spending("compile") if first else contextlib.nullcontext():
      self.state, metrics = self.train_step(self.state, batch, self.config.training.seed)
    self.meter.waiting.append(metrics)
    self.log.advance()

  def report(self, done: int):
    """The means since the last report, to the console and the logs."""
    figures = self.meter.figures(done)
    self.log.metrics(done, {**figures, "mfu": self.mfu(figures["tokens_per_second"])})

  def evaluate(self, done: int) -> dict[str, float]:
    """Figures over the evaluation source; {} where a signal came meanwhile."""
    self.meter.settle(done)  # what still trains is not evaluation
    with self.meter.spending("evaluation"):
      results = self.evaluated()
    if results:
      self.figures = results
      self.log.metrics(done, results, "eval")
    return results

  def evaluated(self) -> dict[str, float]:
    assert self.eval_rows is not None
    return evaluation.evaluate(
      self.eval_step,
      self.state.trained,
      self.state.frozen,
      self.objective,
      self.eval_rows,
      self.experiment.batches.batch_size,
      self.mesh,
      self.config.training.eval_batches,
      self.stop,
    )

  def save(self, done: int, results: dict[str, float]):
    """Starts a checkpoint; training goes on while it is written."""
    self.meter.settle(done)
    self.log.flush()
    description = {**self.experiment.description(), "metrics": results}
    with self.meter.spending("checkpoint"):
      self.saver.save(done, self.params(), self.state.opt_state, description)

  def params(self) -> dict:
    """Trained and frozen parameters as one tree."""
    return partition.merge(self.state.trained, self.state.frozen, self.marks)

  def close(self):
    """Waits for the last checkpoint and closes what is open, whatever fails."""
    try:
      self.saver.close()
    finally:
      self.stream.close()
      self.log.close()
      self.growing.copy()

  def finish(self, done: int) -> dict:
    """Writes result.json, unless an earlier run of the same command did."""
    path = self.workdir / "result.json"
    if self.start >= self.steps and path.exists():
      self.say(f"already done: step {self.start} in {self.workdir}")
      return json.loads(path.read_text())
    if self.start >= self.steps and self.eval_rows is not None:
      self.figures = self.evaluated()  # stopped between its last save and its result
      if asked := self.stop.asked():
        raise Stopped(128 + asked)
    pace = float(np.median(self.meter.paces)) if self.meter.paces else None
    seconds = time.time() - self.began
    usage = zip(self.experiment.names, self.experiment.batches.usage(done))
    result = {
      "step": done,
      "parameters": self.parameters,
      "origin": self.origin,
      "seconds": seconds,
      "shares": self.meter.shares(seconds),
      "tokens_per_second": pace,
      "mfu": pace and self.mfu(pace),
      "data": {name: {"epochs": epochs, "tokens": tokens} for name, (epochs, tokens) in usage},
      "eval": self.figures,
    }
    workdir_lib.write_json(path, result)
    self.say(f"done: step {done} in {self.workdir}, {duration(seconds)}")
    return result


def _due(step: int, every: int, last: bool) -> bool:
  """Whether something that happens every so many steps (0: at the end only) happens now."""
  return last or bool(every) and step % every == 0


def _mfu(experiment: Training, params: dict, mesh: Mesh, say: Callable) -> Callable:
  """A function from (real) tokens a second to the share of the peak that the model's FLOPs are."""
  config, batches = experiment.config, experiment.batches
  peak, source = flops.peak_flops(mesh, precision.of(config.model))
  of_row = flops.model_flops(experiment.model, params, experiment.one_row(), config.model)
  of_step = of_row * batches.batch_size
  say(f"peak        {peak / 1e9:,.0f} GFLOP/s ({source}), {of_step / 1e9:,.1f} GFLOP a step")
  of_token = of_step / batches.tokens()
  return lambda tokens_per_second: of_token * tokens_per_second / peak


def _say_extension(own: epath.Path | None, config: Config, start: int, say: Callable):
  """Says what more steps than the checkpoint was made for do to the schedule."""
  if not own:
    return
  planned, steps = manager.describe(own)["config"]["training"]["steps"], config.training.steps
  if planned == steps:
    return
  before, now = (
    optimizer_lib.rate_at(config.optimizer, length, start) for length in (planned, steps)
  )
  say(
    f"the run was planned for {planned} steps and now for {steps}: the {config.optimizer.schedule} "
    f"schedule is that of the new length, so the learning rate of step {start} "
    + (f"stays {now:.3g}" if now == before else f"is {now:.3g} instead of {before:.3g}")
  )
