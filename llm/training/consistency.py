"""The keys of a config fit one another, or UserError says which do not."""

import re
from typing import Any

import numpy as np

from llm import models
from llm.config import Config, ModelConfig
from llm.core import UserError
from llm.objectives import base

# The keys of a model that must be set, here or in the checkpoint that a run starts from.
SHAPE = ("name", "num_layers", "width", "num_heads", "mlp_dim", "max_length")


def check_run(config: Config):
  """Raises UserError where the keys of data and training do not fit one another."""
  if not config.data.train:
    raise UserError("config.data.train is not set: give a source, e.g. text:corpus.txt")
  training = config.training
  best = training.keep_best
  if best not in ("", "auto") and not (best.startswith(("max:", "min:")) and config.data.eval):
    raise UserError(
      "config.training.keep_best must be auto, 'max:METRIC' or 'min:METRIC', which needs "
      "config.data.eval"
    )
  if training.patience and not (best and config.data.eval and training.eval_every):
    raise UserError(
      f"config.training.patience={training.patience} needs config.data.eval, "
      "config.training.eval_every, and config.training.keep_best to say what is better"
    )
  if (training.steps > 0) == (training.epochs > 0) and training.epochs != -1:
    raise UserError(
      f"config.training.steps={training.steps} and config.training.epochs={training.epochs:g}: set "
      "one of them, the other to 0"
    )


def check_task(objective: base.Objective, model: ModelConfig, length: int):
  """Raises UserError where the objective, the model and the length of a row do not fit."""
  base.check_kind(objective, model)
  if model.embedding_start != "random" and objective.labelled:
    raise UserError(
      "config.model.embedding_start=cooccurrence is for pretraining on running text; take random"
    )
  if length > model.max_length:
    raise UserError(
      f"config.training.sequence_length={length} is longer than the model's "
      f"{model.max_length} positions (config.model.max_length)"
    )


def check_rows(rows: base.Rows, objective: base.Objective, model: ModelConfig, length: int):
  """Raises UserError where a row has other arrays than the objective's `batch_spec` says."""
  spec = objective.batch_spec(model, length)
  row = rows.example(0, np.random.default_rng(0))
  for name in sorted(spec.keys() | row.keys()):
    says, has = (_shape(arrays.get(name)) for arrays in (spec, row))
    if says != has:
      raise UserError(
        f"{type(objective).__module__}: {name!r} is {says} by batch_spec and {has} by example(0): "
        "let both say the same"
      )


def _shape(array: Any) -> str:
  """The type and shape of an array, e.g. int32[64]."""
  return "missing" if array is None else f"{array.dtype}{list(array.shape)}"


def check_model(model: ModelConfig, vocab_size: int):
  """Raises UserError where a key of a model is not set, or keys do not fit one another."""
  if missing := [name for name in SHAPE if not getattr(model, name)]:
    raise UserError(
      f"config.model.{missing[0]} is not set: give config.transfer.checkpoint, which has "
      "a model, or set the model's keys"
    )
  if model.vocab_size and model.vocab_size != vocab_size:
    raise UserError(
      f"config.model.vocab_size={model.vocab_size} but the tokenizer has {vocab_size} pieces; "
      "0 takes the tokenizer's"
    )
  _check_widths(model)
  _check_local_layers(model)
  if not model.tied and not models.facts(model).untied:
    raise UserError(
      f"config.model.tied=False: the output layer of {model.name} is its embedding table"
    )
  try:
    re.compile(model.lora_targets)
  except re.error as error:
    raise UserError(
      f"config.model.lora_targets={model.lora_targets!r} is no regular expression: {error}"
    )


def _check_widths(model: ModelConfig):
  """Raises UserError where widths and heads do not fit one another."""
  if not model.head_width and model.width % model.num_heads:
    raise UserError(
      f"config.model.width={model.width} must be a multiple of num_heads={model.num_heads}"
    )
  if model.num_kv_heads and model.num_heads % model.num_kv_heads:
    raise UserError(
      f"config.model.num_heads={model.num_heads} must be a multiple of "
      f"num_kv_heads={model.num_kv_heads}"
    )
  projects = models.facts(model).embedding_project
  if model.embedding_width not in (0, model.width) and not projects:
    raise UserError(
      f"config.model.embedding_width={model.embedding_width}: the embedding of {model.name} is as "
      f"wide as its layers, {model.width}; 0 is that width"
    )


def _check_local_layers(model: ModelConfig):
  """Raises UserError where the pattern of local layers does not fit the model."""
  if model.global_every > 1 and models.facts(model).kind != "encoder":
    raise UserError(
      f"config.model.global_every={model.global_every}: only encoders have local layers, and "
      f"{model.name} is none"
    )
  if (model.global_every > 1) != (model.window > 0):
    raise UserError(
      f"config.model.global_every={model.global_every} and config.model.window={model.window}: "
      "local layers need both, a pattern and a window; 1 and 0 are no local layers"
    )
  if model.global_every > model.num_layers:
    raise UserError(
      f"config.model.global_every={model.global_every} is more than the {model.num_layers} layers "
      "(config.model.num_layers)"
    )
