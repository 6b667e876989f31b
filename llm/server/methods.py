"""The methods of a job and their settings, as OpenAI's client sends them."""

from typing import Annotated, Any, Literal

import pydantic
from pydantic import Field

from llm.core import UserError, first_line
from llm.server import graders
from llm.server.errors import ApiError

Epochs = Literal["auto"] | Annotated[int, Field(ge=1, le=50)]
BatchSize = Literal["auto"] | Annotated[int, Field(ge=1, le=256)]
Multiplier = Literal["auto"] | Annotated[float, Field(gt=0, le=1_000)]
Beta = Literal["auto"] | Annotated[float, Field(gt=0, le=2)]
Auto = Literal["auto"] | None


class Model(pydantic.BaseModel):
  """A part of a request: an unknown key is an error."""

  model_config = pydantic.ConfigDict(extra="forbid", strict=True)


class Hyperparameters(Model):
  n_epochs: Epochs = "auto"
  batch_size: BatchSize = "auto"
  learning_rate_multiplier: Multiplier = "auto"


class DpoHyperparameters(Hyperparameters):
  beta: Beta = "auto"


class ReinforcementHyperparameters(Hyperparameters):
  """Those that are only "auto" are accepted so that a client may send its defaults."""

  compute_multiplier: Auto = None
  eval_interval: Auto = None
  eval_samples: Auto = None


class Supervised(Model):
  hyperparameters: Hyperparameters = Hyperparameters()


class Dpo(Model):
  hyperparameters: DpoHyperparameters = DpoHyperparameters()


class Reinforcement(Model):
  grader: dict[str, Any]
  hyperparameters: ReinforcementHyperparameters = ReinforcementHyperparameters()


class Method(Model):
  type: Literal["supervised", "dpo", "reinforcement"]
  supervised: Supervised | None = None
  dpo: Dpo | None = None
  reinforcement: Reinforcement | None = None


class JobRequest(Model):
  """The body of POST /v1/fine_tuning/jobs."""

  model: str
  training_file: str
  validation_file: str | None = None
  suffix: Annotated[str, Field(max_length=64, pattern=r"^[A-Za-z0-9._-]+$")] | None = None
  seed: Annotated[int, Field(ge=0, le=2**31 - 1)] | None = None
  method: Method | None = None
  hyperparameters: Hyperparameters | None = None  # where no method is given
  integrations: Annotated[list, Field(max_length=0)] | None = None
  metadata: Annotated[dict[str, str], Field(max_length=16)] | None = None


def settled(request: JobRequest) -> dict[str, Any]:
  """The method of a request with all its settings, as JSON. Raises ApiError where it is wrong."""
  method = request.method or Method(type="supervised")
  others = {"supervised", "dpo", "reinforcement"} - {method.type}
  if given := [name for name in sorted(others) if getattr(method, name)]:
    raise ApiError(f"method.{given[0]} is given with method.type={method.type}", "method")
  if request.method and request.hyperparameters:
    raise ApiError(
      f"hyperparameters beside method would be ignored: give them in method.{method.type}",
      "hyperparameters",
    )
  if method.type == "reinforcement":
    if method.reinforcement is None:
      raise ApiError("reinforcement needs a grader", "method.reinforcement.grader")
    _check_grader(method.reinforcement.grader)
    settings: Model = method.reinforcement
  elif method.type == "dpo":
    settings = method.dpo or Dpo()
  elif method.supervised:
    settings = method.supervised
  else:
    settings = Supervised(hyperparameters=request.hyperparameters or Hyperparameters())
  return {"type": method.type, method.type: settings.model_dump(exclude_none=True)}


def _check_grader(grader: dict[str, Any]):
  """Raises ApiError unless the grader can run here."""
  param = "method.reinforcement.grader"
  kind = grader.get("type")
  if isinstance(kind, str) and kind in graders.REFUSED:
    raise ApiError(graders.REFUSED[kind], param, "unsupported_grader")
  try:
    pydantic.TypeAdapter(graders.Grader).validate_python(grader)
  except pydantic.ValidationError as error:
    first = error.errors()[0]
    place = ".".join([param, *(str(part) for part in first["loc"][1:])])
    raise ApiError(f"{place}: {first['msg']}", place)
  try:
    graders.check(grader)
  except UserError as error:
    raise ApiError(first_line(error), param)
