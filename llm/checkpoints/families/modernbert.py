"""ModernBERT."""

import functools
from typing import Any, Mapping

from llm.checkpoints.families.base import (
  LAYERS,
  MODEL_LAYER,
  QUERY_KEY_VALUE,
  Family,
  Tensor,
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
from llm.models import modernbert

GLOBAL, LOCAL = "full_attention", "sliding_attention"
# What a config.json must say, or leave out.
FIXED = {
  "hidden_activation": "gelu",
  "classifier_activation": "gelu",
  "norm_bias": False,
  "attention_bias": False,
  "mlp_bias": False,
  "classifier_bias": False,
  "decoder_bias": True,
  "tie_word_embeddings": True,
}


def model_of(config: Mapping[str, Any]) -> ModelConfig:
  number = functools.partial(positive_integer, config)
  expect(config, FIXED)
  every = _global_every(config, number("num_hidden_layers"))
  return ModelConfig(
    name="modernbert",
    **sizes_of(config),
    dropout=non_negative(config, "embedding_dropout", 0.0),
    norm_epsilon=non_negative(config, "norm_eps", 1e-5),
    rope_theta=_rope_theta(config, "full"),
    local_rope_theta=_rope_theta(config, "sliding"),
    global_every=every,
    window=number("local_attention") if every > 1 else 0,
  )


def _global_every(config: Mapping[str, Any], num_layers: int) -> int:
  """The distance between layers with global attention.

  New releases of transformers list the kind of every layer, old ones give the number. Raises
  UserError on a list that is not periodic.
  """
  kinds = config.get("layer_types")
  if kinds is None:
    key = "global_attn_every_n_layers"
    return min(positive_integer(config, key) if key in config else 3, num_layers)
  is_whole = isinstance(kinds, list) and len(kinds) == num_layers
  later = kinds[1:] if is_whole else []
  every = later.index(GLOBAL) + 1 if GLOBAL in later else num_layers
  if not is_whole or kinds != _layer_types(every, num_layers):
    raise UserError(
      f"config.json: layer_types={kinds} is not supported, only {num_layers} layers where the "
      f"first and every n-th after it are {GLOBAL} and the others {LOCAL}"
    )
  return every


def _layer_types(every: int, num_layers: int) -> list[str]:
  return [LOCAL if number % every else GLOBAL for number in range(num_layers)]


def _rope_theta(config: Mapping[str, Any], kind: str) -> float:
  """The base of the rotary wavelengths in layers of a kind: full or sliding."""
  rope = json_object(json_object(config, "rope_parameters"), f"{kind}_attention")
  expect_plain_rope(rope)
  old_keys = {"full": "global_rope_theta", "sliding": "local_rope_theta"}
  defaults = {"full": 160_000.0, "sliding": 10_000.0}
  return non_negative(rope, "rope_theta", non_negative(config, old_keys[kind], defaults[kind]))


def config_of(model: ModelConfig) -> dict[str, Any]:
  thetas = {GLOBAL: model.rope_theta, LOCAL: model.local_rope_theta}
  return {
    "model_type": "modernbert",
    **FIXED,
    "norm_eps": model.norm_epsilon or modernbert.FACTS.norm_epsilon,
    **their_sizes(model),
    "embedding_dropout": model.dropout,
    "attention_dropout": model.dropout,
    "local_attention": model.window or model.max_length,
    "layer_types": _layer_types(model.global_every, model.num_layers),
    # transformers 4 reads the next three keys, transformers 5 reads rope_parameters.
    "global_attn_every_n_layers": model.global_every,
    "global_rope_theta": model.rope_theta,
    "local_rope_theta": model.local_rope_theta,
    "rope_parameters": {
      kind: {"rope_type": "default", "rope_theta": theta} for kind, theta in thetas.items()
    },
  }


FAMILY = Family(
  model_type="modernbert",
  ours="modernbert",
  classes={"masked_lm": "ModernBertForMaskedLM"},
  prefix="model.",
  tensors=(
    Tensor("model.embeddings.tok_embeddings.weight", ("backbone/token/embedding",)),
    scale("model.embeddings.norm", "backbone/embedding_norm"),
    scale(f"{MODEL_LAYER}attn_norm", f"{LAYERS}attention_norm", first=1),
    kernel(f"{MODEL_LAYER}attn.Wqkv", *QUERY_KEY_VALUE),
    kernel(f"{MODEL_LAYER}attn.Wo", f"{LAYERS}attention/out", inputs=2),
    scale(f"{MODEL_LAYER}mlp_norm", f"{LAYERS}mlp_norm"),
    kernel(f"{MODEL_LAYER}mlp.Wi", f"{LAYERS}mlp/gate", f"{LAYERS}mlp/up"),
    kernel(f"{MODEL_LAYER}mlp.Wo", f"{LAYERS}mlp/down"),
    scale("model.final_norm", "backbone/final_norm"),
    kernel("head.dense", "head/transform"),
    scale("head.norm", "head/transform_norm"),
    Tensor("decoder.bias", ("head/lm/bias",)),
  ),
  buffers=r"rotary_emb\.",
  tied={"decoder.weight": "model.embeddings.tok_embeddings.weight"},
  model=model_of,
  config=config_of,
  special={"pad": "pad", "cls": "cls", "sep": "sep", "bos": "cls", "eos": "sep"},
  tokenizer_json=True,
)
