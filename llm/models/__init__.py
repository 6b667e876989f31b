"""Architectures (Flax Linen): `build_backbone` is the one switch between them."""
import importlib

from llm.config import ModelConfig


def build_backbone(config: ModelConfig):
  """The backbone of `config.name`: `backbone(batch, train=) -> (hidden_BxTxD, table_VxD)`."""
  return importlib.import_module(f"llm.models.{config.name}").Backbone(config)
