"""What a run prints before its first step."""

import os
from typing import Callable

import jax
from etils import epath
from jax.sharding import Mesh

from llm import core
from llm.checkpoints import manager
from llm.config import Config, DataConfig
from llm.models import precision, resolve
from llm.performance import flops
from llm.training import optimizer as optimizer_lib
from llm.training.experiment import Training

# Batches ahead of a step, above which there is no use in more.
MOST_AHEAD = 256


def show(
  experiment: Training, mesh: Mesh, parameters: int, origin: str, first_step: int, say: Callable
):
  """Prints devices, types, model, batch, data, attention and the origin of the parameters."""
  config = experiment.config
  device = mesh.devices.flat[0]
  shape = " x ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
  types = precision.explained(experiment.asked.model.dtype, config.model.dtype, device.platform)
  say(f"devices     {mesh.size} x {device.device_kind}, mesh {shape}")
  say(f"dtype       {types}")
  say(f"layers      {config.model.scan}")
  say(f"attention   {_attention(experiment, device.platform, mesh)}")
  say(
    f"model       {config.model.name}, {parameters:,} parameters, "
    f"objective {config.objective['name']}"
  )
  _show_batches(experiment, parameters, say)
  _show_recipe(experiment, say)
  _warn_of_input(config.data)
  say(f"parameters  {origin}" + (f", step {first_step}" if first_step else ""))


def _warn_of_input(data: DataConfig):
  """Warns of numbers that slow the input down."""
  cores = os.cpu_count() or 1
  if data.workers > cores:
    core.warn(
      f"config.data.workers={data.workers} is more than the {cores} cores of this machine: the "
      "workers will wait for each other"
    )
  if data.prefetch > MOST_AHEAD:
    core.warn(
      f"config.data.prefetch={data.prefetch:,} keeps so many batches in memory: a few are enough"
    )


def _attention(experiment: Training, platform: str, mesh: Mesh) -> str:
  """The backend of the attention, and on a TPU why it is not the fast one."""
  model = experiment.config.model
  if platform != "tpu" or model.attention != "reference":
    return model.attention
  length = experiment.config.training.sequence_length
  reason = resolve.cannot("splash", model, length, mesh.shape["context"], trains=True)
  return f"reference, a T x T array in memory ({reason or 'as the config says'})"


def _show_batches(experiment: Training, parameters: int, say: Callable):
  batches = experiment.batches
  steps = experiment.config.training.steps
  length = experiment.config.training.sequence_length
  examples = batches.examples()
  packed = "" if examples == batches.batch_size else f", about {examples:,.0f} examples"
  say(
    f"batch       {batches.batch_size} rows x {length} = {batches.batch_size * length:,} tokens a "
    f"step{packed}, {steps:,} steps, "
    f"{batches.tokens() * steps / parameters:.3g} tokens a parameter"
  )
  for name, (epochs, tokens) in zip(experiment.names, batches.usage(steps)):
    say(f"data        {name}: {tokens:,.0f} tokens, {epochs:.3g} epochs")
  for name, rows in zip(experiment.names, batches.rows):
    if rows.note:
      say(f"            {name}: {rows.note}")
  for remark in experiment.remarks():
    say(f"            {remark}")
  experiment.warn_of_shared_data()


def _show_recipe(experiment: Training, say: Callable):
  """The settings by which a run learns or fails to."""
  config = experiment.config
  optimizer = config.optimizer
  warmup = optimizer_lib.warmup_steps(optimizer, config.training.steps)
  say(
    f"recipe      {optimizer.name}, learning rate {optimizer.learning_rate:.3g}, schedule "
    f"{optimizer.schedule} after a warm-up of {warmup:,} steps, weights start at "
    f"{config.model.init_std:.3g}"
  )


def show_baselines(experiment: Training, say: Callable) -> dict[str, float]:
  """What models without a network reach on the evaluation source, printed; {} without one.

  Only the first process logs it, and it would not compare with a part of the source.
  """
  held_out = experiment.held_out
  if held_out is None or experiment.config.training.eval_batches or jax.process_index():
    return {}
  baselines = experiment.objective.baselines(experiment.train, held_out)
  if baselines:
    figures = ", ".join(f"{name} {value:.1%}" for name, value in baselines.items())
    say(f"baseline    {figures}")
  return baselines


def show_peak(experiment: Training, flops_a_row: float, mesh: Mesh, say: Callable) -> float:
  """The peak FLOP/s of the mesh, which is printed too."""
  config = experiment.config
  peak, source = flops.peak_flops(mesh, precision.of(config.model))
  of_step = flops_a_row * experiment.batches.batch_size
  say(f"peak        {peak / 1e9:,.0f} GFLOP/s ({source}), {of_step / 1e9:,.1f} GFLOP a step")
  return peak


def show_new_length(resume_from: epath.Path, config: Config, first_step: int, say: Callable):
  """Says what it does to the learning rate that the number of steps has changed."""
  planned = manager.describe(resume_from).config.training.steps
  steps = config.training.steps
  if planned == steps:
    return
  before = optimizer_lib.rate_at(config.optimizer, planned, first_step)
  now = optimizer_lib.rate_at(config.optimizer, steps, first_step)
  change = f"stays {now:.3g}" if now == before else f"is {now:.3g} instead of {before:.3g}"
  say(
    f"the run was planned for {planned} steps and now for {steps}: the {config.optimizer.schedule} "
    f"schedule is that of the new length, so the learning rate of step {first_step} {change}"
  )
