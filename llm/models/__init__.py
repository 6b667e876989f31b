"""Architectures (Flax Linen): `build_backbone` is the one switch between them."""

import importlib

from llm.config import ModelConfig


def build_backbone(config: ModelConfig):
  """The backbone of `config.name`: `backbone(batch, train=, cache=None) -> (hidden_BxTxD, table_VxD, cache)`."""
  return importlib.import_module(f"llm.models.{config.name}").Backbone(config)
