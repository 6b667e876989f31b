"""Llama."""

import functools
from typing import Any, Mapping

from llm.checkpoints.families.base import (
  DECODER_OBJECTIVES,
  DECODER_SPECIAL,
  LAYERS,
  MODEL_LAYER,
  Family,
  Tensor,
  boolean,
  expect,
  expect_plain_rope,
  json_object,
  kernel,
  non_negative,
  positive_integer,
  scale,
  sizes_of,
  their_sizes,
)
from llm.config import ModelConfig
from llm.core import UserError
from llm.models import llama
from llm.models.architecture import kv_heads_of

# What a config.json must say, or leave out.
FIXED = {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False}


def model_of(config: Mapping[str, Any]) -> ModelConfig:
  expect(config, FIXED)
  rope = {**json_object(config, "rope_parameters"), **json_object(config, "rope_scaling")}
  expect_plain_rope(rope)
  number = functools.partial(positive_integer, config)
  if config.get("head_dim") not in (None, number("hidden_size") // number("num_attention_heads")):
    raise UserError(
      f"config.json: head_dim={config['head_dim']} is not hidden_size / num_attention_heads"
    )
  kv_heads = "num_key_value_heads" if config.get("num_key_value_heads") else "num_attention_heads"
  return ModelConfig(
    name="llama",
    **sizes_of(config),
    num_kv_heads=number(kv_heads),
    dropout=0.0,
    norm_epsilon=non_negative(config, "rms_norm_eps", 1e-6),
    rope_theta=non_negative(rope, "rope_theta", non_negative(config, "rope_theta", 10_000.0)),
    tied=boolean(config, "tie_word_embeddings", False),
  )


def config_of(model: ModelConfig) -> dict[str, Any]:
  return {
    "model_type": "llama",
    **FIXED,
    **their_sizes(model),
    "num_key_value_heads": kv_heads_of(model),
    "rms_norm_eps": model.norm_epsilon or llama.FACTS.norm_epsilon,
    "rope_theta": model.rope_theta,
    "rope_parameters": {"rope_type": "default", "rope_theta": model.rope_theta},
    "tie_word_embeddings": model.tied,
  }


FAMILY = Family(
  model_type="llama",
  ours="llama",
  classes=dict.fromkeys(DECODER_OBJECTIVES, "LlamaForCausalLM"),
  prefix="model.",
  tensors=(
    Tensor("model.embed_tokens.weight", ("backbone/token/embedding",)),
    scale(f"{MODEL_LAYER}input_layernorm", f"{LAYERS}attention_norm"),
    kernel(f"{MODEL_LAYER}self_attn.q_proj", f"{LAYERS}attention/query"),
    kernel(f"{MODEL_LAYER}self_attn.k_proj", f"{LAYERS}attention/key"),
    kernel(f"{MODEL_LAYER}self_attn.v_proj", f"{LAYERS}attention/value"),
    kernel(f"{MODEL_LAYER}self_attn.o_proj", f"{LAYERS}attention/out", inputs=2),
    scale(f"{MODEL_LAYER}post_attention_layernorm", f"{LAYERS}mlp_norm"),
    kernel(f"{MODEL_LAYER}mlp.gate_proj", f"{LAYERS}mlp/gate"),
    kernel(f"{MODEL_LAYER}mlp.up_proj", f"{LAYERS}mlp/up"),
    kernel(f"{MODEL_LAYER}mlp.down_proj", f"{LAYERS}mlp/down"),
    scale("model.norm", "backbone/final_norm"),
    Tensor("lm_head.weight", ("backbone/output/embedding",)),
  ),
  buffers=r"rotary_emb\.inv_freq$",
  tied={"lm_head.weight": "model.embed_tokens.weight"},
  model=model_of,
  config=config_of,
  special=DECODER_SPECIAL,
)
