"""Qwen3: Llama with norms of queries and keys."""

import dataclasses
from typing import Any, Mapping

from llm.checkpoints.families import llama
from llm.checkpoints.families.base import (
  DECODER_OBJECTIVES,
  DECODER_SPECIAL,
  LAYERS,
  MODEL_LAYER,
  Family,
  expect,
  positive_integer,
  scale,
)
from llm.config import ModelConfig
from llm.models import qwen3
from llm.models.architecture import head_width_of, padded_vocab


def model_of(config: Mapping[str, Any]) -> ModelConfig:
  expect(config, {"use_sliding_window": False})
  model = llama.model_of({**config, "head_dim": None})
  return dataclasses.replace(model, name="qwen3", head_width=positive_integer(config, "head_dim"))


def config_of(model: ModelConfig) -> dict[str, Any]:
  return llama.config_of(model) | {
    "model_type": "qwen3",
    "head_dim": head_width_of(model),
    "vocab_size": padded_vocab(model.vocab_size),
    "rms_norm_eps": model.norm_epsilon or qwen3.FACTS.norm_epsilon,
    "use_sliding_window": False,
  }


FAMILY = Family(
  model_type="qwen3",
  ours="qwen3",
  classes=dict.fromkeys(DECODER_OBJECTIVES, "Qwen3ForCausalLM"),
  prefix="model.",
  tensors=(
    *llama.FAMILY.tensors,
    scale(f"{MODEL_LAYER}self_attn.q_norm", f"{LAYERS}attention/query_norm"),
    scale(f"{MODEL_LAYER}self_attn.k_norm", f"{LAYERS}attention/key_norm"),
  ),
  buffers=llama.FAMILY.buffers,
  tied=llama.FAMILY.tied,
  model=model_of,
  config=config_of,
  special=DECODER_SPECIAL,
  padded=True,
)
