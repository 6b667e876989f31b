"""Architectures (Flax Linen): a file exports FACTS (what it is), SIZES (published) and Backbone."""

import importlib
from types import ModuleType

from flax import linen as nn

from llm.config import ModelConfig
from llm.core import UserError
from llm.models.transformer import Facts

NAMES = ("bert", "electra", "gpt", "llama", "modernbert", "qwen3", "t5")


def _module(name: str) -> ModuleType:
  if name not in NAMES:
    raise UserError(f"config.model.name must be one of {', '.join(NAMES)}, not {name!r}")
  return importlib.import_module(f"llm.models.{name}")


def facts_of(name: str) -> Facts:
  """What an architecture is. Raises UserError where there is none of that name."""
  return _module(name).FACTS


def facts(config: ModelConfig) -> Facts:
  """What the architecture of a config is."""
  return facts_of(config.name)


def build_backbone(config: ModelConfig) -> nn.Module:
  """The backbone: (batch, train=, cache=None) -> (hidden_BxTxD, table_VxD, cache)."""
  return _module(config.name).Backbone(config)
