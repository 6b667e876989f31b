"""/v1/embeddings and /v1/predict: models that read."""

import base64
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Request
from pydantic import Field, StringConstraints

from llm.server.errors import ApiError
from llm.server.files import Owner
from llm.server.methods import Model

router = APIRouter()
MOST_TEXTS = 2048
Text = Annotated[str, StringConstraints(min_length=1)]


class EmbeddingRequest(Model):
  model: str
  input: Text | Annotated[list[Text], Field(min_length=1, max_length=MOST_TEXTS)]
  encoding_format: Literal["float", "base64"] = "float"
  dimensions: int | None = None
  user: str | None = None  # changes nothing


@router.post("/v1/embeddings")
def embed(request: Request, owner: Owner, asked: EmbeddingRequest) -> dict[str, Any]:
  embedder = request.app.state.server.catalog.embedder(owner, asked.model)
  texts = [asked.input] if isinstance(asked.input, str) else asked.input
  width = embedder.config.width
  if asked.dimensions not in (None, width):
    raise ApiError(f"the embeddings of {asked.model} have {width} dimensions", "dimensions")
  vectors_NxD, tokens = embedder.embed(texts)
  data = []
  for index, vector_D in enumerate(vectors_NxD):
    if asked.encoding_format == "base64":
      value: Any = base64.b64encode(vector_D.astype("<f4").tobytes()).decode()
    else:
      value = vector_D.tolist()
    data.append({"object": "embedding", "index": index, "embedding": value})
  usage = {"prompt_tokens": tokens, "total_tokens": tokens}
  return {"object": "list", "data": data, "model": asked.model, "usage": usage}


class Record(Model):
  """A text to label (with its pair where the task has one), or a question on a text."""

  text: Text
  text_pair: Text | None = None
  question: Text | None = None


class PredictRequest(Model):
  model: str
  input: Record | Annotated[list[Record], Field(min_length=1, max_length=MOST_TEXTS)]


@router.post("/v1/predict")
def predict(request: Request, owner: Owner, asked: PredictRequest) -> dict[str, Any]:
  labeller = request.app.state.server.catalog.labeller(owner, asked.model)
  given = asked.input if isinstance(asked.input, list) else [asked.input]
  records = [record.model_dump(exclude_none=True) for record in given]
  for record in records:
    labeller.check(record)
  results = labeller.objective.results(*labeller.label(records))
  return {"object": "list", "data": results, "model": asked.model}
