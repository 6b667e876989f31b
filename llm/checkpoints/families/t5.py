"""T5, with a plain or a gated MLP."""

import functools
from typing import Any, Mapping

from llm.checkpoints.families.base import (
  Family,
  Tensor,
  boolean,
  expect,
  kernel,
  non_negative,
  positive_integer,
)
from llm.config import ModelConfig
from llm.core import UserError
from llm.models import t5
from llm.models.architecture import head_width_of, padded_vocab


def model_of(config: Mapping[str, Any]) -> ModelConfig:
  kinds = {"relu": False, "gated-gelu": True}
  kind = config.get("feed_forward_proj", "relu")
  if not isinstance(kind, str) or kind not in kinds:
    raise UserError(
      f"config.json: feed_forward_proj={kind!r} is not supported, only {', '.join(kinds)}"
    )
  number = functools.partial(positive_integer, config)
  expect(
    config,
    {
      "relative_attention_num_buckets": t5.BUCKETS,
      "relative_attention_max_distance": t5.FARTHEST,
      "num_decoder_layers": number("num_layers"),
    },
  )
  return ModelConfig(
    name="t5",
    num_layers=number("num_layers"),
    width=number("d_model"),
    num_heads=number("num_heads"),
    head_width=number("d_kv"),
    mlp_dim=number("d_ff"),
    vocab_size=number("vocab_size"),
    max_length=number("n_positions") if config.get("n_positions") else 512,
    dropout=non_negative(config, "dropout_rate", 0.1),
    init_std=1.0,
    gated=kinds[kind],
    norm_epsilon=non_negative(config, "layer_norm_epsilon", 1e-6),
    # transformers 5 always writes tie_word_embeddings=true. The actual value is in
    # scale_decoder_outputs.
    tied=boolean(config, "scale_decoder_outputs", boolean(config, "tie_word_embeddings", True)),
  )


def config_of(model: ModelConfig) -> dict[str, Any]:
  return {
    "model_type": "t5",
    "num_layers": model.num_layers,
    "num_decoder_layers": model.num_layers,
    "d_model": model.width,
    "num_heads": model.num_heads,
    "d_kv": head_width_of(model),
    "d_ff": model.mlp_dim,
    "vocab_size": padded_vocab(model.vocab_size),
    "n_positions": model.max_length,
    "dropout_rate": model.dropout,
    "layer_norm_epsilon": model.norm_epsilon or t5.FACTS.norm_epsilon,
    "relative_attention_num_buckets": t5.BUCKETS,
    "relative_attention_max_distance": t5.FARTHEST,
    "is_encoder_decoder": True,
    "decoder_start_token_id": 0,
    "feed_forward_proj": "gated-gelu" if model.gated else "relu",
    # transformers 5 always ties the weights. It takes a missing scale_decoder_outputs from
    # tie_word_embeddings.
    "tie_word_embeddings": model.tied,
    **({} if model.scaled_output or not model.tied else {"scale_decoder_outputs": False}),
  }


def _stack(stack: str, cross: bool, gated: bool) -> list[Tensor]:
  """The tensors of the encoder or the decoder.

  stack: "encoder" or "decoder". cross: with attention to the encoder. gated: of the MLP.
  """
  layer = stack + ".block.{}.layer."
  ours = f"backbone/{stack}/layers/"
  attentions = {"attention": "SelfAttention"}
  if cross:
    attentions["cross"] = "EncDecAttention"
  mlp = f"{layer}{len(attentions)}"
  inputs = {"gate": "wi_0", "up": "wi_1"} if gated else {"up": "wi"}
  tensors = [
    Tensor(
      f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias.weight",
      (f"backbone/{stack}/relative/embedding",),
    ),
    Tensor(f"{stack}.final_layer_norm.weight", (f"backbone/{stack}/final_norm/scale",)),
    Tensor(f"{mlp}.layer_norm.weight", (f"{ours}mlp_norm/scale",)),
    kernel(f"{mlp}.DenseReluDense.wo", f"{ours}mlp/down"),
  ]
  for part, name in inputs.items():
    tensors.append(kernel(f"{mlp}.DenseReluDense.{name}", f"{ours}mlp/{part}"))
  for number, (part, name) in enumerate(attentions.items()):
    attention = f"{layer}{number}.{name}"
    tensors += [
      Tensor(f"{layer}{number}.layer_norm.weight", (f"{ours}{part}_norm/scale",)),
      kernel(f"{attention}.q", f"{ours}{part}/query"),
      kernel(f"{attention}.k", f"{ours}{part}/key"),
      kernel(f"{attention}.v", f"{ours}{part}/value"),
      kernel(f"{attention}.o", f"{ours}{part}/out", inputs=2),
    ]
  return tensors


def _family(gated: bool) -> Family:
  """T5 with the one or the other MLP."""
  return Family(
    model_type="t5",
    ours="t5",
    classes=dict.fromkeys(("span_corruption", "text_to_text"), "T5ForConditionalGeneration"),
    prefix="",
    tensors=(
      Tensor("shared.weight", ("backbone/token/embedding",)),
      Tensor("lm_head.weight", ("backbone/output/embedding",)),
      *_stack("encoder", cross=False, gated=gated),
      *_stack("decoder", cross=True, gated=gated),
    ),
    # Old releases of transformers wrote this bias and did not use it.
    buffers=r"decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight$",
    tied={
      name: "shared.weight"
      for name in ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight")
    },
    model=model_of,
    config=config_of,
    special={"pad": "pad", "eos": "eos"},
    padded=True,
    gated=gated,
    tied_unscaled=True,
    sentinels=100,
  )


PLAIN = _family(gated=False)
GATED = _family(gated=True)
