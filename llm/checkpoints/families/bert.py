"""BERT: BertForPreTraining and the classes of fine-tuning."""

from typing import Any, Mapping

from llm.checkpoints.families.base import (
  LAYERS,
  PAIRS,
  Family,
  Tensor,
  expect,
  linear,
  non_negative,
  norm,
  sizes_of,
  their_sizes,
)
from llm.config import ModelConfig
from llm.models import bert


def model_of(config: Mapping[str, Any]) -> ModelConfig:
  expect(
    config,
    {
      "hidden_act": "gelu",
      "type_vocab_size": 2,
      "position_embedding_type": "absolute",
      "is_decoder": False,
      "tie_word_embeddings": True,
    },
  )
  return ModelConfig(
    name="bert",
    **sizes_of(config),
    dropout=non_negative(config, "hidden_dropout_prob", 0.1),
    norm_epsilon=non_negative(config, "layer_norm_eps", 1e-12),
  )


def config_of(model: ModelConfig) -> dict[str, Any]:
  return {
    "model_type": "bert",
    "hidden_act": "gelu",
    "type_vocab_size": 2,
    "layer_norm_eps": model.norm_epsilon or bert.FACTS.norm_epsilon,
    **their_sizes(model),
    "hidden_dropout_prob": model.dropout,
    "attention_probs_dropout_prob": model.dropout,
    "tie_word_embeddings": True,
  }


def encoder(theirs: str) -> tuple[Tensor, ...]:
  """Embeddings and layers with the names of BERT after the prefix `theirs`."""
  embeddings, layer = f"{theirs}.embeddings", f"{theirs}.encoder.layer.{{}}"
  return (
    Tensor(f"{embeddings}.word_embeddings.weight", ("backbone/token/embedding",)),
    Tensor(f"{embeddings}.position_embeddings.weight", ("backbone/position/embedding",)),
    Tensor(f"{embeddings}.token_type_embeddings.weight", ("backbone/type/embedding",)),
    *norm(f"{embeddings}.LayerNorm", "backbone/embedding_norm"),
    *linear(f"{layer}.attention.self.query", f"{LAYERS}attention/query"),
    *linear(f"{layer}.attention.self.key", f"{LAYERS}attention/key"),
    *linear(f"{layer}.attention.self.value", f"{LAYERS}attention/value"),
    *linear(f"{layer}.attention.output.dense", f"{LAYERS}attention/out", inputs=2),
    *norm(f"{layer}.attention.output.LayerNorm", f"{LAYERS}attention_norm"),
    *linear(f"{layer}.intermediate.dense", f"{LAYERS}mlp/up"),
    *linear(f"{layer}.output.dense", f"{LAYERS}mlp/down"),
    *norm(f"{layer}.output.LayerNorm", f"{LAYERS}mlp_norm"),
  )


FAMILY = Family(
  model_type="bert",
  ours="bert",
  classes={
    PAIRS: "BertForPreTraining",
    "masked_lm": "BertForMaskedLM",
    "classification": "BertForSequenceClassification",
    "span_qa": "BertForQuestionAnswering",
  },
  prefix="bert.",
  tensors=(
    *encoder("bert"),
    *linear("bert.pooler.dense", "head/pooler"),
    *linear("cls.predictions.transform.dense", "head/transform"),
    *norm("cls.predictions.transform.LayerNorm", "head/transform_norm"),
    Tensor("cls.predictions.bias", ("head/lm/bias",)),
    # Class 0 of transformers is "B follows A", which is class 1 here.
    *linear("cls.seq_relationship", "head/next_sentence", reverse=True),
    *linear("classifier", "head/classifier"),
    *linear("qa_outputs", "head/span"),
  ),
  buffers=r"embeddings\.position_ids$",
  tied={
    "cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight",
    "cls.predictions.decoder.bias": "cls.predictions.bias",
  },
  model=model_of,
  config=config_of,
  special={"pad": "pad"},
  kept=("head/pooler/kernel", "head/pooler/bias"),
)
