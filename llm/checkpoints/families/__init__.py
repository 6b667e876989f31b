"""Tables between the architectures of `transformers` and those of llm/models.

A file describes one architecture as a `Family`: how its keys of config.json, its names of tensors
and their layouts relate to ours. A new architecture is a new file and its line in FAMILIES.
"""

import re
from typing import Any, Mapping

from llm.checkpoints.families import bert, electra, gpt2, llama, modernbert, qwen3, t5
from llm.checkpoints.families.base import Family
from llm.config import ModelConfig
from llm.core import UserError

FAMILIES = (
  bert.FAMILY,
  electra.FAMILY,
  modernbert.FAMILY,
  gpt2.FAMILY,
  llama.FAMILY,
  qwen3.FAMILY,
  t5.PLAIN,
  t5.GATED,
)
MODEL_TYPES = tuple(dict.fromkeys(family.model_type for family in FAMILIES))


def find(config: Mapping[str, Any]) -> Family | None:
  """The family of a config.json; None where its model_type is not supported.

  Raises UserError where a key has a value that is not supported.
  """
  for family in FAMILIES:
    if family.model_type == config.get("model_type") and family.serves(family.model(config)):
      return family
  return None


def of_model(model: ModelConfig) -> Family:
  """The family that exports a model. Raises UserError where transformers has none."""
  for family in FAMILIES:
    if family.serves(model):
      return family
  raise UserError(f"transformers has no architecture like {model.name}")


def full_name(family: Family, name: str) -> str:
  """The name of a tensor in the family's table.

  A checkpoint may leave out the prefix, and old ones call a norm's parameters gamma and beta.
  """
  name = re.sub(r"LayerNorm\.beta$", "LayerNorm.bias", name)
  name = re.sub(r"LayerNorm\.gamma$", "LayerNorm.weight", name)
  table = {tensor.theirs.replace("{}", "0") for tensor in family.tensors} | set(family.tied)
  first_layer = re.sub(r"\.\d+\.", ".0.", name, count=1)
  if first_layer not in table and family.prefix + first_layer in table:
    return family.prefix + name
  return name
