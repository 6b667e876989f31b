"""GPT-2."""

from typing import Any, Mapping

from llm.checkpoints.families.base import (
  DECODER_OBJECTIVES,
  DECODER_SPECIAL,
  LAYERS,
  QUERY_KEY_VALUE,
  Family,
  Tensor,
  conv1d,
  expect,
  non_negative,
  norm,
  positive_integer,
  sizes_of,
  their_sizes,
)
from llm.config import ModelConfig
from llm.models import gpt

NAMES = {
  "num_layers": "n_layer",
  "width": "n_embd",
  "num_heads": "n_head",
  "mlp_dim": "n_inner",
  "vocab_size": "vocab_size",
  "max_length": "n_positions",
}


def model_of(config: Mapping[str, Any]) -> ModelConfig:
  expect(
    config,
    {
      "activation_function": "gelu_new",
      "scale_attn_weights": True,
      "tie_word_embeddings": True,
      "scale_attn_by_inverse_layer_idx": False,
      "add_cross_attention": False,
    },
  )
  # An absent or empty n_inner stands for four times the width.
  inner = config.get("n_inner") or 4 * positive_integer(config, "n_embd")
  return ModelConfig(
    name="gpt",
    **sizes_of({**config, "n_inner": inner}, NAMES),
    dropout=non_negative(config, "resid_pdrop", 0.1),
    norm_epsilon=non_negative(config, "layer_norm_epsilon", 1e-5),
  )


def config_of(model: ModelConfig) -> dict[str, Any]:
  return {
    "model_type": "gpt2",
    "activation_function": "gelu_new",
    "layer_norm_epsilon": model.norm_epsilon or gpt.FACTS.norm_epsilon,
    **their_sizes(model, NAMES),
    "resid_pdrop": model.dropout,
    "embd_pdrop": model.dropout,
    "attn_pdrop": model.dropout,
    "tie_word_embeddings": True,
  }


_LAYER = "transformer.h.{}."

FAMILY = Family(
  model_type="gpt2",
  ours="gpt",
  classes=dict.fromkeys(DECODER_OBJECTIVES, "GPT2LMHeadModel"),
  prefix="transformer.",
  tensors=(
    Tensor("transformer.wte.weight", ("backbone/token/embedding",)),
    Tensor("transformer.wpe.weight", ("backbone/position/embedding",)),
    *norm(f"{_LAYER}ln_1", f"{LAYERS}attention_norm"),
    *conv1d(f"{_LAYER}attn.c_attn", *QUERY_KEY_VALUE),
    *conv1d(f"{_LAYER}attn.c_proj", f"{LAYERS}attention/out", inputs=2),
    *norm(f"{_LAYER}ln_2", f"{LAYERS}mlp_norm"),
    *conv1d(f"{_LAYER}mlp.c_fc", f"{LAYERS}mlp/up"),
    *conv1d(f"{_LAYER}mlp.c_proj", f"{LAYERS}mlp/down"),
    *norm("transformer.ln_f", "backbone/final_norm"),
  ),
  buffers=r"\.attn\.(bias|masked_bias)$",
  tied={"lm_head.weight": "transformer.wte.weight"},
  model=model_of,
  config=config_of,
  special=DECODER_SPECIAL,
)
