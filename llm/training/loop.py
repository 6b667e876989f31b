"""The training loop: it takes steps, evaluates, saves, and stops cleanly."""

import contextlib
import json
import pathlib
import time
from typing import Any, Callable

import jax
import numpy as np
from etils import epath
from jax.sharding import Mesh

from llm import config as config_lib
from llm import sharding, storage
from llm.checkpoints import manager
from llm.config import Config
from llm.core import Params, UserError
from llm.data import batches as batches_lib
from llm.objectives import base
from llm.performance import flops
from llm.runs import workdir as workdir_lib
from llm.runs.log import Log, duration
from llm.runs.meter import Meter
from llm.runs.profiler import profiling
from llm.runs.progress import Progress
from llm.runs.stop import Stop, Stopped
from llm.training import evaluation, header, partition, reference, room
from llm.training import experiment as experiment_lib
from llm.training import optimizer as optimizer_lib
from llm.training import state as state_lib
from llm.training.experiment import Training

# A run whose loss is above this share of what piece frequencies alone reach has learned little.
ALIVE = 0.97


def train(
  config: Config,
  workdir: str | pathlib.PurePath,
  *,
  go_on: bool = False,
  until: int = 0,
  say: Callable = print,
  use_devices: Callable | None = None,
) -> dict[str, Any]:
  """Runs a config to its end in `workdir` and returns what result.json holds.

  A run that was interrupted resumes. go_on: also where the workdir holds a run of another config.
  until: the step after which the run stops for now, saved; 0 is its end. say: prints a line.
  use_devices(config.mesh): called before JAX is first used. Raises UserError on bad input, and
  Stopped after a signal, when everything is saved.
  """
  started_at = time.time()
  workdir = storage.folder(workdir)
  checkpoints = workdir / "checkpoints"
  stop = Stop()
  with stop.listening():
    steps_before = manager.steps(checkpoints)
    resume_from = manager.newest_valid(checkpoints, say)
    if resume_from and not go_on:
      workdir_lib.check_same_data(config, manager.describe(resume_from).data)
    experiment, mesh = on_mesh(config, resume_from, say, use_devices)
    if jax.process_index():
      say = silent
    with jax.set_mesh(mesh):
      workdir_lib.check_processes_agree(config, workdir, resume_from)
      with workdir_lib.locked(workdir):
        if steps_before != manager.steps(checkpoints):
          raise UserError(
            f"another run went on in {workdir} meanwhile: start again, from where it is now"
          )
        experiment = reference.attached(experiment, mesh, say)
        workdir_lib.claim(workdir, config, go_on)
        run = _Run(experiment, resume_from, workdir, mesh, stop, say, until, started_at)
        return run.to_its_end()


def on_mesh(
  config: Config, resume_from: epath.Path | None, say: Callable, use_devices: Callable | None
) -> tuple[Training, Mesh]:
  """The experiment of a config, settled for its mesh, and the mesh. Raises UserError."""
  experiment = experiment_lib.prepare(config, resume_from, say)
  if use_devices:
    use_devices(config.mesh)
  mesh = sharding.make_mesh(config.mesh)
  experiment = experiment.on(mesh)
  sharding.check_batch(
    config.training.batch_size,
    experiment.batches.batch_size,
    config.optimizer.grad_accum_steps,
    mesh,
  )
  return experiment, mesh


def silent(*_: Any):
  """Takes the place of `say` in all processes but the first."""


class _Run:
  """A run: its state, its compiled steps, its logs and checkpoints."""

  def __init__(
    self,
    experiment: Training,
    resume_from: epath.Path | None,
    workdir: epath.Path,
    mesh: Mesh,
    stop: Stop,
    say: Callable,
    until: int,
    started_at: float,
  ):
    config = experiment.config
    self.experiment = experiment
    self.config = config
    self.workdir = workdir
    self.mesh = mesh
    self.stop = stop
    self.say = say
    self._read_figures(resume_from, started_at)
    self.plan = room.plan_that_fits(experiment, mesh)
    self.state, self.origin = state_lib.first_state(
      experiment, self.plan, resume_from, workdir, say
    )
    self.first_step = int(self.state.step)
    steps = config.training.steps
    self.last_step = min(steps, until or steps)
    self.pace = optimizer_lib.pace(config.optimizer, steps)
    self.evaluation_left = resume_from is not None and self._lacks_evaluation()
    self.tokens_a_step = experiment.batches.tokens()
    self.sampler = reference.sampler(experiment, self.plan.frozen_masks, mesh, say)
    self.parameters = flops.count_parameters(self.plan.params, config.model.vocab_size)
    self._show_header(resume_from)
    self._open(started_at)

  def _read_figures(self, resume_from: epath.Path | None, started_at: float):
    """What the run has reached so far."""
    saved = manager.describe(resume_from) if resume_from else None
    # Of the last evaluation.
    self.eval_figures: dict[str, Any] = saved.metrics if saved else {}
    # Sums of the log line that a resumed run is in.
    self.window: dict[str, Any] = saved.window if saved else {}
    # What a resumed run took before counts as if it had started so much earlier.
    self.seconds_before: dict[str, float] = saved.seconds if saved else {}
    self.tokens_before = saved.tokens if saved else 0.0
    self.started_at = started_at - self.seconds_before.get("whole", 0.0)
    goal = self.config.training.keep_best
    best = saved.progress if saved else manager.Best()
    self.progress = Progress.of_run(goal, best, manager.evaluations(self.workdir) if goal else [])

  def _lacks_evaluation(self) -> bool:
    """Whether a signal stopped the run in the evaluation of the step that it resumes from."""
    return (
      self.experiment.eval_rows is not None
      and self.due(self.first_step, self.config.training.eval_every)
      and not self.eval_figures
      and not self._result_of(self.first_step)
    )

  def _show_header(self, resume_from: epath.Path | None):
    """Writes run.json and resolved.json, and prints what this run is."""
    workdir_lib.write_json(self.workdir / "resolved.json", config_lib.thaw(self.config))
    workdir_lib.write_json(self.workdir / "run.json", workdir_lib.run_record())
    if resume_from:
      header.show_new_length(resume_from, self.config, self.first_step, self.say)
    header.show(self.experiment, self.mesh, self.parameters, self.origin, self.first_step, self.say)
    self.baselines: dict[str, float] = {}
    if self.first_step < self.last_step or self.evaluation_left:
      self.baselines = header.show_baselines(self.experiment, self.say)
    self.peak_flops = header.show_peak(self.experiment, self.plan.flops_a_row, self.mesh, self.say)

  def _open(self, started_at: float):
    """Opens the checkpoints, the logs and the stream of batches."""
    config = self.config
    self.saver = manager.Manager(self.workdir, config.training.keep, self.experiment.tokenizer)
    self.log_folder = workdir_lib.LogFolder(self.workdir)
    self.log = Log(self.log_folder, self.first_step, self.last_step, self.evaluation_left)
    self.meter = Meter(self.first_step, window=self.window, total_tokens=self.tokens_before)
    self.meter.total_seconds.update(self.seconds_before)
    self.meter.total_seconds["start"] += time.time() - started_at
    self.stream = batches_lib.stream(
      self.experiment.batches,
      self.first_step,
      self.last_step,
      self.mesh,
      config.data.prefetch,
      config.data.workers,
    )

  def to_its_end(self) -> dict[str, Any]:
    """Takes every step that is left and returns the result. Raises Stopped after a signal."""
    training = self.config.training
    step = self.first_step
    stop_signal = 0
    try:
      self._check_goal()
      with profiling(training.profile, self.log_folder.path) as before_step:
        if self.evaluation_left:
          stop_signal = self.end_step(step, is_saved=True)
        while step < self.last_step and not stop_signal and not self.stalled():
          before_step(step, self.state)
          self.take_step(step)
          step += 1
          if self.due(step, training.log_every):
            self.report(step)
          stop_signal = self.end_step(step)
    finally:
      self.close()
    if stop_signal:
      self.say(f"saved step {step}; the same command goes on from there")
      raise Stopped(128 + stop_signal)
    return self.finish(step)

  def end_step(self, step: int, is_saved: bool = False) -> int:
    """Evaluates and saves what is due after a step. Returns the signal that ends the run, or 0.

    is_saved: a signal came during this evaluation, and the state of the step was saved then.
    """
    training = self.config.training
    eval_figures = self.evaluate(step) if self.due(step, training.eval_every) else {}
    is_best = self.is_best(step, eval_figures)
    stop_signal = self.stop.requested()
    is_due = self.due(step, training.save_every) or bool(stop_signal) or self.stalled()
    if is_best or (is_due and not is_saved):
      self.save(step, eval_figures)
    return stop_signal

  def _check_goal(self):
    """Raises UserError, before the first step, where an evaluation lacks the figure of the goal.

    The figures of one batch say which there are.
    """
    goal = self.config.training.keep_best
    rows = self.experiment.eval_rows
    is_given = goal and goal != self.experiment.objective.goal
    if is_given and rows is not None and self.first_step < self.last_step:
      with self.meter.timed("evaluation"):
        figures = self._evaluate(rows, batches=1)
      if figures:
        self.progress.check(figures)

  def is_best(self, step: int, eval_figures: dict[str, float]) -> bool:
    """Whether these are the best figures so far. Raises UserError where they lack the goal."""
    try:
      return self.progress.add(step, eval_figures)
    except UserError:
      self.save(step, eval_figures)
      raise

  def stalled(self) -> bool:
    """Whether so many evaluations in a row were no better that the run ends."""
    patience = self.config.training.patience
    return bool(patience) and self.progress.since >= patience

  def due(self, step: int, every: int) -> bool:
    """Whether something is due after `step`: every so many steps, and after the last one.

    every: 0 means after the last one alone.
    """
    return step == self.last_step or every > 0 and step % every == 0

  def take_step(self, number: int):
    """One step, with batch `number`."""
    with self.meter.timed("input"):
      batch = next(self.stream)
    first = number == self.first_step
    with self.meter.timed("compile" if first else "writing"):
      made = self.experiment.objective.on_policy(
        batch, self.experiment.batches.rows, self.actor(number), train=True
      )
    computed = len(next(iter(made.batch.values()))) * self.experiment.objective.updates  # rows
    with self.meter.timed("compile") if first else contextlib.nullcontext():
      self.state, metrics = self.plan.train_step(
        self.state, made.batch, self.config.training.seed, self.pace
      )
    tokens = self.tokens_a_step if made.tokens is None else made.tokens
    self.meter.add({**metrics, **made.metrics}, tokens, computed * self.plan.flops_a_row)
    if made.samples and self.due(number + 1, self.config.training.log_every):
      self.log.samples(number + 1, made.samples)
    self.log.advance()

  def actor(self, step: int) -> base.Actor:
    """The current parameters, for an objective that learns from what they write."""
    return self.sampler.at(self.state.trained, self.state.frozen, step)

  def report(self, step: int):
    """Logs the means since the last report."""
    figures = self.meter.figures(step)
    _, flops_per_second = self.meter.paces[-1]
    rate = optimizer_lib.rate_at(self.config.optimizer, self.config.training.steps, step - 1)
    self.log.metrics(
      step,
      {
        **figures,
        **self.experiment.objective.derived(figures),
        "learning_rate": rate,
        "mfu": flops_per_second / self.peak_flops,
      },
    )

  def evaluate(self, step: int) -> dict[str, float]:
    """Logs the figures of the evaluation source; {} without one, or where a signal interrupts."""
    if self.experiment.eval_rows is None:
      return {}
    # Waits for the steps in progress, whose time is not that of the evaluation.
    self.meter.settle(step)
    with self.meter.timed("evaluation"):
      figures = self._evaluate(self.experiment.eval_rows)
    if figures:
      self.eval_figures = figures
      self.log.metrics(step, figures, "eval")
    return figures

  def _evaluate(self, rows: base.Rows, batches: int = 0) -> dict[str, float]:
    """The figures with those of the baselines; {} where a signal interrupts.

    batches: how many of them; 0: as the config says.
    """
    figures = evaluation.evaluate(
      self.plan.eval_step,
      self.state.trained,
      self.state.frozen,
      self.experiment.objective,
      rows,
      self.experiment.eval_batch_size,
      self.mesh,
      (batches or self.config.training.eval_batches) * self.config.optimizer.grad_accum_steps,
      self.stop,
      self.actor(int(self.state.step)),
    )
    return {**figures, **self.baselines} if figures else {}

  def save(self, step: int, eval_figures: dict[str, float]):
    """Starts to write a checkpoint. Training goes on meanwhile."""
    self.meter.settle(step)
    self.log.flush()
    description = {
      **self.experiment.description(),
      "metrics": eval_figures,
      "progress": self.progress.saved(),
      # A copy: the description is written while the next steps are added.
      "window": {name: list(total) for name, total in self.meter.window.items()},
      "seconds": {**self.meter.total_seconds, "whole": time.time() - self.started_at},
      "tokens": self.meter.total_tokens,
    }
    with self.meter.timed("checkpoint"):
      self.saver.save(
        step, self.params(), self.state.opt_state, description, best=self.progress.step
      )

  def params(self) -> Params:
    """Trained and frozen parameters as one tree."""
    return partition.merge(self.state.trained, self.state.frozen, self.plan.frozen_masks)

  def close(self):
    """Waits for the last checkpoint and closes what is open, even where one of them fails."""
    try:
      self.saver.close()
    finally:
      self.stream.close()
      self.log.close()
      self.log_folder.copy()

  def _result_of(self, step: int) -> dict[str, Any]:
    """What result.json holds, where it is of this step; else {}."""
    path = self.workdir / "result.json"
    result = json.loads(path.read_text()) if path.exists() else {}
    return result if result.get("step") == step else {}

  def finish(self, step: int) -> dict[str, Any]:
    """Writes result.json and returns it.

    Where an earlier run took the last step, its result is returned.
    """
    if step == self.first_step and (result := self._result_of(step)):
      early = ", stopped early: a higher config.training.patience goes on" * self.stalled()
      self.say(f"already done: step {self.first_step} in {self.workdir}{early}")
      return result
    result = self._result(step)
    workdir_lib.write_json(self.workdir / "result.json", result)
    if self.stalled() and step < self.last_step:
      self.say(f"stopped early: {self.progress.since} evaluations were no better")
    if self.progress.step >= 0:
      self.say(
        f"best: step {self.progress.step} by {self.progress.goal}, {self.progress.value:.4g}; "
        "other commands take it"
      )
    self._say_what_frequencies_reach()
    self.say(f"done: step {step} in {self.workdir}, {duration(result['seconds'])}")
    return result

  def _say_what_frequencies_reach(self):
    """A run on text that reached no more has learned nothing of it."""
    name = self.experiment.objective.text_loss
    reached = self.eval_figures.get(name, self.meter.last.get(name))
    if jax.process_index() or reached is None:
      return
    frequencies = self.experiment.unigram_loss()
    if frequencies is None:
      return
    line = f"{name} {reached:.3f}; the frequencies of the pieces alone reach {frequencies:.3f}"
    if reached > ALIVE * frequencies:
      line += ": the run has learned little more: it may need more steps, or another learning rate"
    self.say(line)

  def _result(self, step: int) -> dict[str, Any]:
    """What result.json holds."""
    pace = flops_per_second = None
    if self.meter.paces:
      pace, flops_per_second = np.median(self.meter.paces, axis=0).tolist()
    seconds = time.time() - self.started_at
    usage = zip(self.experiment.names, self.experiment.batches.usage(step))
    return {
      "step": step,
      "parameters": self.parameters,
      "origin": self.origin,
      "seconds": seconds,
      "shares": self.meter.shares(seconds),
      "tokens_per_second": pace,
      "mfu": flops_per_second and flops_per_second / self.peak_flops,
      "tokens": self.meter.total_tokens,
      "flops": step * self.flops_a_step(step),
      "data": {name: {"epochs": epochs, "tokens": tokens} for name, (epochs, tokens) in usage},
      "eval": self.eval_figures,
      "best": self.progress.saved(),
    }

  def flops_a_step(self, step: int) -> float:
    """FLOPs of the model in a step, by the steps of this process up to `step`."""
    if step > self.first_step:
      return self.meter.total_flops / (step - self.first_step)
    return self.experiment.batches.batch_size * self.plan.flops_a_row
