"""What a run says of itself before its first step."""

import os
from typing import Callable

from jax.sharding import Mesh

from llm.models import precision, resolve
from llm.training.experiment import Training


def show(experiment: Training, mesh: Mesh, parameters: int, origin: str, start: int, say: Callable):
  """Devices, types, model, batch, data, attention, and where the parameters came from."""
  config = experiment.config
  platform = mesh.devices.flat[0].platform
  shape = " x ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
  types = precision.explained(experiment.asked.model.dtype, config.model.dtype, platform)
  say(f"devices     {mesh.size} x {mesh.devices.flat[0].device_kind}, mesh {shape}")
  say(f"dtype       {types}")
  say(f"layers      {config.model.scan}")
  say(f"attention   {_attention(experiment, platform, mesh)}")
  say(
    f"model       {config.model.name}, {parameters:,} parameters, "
    f"objective {config.objective['name']}"
  )
  _show_batches(experiment, parameters, say)
  if config.data.workers > (os.cpu_count() or 1):
    say(
      f"hint        config.data.workers={config.data.workers} are more than this machine's "
      f"{os.cpu_count()} cores: they will wait for each other"
    )
  say(f"parameters  {origin}" + (f", step {start}" if start else ""))


def _attention(experiment: Training, platform: str, mesh: Mesh) -> str:
  """The backend, and on a TPU why it is not the fast one."""
  model = experiment.config.model
  if platform != "tpu" or model.attention != "reference":
    return model.attention
  length, context = experiment.config.training.sequence_length, mesh.shape["context"]
  reason = resolve.cannot("splash", model, length, context, trains=True) or "as the config says"
  return f"reference, a T x T array in memory ({reason})"


def _show_batches(experiment: Training, parameters: int, say: Callable):
  batches, steps = experiment.batches, experiment.config.training.steps
  length, examples = experiment.config.training.sequence_length, batches.examples()
  shared = "" if examples == batches.batch_size else f", about {examples:,.0f} examples"
  say(
    f"batch       {batches.batch_size} rows x {length} = {batches.batch_size * length:,} tokens a "
    f"step{shared}, {steps:,} steps, "
    f"{batches.tokens() * steps / parameters:.3g} tokens a parameter"
  )
  for name, (epochs, tokens) in zip(experiment.names, batches.usage(steps)):
    say(f"data        {name}: {tokens:,.0f} tokens, {epochs:.3g} epochs")
  for name, rows in zip(experiment.names, batches.rows):
    if rows.note:
      say(f"            {name}: {rows.note}")
