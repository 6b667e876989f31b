"""ELECTRA: the discriminator, which has the encoder of BERT."""

import dataclasses
from typing import Any, Mapping

from llm.checkpoints.families import bert
from llm.checkpoints.families.base import Family, linear, positive_integer
from llm.config import ModelConfig
from llm.models.architecture import embedding_width_of


def model_of(config: Mapping[str, Any]) -> ModelConfig:
  return dataclasses.replace(
    bert.model_of(config),
    name="electra",
    embedding_width=positive_integer(config, "embedding_size"),
  )


def config_of(model: ModelConfig) -> dict[str, Any]:
  return bert.config_of(model) | {
    "model_type": "electra",
    "embedding_size": embedding_width_of(model),
  }


FAMILY = Family(
  model_type="electra",
  ours="electra",
  classes={
    "replaced_token": "ElectraForPreTraining",
    "span_qa": "ElectraForQuestionAnswering",
  },
  prefix="electra.",
  tensors=(
    *bert.encoder("electra"),
    *linear("electra.embeddings_project", "backbone/embedding_project"),
    *linear("discriminator_predictions.dense", "head/detection_transform"),
    *linear("discriminator_predictions.dense_prediction", "head/detection"),
    *linear("qa_outputs", "head/span"),
  ),
  buffers=r"embeddings\.position_ids$",
  tied={},
  model=model_of,
  config=config_of,
  special={"pad": "pad"},
  dropped=r"^generator/",
)
