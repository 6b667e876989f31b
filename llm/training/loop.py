"""The training loop: resume, else transfer, else scratch; train, evaluate, save; stop cleanly."""
import contextlib
import dataclasses
import importlib
import importlib.metadata
import json
import math
import os
import pathlib
import platform
import signal
import subprocess
import sys
import time
from typing import Callable

import jax
import numpy as np

from llm import config as config_lib
from llm import sharding
from llm.checkpoints import manager, transfer
from llm.config import Config
from llm.core import TrainState, UserError, flatten, unflatten
from llm.data import batches as batches_lib
from llm.models.transformer import padded_vocab
from llm.training import experiment as experiment_lib
from llm.training import metrics as metrics_lib
from llm.training import optimizer as optimizer_lib
from llm.training import partition, step as step_lib
from llm.training.log import Log, duration

# What may differ between a run and its continuation.
MAY_CHANGE = {"data.prefetch", "data.cache", "mesh", "model.scan", "model.remat", "model.loss_chunk",
              *(f"training.{k}" for k in ("steps", "epochs", "log_every", "eval_every", "eval_batches",
                                          "save_every", "keep", "keep_best", "profile"))}


class Stopped(SystemExit):
  """A signal asked the run to stop; it has saved."""


@dataclasses.dataclass
class Stop:
  """Set by SIGINT and SIGTERM, polled between steps."""
  signal: int = 0

  @contextlib.contextmanager
  def listening(self):
    """Catches the signals; a second one ends the process at once."""
    def catch(number, frame):
      if self.signal:
        raise KeyboardInterrupt
      self.signal = number
      print(f"\n{signal.Signals(number).name}: saving, then stopping ...", file=sys.stderr, flush=True)
    try:
      old = {n: signal.signal(n, catch) for n in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not the main thread: signals are somebody else's
      old = {}
    try:
      yield
    finally:
      for number, handler in old.items():
        signal.signal(number, handler)


def count_parameters(params, vocab_size: int) -> int:
  """Parameters without the rows that pad the vocabulary."""
  padding = padded_vocab(vocab_size) - vocab_size
  total = 0
  for path, leaf in flatten(params).items():
    total += math.prod(leaf.shape)
    if path == "backbone/token/embedding":
      total -= padding * leaf.shape[1]
    elif path == "head/lm/bias":
      total -= padding
  return total


def _revision() -> dict:
  """The source revision and whether the working tree was clean; unknown outside a checkout."""
  root = pathlib.Path(__file__).resolve().parents[2]
  git = lambda *args: subprocess.run(["git", "-C", str(root), *args], capture_output=True, text=True)
  try:
    head = git("rev-parse", "HEAD")
    return {"revision": head.stdout.strip() or "unknown", "clean": not git("status", "--porcelain").stdout}
  except OSError:
    return {"revision": "unknown", "clean": None}


def _write_json(path: pathlib.Path, value):
  if jax.process_index() == 0:
    scratch = path.with_suffix(".tmp")
    scratch.write_text(json.dumps(value, indent=1))
    scratch.replace(path)


def _run_record() -> dict:
  packages = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy", "sentencepiece")
  return {"command": sys.argv, **_revision(), "python": platform.python_version(),
          "versions": {p: importlib.metadata.version(p) for p in packages},
          "devices": [str(d) for d in jax.devices()], "processes": jax.process_count(),
          "xla_flags": os.environ.get("XLA_FLAGS", "")}


def _differences(old: dict, new: dict) -> list[str]:
  found = []
  for group in sorted({*old, *new} - MAY_CHANGE):
    a, b = old.get(group, {}), new.get(group, {})
    for key in sorted({*a, *b}):
      left, right = (json.dumps(x.get(key)) for x in (a, b))
      if left != right and f"{group}.{key}" not in MAY_CHANGE:
        found.append(f"{group}.{key} was {left}, is {right}")
  return found


def _claim(workdir: pathlib.Path, config: Config, go_on: bool):
  """Makes the workdir this config's. Raises UserError if it holds a run of another one."""
  path = workdir / "config.json"
  try:
    workdir.mkdir(parents=True, exist_ok=True)
  except OSError as error:
    raise UserError(f"--workdir={workdir}: {error.strerror}")
  if path.exists() and not go_on:
    try:
      old = json.loads(path.read_text())
    except ValueError:
      raise UserError(f"{path} is damaged; --go_on replaces it")
    if found := _differences(old, json.loads(json.dumps(config_lib.thaw(config)))):
      raise UserError(f"{workdir} holds a run of another config ({'; '.join(found[:4])}): choose another "
                      "--workdir, or --go_on to go on with the new one")
  _write_json(path, config_lib.thaw(config))


def _fresh_params(experiment, batch, mesh, seed: int):
  """Fresh parameters, made in place on the mesh: values do not depend on its shape."""
  init = lambda: step_lib.init_params(experiment.model, batch, jax.random.key(seed))
  placed = sharding.shardings(jax.eval_shape(init), mesh)
  return jax.jit(init, out_shardings=placed)()


def _transferred(experiment, fresh, workdir, say):
  """Fresh parameters with those of config.transfer.checkpoint in their place; writes the audit."""
  found = manager.find(experiment.config.transfer.checkpoint, say)
  loaded = manager.restore(found, "params")
  params, audit = transfer.transfer(fresh, loaded, experiment.config.transfer)
  say(transfer.table(audit))
  _write_json(workdir / "transfer.json",
              {"checkpoint": str(found), "parameters": [dataclasses.asdict(e) for e in audit]})
  placed = jax.tree.map(lambda old, new: jax.device_put(new, old.sharding).astype(old.dtype), fresh, params)
  return placed, f"transferred from {found}"


def first_state(experiment, own: pathlib.Path | None, workdir, mesh, say):
  """(state, optimizer, marks, where the parameters came from)."""
  config = experiment.config
  one = jax.tree.map(lambda x: np.asarray(x), experiment.batches.read(0, range(1)))
  shapes = jax.eval_shape(lambda: step_lib.init_params(experiment.model, one, jax.random.key(0)))
  marks = partition.frozen_layers(shapes, config.optimizer.freeze)
  trained_shapes, _ = jax.eval_shape(lambda p: partition.split(p, marks), shapes)
  optimizer = optimizer_lib.make(config.optimizer, trained_shapes, config.model.num_layers,
                                 config.training.steps)
  if own:
    like = jax.tree.map(lambda s, p: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=p),
                        shapes, sharding.shardings(shapes, mesh))
    params, origin = manager.restore(own, "params", like), f"resumed from {own}"
  else:
    params, origin = _fresh_params(experiment, one, mesh, config.training.seed), "random initialisation"
    if config.transfer.checkpoint:
      params, origin = _transferred(experiment, params, workdir, say)
  # Each tree is placed by the one table; the moments end in the paths of their parameters.
  placed = sharding.shardings(jax.eval_shape(lambda p: partition.split(p, marks), params), mesh)
  trained, frozen = jax.jit(lambda p: partition.split(p, marks), out_shardings=placed)(params)
  opt_shapes = jax.eval_shape(optimizer.init, trained)
  opt_placed = sharding.shardings(opt_shapes, mesh)
  if own:
    like = jax.tree.map(lambda s, p: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=p), opt_shapes, opt_placed)
    opt_state, number = manager.restore(own, "opt_state", like), manager.describe(own)["step"]
  else:
    opt_state, number = jax.jit(optimizer.init, out_shardings=opt_placed)(trained), 0
  scalar = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
  state = TrainState(jax.device_put(np.int32(number), scalar), trained, frozen, opt_state)
  return state, optimizer, marks, origin


def host_rows(array: jax.Array) -> np.ndarray:
  """All rows of a global array, on every process."""
  if array.is_fully_addressable:
    return np.asarray(array)
  from jax.experimental import multihost_utils
  return np.asarray(multihost_utils.process_allgather(array, tiled=True))


def evaluate(eval_step: Callable, trained, frozen, objective, rows, batch_size: int, mesh,
             limit: int = 0, stop: Stop | None = None) -> dict[str, float] | None:
  """Figures over an evaluation source; None if a signal came meanwhile."""
  history, predictions = [], []
  for batch in batches_lib.passes(rows, objective.example, batch_size, mesh, limit):
    if stop and stop.signal:
      return None
    found, predicted = eval_step(trained, frozen, batch)
    history.append(found)
    predictions.append(predicted)
  figures = metrics_lib.means(jax.device_get(history))
  seen = min(len(rows), len(predictions) * batch_size)
  merged = {k: np.concatenate([host_rows(p[k]) for p in predictions])[:seen] for k in predictions[0]}
  return {**figures, **objective.score(merged, rows)}


def _check_finite(history: list[dict], first: int):
  """Raises UserError naming the first step whose metrics are not finite."""
  for number, found in enumerate(history, first):
    bad = [name for name, (value, _) in found.items() if not math.isfinite(value)]
    if bad:
      raise UserError(
          f"{bad[0]} is not finite at step {number + 1} (batch {number}); nothing was saved after it. Look at "
          f"it with `python -m llm.show batch --step={number} --config=...`; a lower optimizer.learning_rate "
          "or a longer warm-up may help")


def _header(experiment, mesh, params: int, origin: str, start: int, say):
  config = experiment.config
  tokens = config.training.batch_size * config.training.sequence_length
  steps = config.training.steps
  shape = " x ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
  say(f"devices     {mesh.size} x {mesh.devices.flat[0].device_kind}, mesh {shape}")
  say(f"model       {config.model.name}, {params:,} parameters, objective {config.objective['name']}")
  say(f"batch       {config.training.batch_size} rows x {config.training.sequence_length} = {tokens:,} tokens a "
      f"step, {steps:,} steps, {tokens * steps / params:.3g} tokens a parameter")
  for name, (epochs, seen) in zip(experiment.names, experiment.batches.usage(steps)):
    say(f"data        {name}: {seen:,.0f} tokens, {epochs:.3g} epochs")
  say(f"parameters  {origin}" + (f", step {start}" if start else ""))


def train(config: Config, workdir: str | pathlib.Path, *, go_on: bool = False, say=print,
          use_devices: Callable | None = None) -> dict:
  """Runs a config to its end in `workdir` and returns what result.json holds.

  use_devices(rows, state bytes): called before JAX is first used. Raises UserError on bad input and
  Stopped after a signal, both with everything saved.
  """
  workdir = pathlib.Path(workdir).expanduser().absolute()
  stop = Stop()
  with stop.listening():
    own = manager.newest_valid(workdir / "checkpoints", say)
    experiment = experiment_lib.prepare(config, own, say)
    if use_devices:
      use_devices(config.training.batch_size // config.optimizer.grad_accum_steps,
                  experiment_lib.state_bytes(experiment.config.model))
    mesh = sharding.make_mesh(config.mesh)
    sharding.check_batch(config.training.batch_size, config.optimizer.grad_accum_steps, mesh)
    _claim(workdir, config, go_on)
    with jax.set_mesh(mesh):
      return _train(experiment, own, workdir, mesh, stop, say)


def _train(experiment, own, workdir, mesh, stop: Stop, say) -> dict:
  config, objective = experiment.config, experiment.objective
  training, steps = config.training, config.training.steps
  began = time.time()
  state, optimizer, marks, origin = first_state(experiment, own, workdir, mesh, say)
  start = int(state.step)
  _say_extension(own, config, start, say)
  train_step = step_lib.make_train_step(experiment.model, objective, optimizer, marks,
                                        config.optimizer.grad_accum_steps)
  eval_step = step_lib.make_eval_step(experiment.model, objective, marks)
  merge = lambda: partition.merge(state.trained, state.frozen, marks)
  params = jax.eval_shape(merge)
  count = count_parameters(params, config.model.vocab_size)
  _write_json(workdir / "run.json", _run_record())
  _header(experiment, mesh, count, origin, start, say)
  peak, peak_source = metrics_lib.peak_flops(mesh)
  one = experiment.batches.read(0, range(1))
  flops = training.batch_size * metrics_lib.model_flops(
      experiment.model, params, one, causal=_causal(config.model.name))
  say(f"peak        {peak / 1e9:,.0f} GFLOP/s ({peak_source}), {flops / 1e9:,.1f} GFLOP a step")
  saver = manager.Manager(workdir, training.keep, training.keep_best, experiment.tokenizer)
  log = Log(workdir, start, steps)
  stream = batches_lib.stream(experiment.batches, start, steps, mesh, config.data.prefetch)
  tokens = training.batch_size * training.sequence_length
  first_profiled, last_profiled = _profile_range(training.profile)
  history, checked, saved, figures, paces = [], start, start if own else -1, {}, []
  mark, paused = time.perf_counter(), 0.0
  on_cpu = jax.default_backend() == "cpu"

  def settle(number) -> list[dict]:
    """The metrics since the last call, on the host, finite."""
    nonlocal history, checked
    found, history = jax.device_get(history), []
    _check_finite(found, checked)
    checked = number
    return found

  def save(number, results):
    nonlocal saved
    if saved != number:
      saver.save(number, merge(), state.opt_state, {**experiment.description(), "metrics": results})
      saved = number

  unlogged: list[dict] = []
  try:
    for number in range(start, steps):
      if number == first_profiled:
        jax.profiler.start_trace(str(workdir / "profile"))
      state, found = train_step(state, next(stream), training.seed)
      if on_cpu:   # steps queued up on several CPU devices can wait for each other for ever
        jax.block_until_ready(found)
      history.append(found)
      done = number + 1
      log.advance()
      if done == last_profiled:
        jax.block_until_ready(state)
        jax.profiler.stop_trace()
      if done % training.log_every == 0 or done == steps:
        unlogged += settle(done)
        seconds = time.perf_counter() - mark - paused
        pace = len(unlogged) * tokens / seconds
        paces.append(pace)
        log.metrics(done, {**metrics_lib.means(unlogged), "tokens_per_second": pace,
                           "mfu": flops * pace / tokens / peak})
        unlogged, mark, paused = [], time.perf_counter(), 0.0
      pause = time.perf_counter()
      results = {}
      if experiment.eval_rows is not None and (
          done == steps or training.eval_every and done % training.eval_every == 0):
        unlogged += settle(done)
        found = evaluate(eval_step, state.trained, state.frozen, objective, experiment.eval_rows,
                         training.batch_size, mesh, training.eval_batches, stop)
        if found is not None:
          results = figures = found
          log.metrics(done, found, "eval")
      due = training.save_every and done % training.save_every == 0 or training.keep_best and results
      if due or done == steps or stop.signal:
        unlogged += settle(done)
        save(done, results)
        if stop.signal:
          break
      paused += time.perf_counter() - pause
  finally:
    log.close()
    saver.close()
  if stop.signal:
    say(f"saved step {done}; the same command goes on from there")
    raise Stopped(128 + stop.signal)
  if start >= steps and not figures and experiment.eval_rows is not None:
    figures = evaluate(eval_step, state.trained, state.frozen, objective, experiment.eval_rows,
                       training.batch_size, mesh, training.eval_batches)
  result = {"step": steps, "parameters": count, "origin": origin, "seconds": time.time() - began,
            "tokens_per_second": float(np.median(paces)) if paces else None,
            "mfu": float(np.median(paces)) * flops / tokens / peak if paces else None,
            "data": {name: {"epochs": epochs, "tokens": seen} for name, (epochs, seen) in
                     zip(experiment.names, experiment.batches.usage(steps))}, "eval": figures}
  _write_json(workdir / "result.json", result)
  say(f"done: step {steps} in {workdir}, {duration(result['seconds'])}")
  return result


def _causal(name: str) -> bool:
  return importlib.import_module(f"llm.models.{name}").STYLE.causal


def _say_extension(own, config: Config, start: int, say):
  """Says what more steps than the checkpoint was made for do to the schedule."""
  if not own:
    return
  old = manager.describe(own)["config"]["training"]["steps"]
  if old != config.training.steps:
    say(f"the run was planned for {old} steps and now for {config.training.steps}: the "
        f"{config.optimizer.schedule} schedule is that of the new length from step {start} on, so the learning "
        "rate jumps to where a run of that length would have it")


def _profile_range(text: str) -> tuple[int, int]:
  if not text:
    return -1, -1
  first, _, last = text.partition(":")
  if not (first.isdigit() and last.isdigit() and int(first) < int(last)):
    raise UserError(f"config.training.profile={text!r} is not of the form '10:15'")
  return int(first), int(last)
