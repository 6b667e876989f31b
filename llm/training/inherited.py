"""What a run takes from the checkpoint that it starts from, where its config leaves it open."""

import dataclasses
from typing import Callable

from etils import epath

from llm import models
from llm.checkpoints import locate
from llm.checkpoints.manager import Description
from llm.config import Config, ModelConfig
from llm.models.architecture import init_std_of
from llm.training import consistency

# What else follows a checkpoint of the same architecture, where it has its default.
DETAILS = (
  "embedding_width",
  "num_kv_heads",
  "head_width",
  "norm_epsilon",
  "rope_theta",
  "local_rope_theta",
  "global_every",
  "window",
  "tied",
  "scaled_output",
  "gated",
)


def completed(
  model: ModelConfig, start: Description | None, vocab_size: int, labelled: bool
) -> ModelConfig:
  """The model with what is not set taken from the checkpoint that the run starts from.

  labelled: whether the objective is; its runs have dropout where the architecture is tuned with it.
  Raises UserError where keys are missing or do not fit one another.
  """
  if start:
    same = dataclasses.asdict(start.config.model)
    unset = {name: same[name] for name in consistency.SHAPE if not getattr(model, name)}
    if model.name in ("", same["name"]):
      default = ModelConfig()
      left_open = [name for name in DETAILS if getattr(model, name) == getattr(default, name)]
      unset |= {name: same[name] for name in left_open}
    if not model.init_std:
      unset["init_std"] = same["init_std"]
    if model.dropout < 0:
      tuning = models.facts_of(model.name or same["name"]).tuning_dropout if labelled else 0.0
      unset["dropout"] = same["dropout"] or tuning
    model = dataclasses.replace(model, **unset)
  consistency.check_model(model, vocab_size)
  return dataclasses.replace(
    model,
    vocab_size=vocab_size,
    dropout=max(model.dropout, 0.0),
    init_std=init_std_of(model, models.facts(model)),
  )


def within_positions(config: Config, model: ModelConfig, say: Callable) -> Config:
  """The config of a run on a checkpoint, with rows of no more tokens than the model's positions."""
  length = config.training.sequence_length
  if length <= model.max_length:
    return config
  say(f"rows        of {model.max_length} tokens, not {length}: the model has no more positions")
  training = dataclasses.replace(config.training, sequence_length=model.max_length)
  return dataclasses.replace(config, training=training)


def with_start(config: Config, start: epath.Path, saved: Description | None) -> Config:
  """The config with the very step that the run began from, which may also be its reference.

  start: the step that a new run starts from. saved: what a run that goes on was.
  """
  if saved:
    checkpoint = saved.config.transfer.checkpoint
  else:
    checkpoint = locate.exact(config.transfer.checkpoint, start)
  transfer = dataclasses.replace(config.transfer, checkpoint=checkpoint)
  return dataclasses.replace(config, transfer=transfer)


def with_dtype(config: Config, saved: Description) -> Config:
  """The config with the type that a run began with, where this machine's would be taken."""
  if config.model.dtype != "auto" or "dtype" not in saved.settled:
    return config
  model = dataclasses.replace(config.model, dtype=saved.settled["dtype"])
  return dataclasses.replace(config, model=model)


def with_learning_rate(config: Config, saved: Description) -> Config:
  """The config with the learning rate that a run began with, however long it is now."""
  if config.optimizer.learning_rate != -1:
    return config
  rate = saved.config.optimizer.learning_rate
  optimizer = dataclasses.replace(config.optimizer, learning_rate=rate)
  return dataclasses.replace(config, optimizer=optimizer)
