"""What a run prints before its first step."""

import os
from typing import Callable

from jax.sharding import Mesh

from llm import core
from llm.config import DataConfig
from llm.models import precision, resolve
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
