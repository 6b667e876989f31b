"""The contract between a task and the rest: the loop and the step name no task.

An objective is a frozen dataclass called `Objective`; its fields are its hyper-parameters, with their
bounds (config.key). It lives in a file of this folder, or in any module that can be imported, and
`config.objective.name` names the file or the module. One file and one config are a new task.
"""

import abc
import dataclasses
import importlib
import pathlib
import pkgutil
from typing import Any, Callable, ClassVar, Mapping, Protocol, Sequence

import jax
import numpy as np
from flax import linen as nn

import llm.objectives
from llm import config as config_lib
from llm import models
from llm.config import DataConfig, ModelConfig
from llm.core import Batch, UserError
from llm.data.sources import Source
from llm.data.tokenizer import Tokenizer
from llm.models import heads
from llm.models.architecture import Facts

Metrics = dict[str, tuple[jax.Array, jax.Array]]  # name -> (sum, weight): divided once, at the end
Outputs = dict[str, jax.Array]  # what the network computes
Spec = dict[str, jax.ShapeDtypeStruct]  # array of a batch -> its shape and type
Predictions = dict[str, np.ndarray]


class Rows(Protocol):
  """The rows of a source, planned or encoded once.

  tokens, examples: how many an epoch holds. A row that labelled examples do not share is one
  example. note: a line for the header of a run.
  """

  @property
  def tokens(self) -> int: ...
  @property
  def examples(self) -> int: ...
  @property
  def note(self) -> str: ...
  def __len__(self) -> int: ...

  def example(self, i: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Row i as the arrays of a batch, without the B dimension. All chance comes from rng."""
    ...


@dataclasses.dataclass(frozen=True)
class Objective(abc.ABC):
  """The methods that every objective has; a subclass is a frozen dataclass.

  kinds: the kinds of architecture that it trains (models.transformer.Facts).
  """

  kinds: ClassVar[tuple[str, ...]] = ("encoder", "decoder", "encoder_decoder")

  def __post_init__(self):
    config_lib.check_bounds(self, "config.objective")

  def fit(self, sources: Sequence[Source], tokenizer: Tokenizer) -> "Objective":
    """This objective with what only the data or the tokenizer can tell (classes, a template).

    Without sources, what the data would tell is assumed: enough to know the shapes of a batch.
    """
    return self

  @abc.abstractmethod
  def rows(
    self,
    source: Source,
    tokenizer: Tokenizer,
    data: DataConfig,
    model: ModelConfig,
    length: int,
  ) -> Rows:
    """All rows of a source. `length` is T. Raises UserError on data that does not fit the task."""

  def eval_rows(
    self,
    source: Source,
    tokenizer: Tokenizer,
    data: DataConfig,
    model: ModelConfig,
    length: int,
  ) -> Rows:
    """The rows that an evaluation reads, where they are others."""
    return self.rows(source, tokenizer, data, model, length)

  def with_reference(self, rows: Rows, predict: Callable[[Rows], Predictions]) -> Rows:
    """`rows` with what the checkpoint that the run starts from predicts of them.

    An objective that needs no reference does not call `predict`, which costs a pass over all rows.
    """
    return rows

  def trains(self, facts: Facts) -> bool:
    """Whether it trains an architecture of these facts."""
    return facts.kind in self.kinds

  @abc.abstractmethod
  def batch_spec(self, model: ModelConfig, length: int) -> Spec:
    """The arrays of one row, as `Rows.example` makes them. No data is read."""

  def model(self, config: ModelConfig) -> nn.Module:
    """The network: called with a batch and `train=`, it gives what `loss` and `predict` need."""
    return heads.Model(models.build_backbone(config), self.head(config))

  def head(self, config: ModelConfig) -> nn.Module:
    """The head of the default network (models/heads.py)."""
    raise NotImplementedError(f"{type(self)} has neither a head nor a model of its own")

  @abc.abstractmethod
  def totals(self, batch: Batch) -> dict[str, jax.Array]:
    """The weight of each loss term over the global batch, before it is cut for accumulation."""

  @abc.abstractmethod
  def loss(
    self, outputs: Outputs, batch: Batch, totals: dict[str, jax.Array]
  ) -> tuple[jax.Array, Metrics]:
    """The loss (this part of the batch over the totals of the whole) and its metrics."""

  def predict(self, outputs: Outputs, batch: Batch) -> dict[str, jax.Array]:
    """What `outcomes` needs, B rows each."""
    return {}

  def outcomes(self, predictions: Predictions, rows: Rows) -> dict[str, np.ndarray]:
    """What became of each record of an evaluation source, on the host: arrays of one length."""
    return {}

  def summary(self, outcomes: dict[str, np.ndarray]) -> dict[str, float]:
    """Figures of merit of these outcomes, or of a draw of them (for intervals)."""
    return {}

  def score(self, predictions: Predictions, rows: Rows) -> dict[str, float]:
    """Figures of merit over a whole evaluation source."""
    return self.summary(self.outcomes(predictions, rows))

  def chat_template(self) -> str:
    """The template of conversations that it trains on; empty where it trains on none."""
    return ""

  def label_name(self, label: float) -> str:
    """What a label of a batch stands for."""
    return str(label)


class Labels(Objective):
  """An objective whose checkpoints label records (llm.predict)."""

  fields: ClassVar[tuple[str, ...]] = ("text",)  # what a record must have
  optional: ClassVar[tuple[str, ...]] = ()  # and what it may have besides

  @abc.abstractmethod
  def encode(
    self, records: Sequence[dict], tokenizer: Tokenizer, model: ModelConfig, length: int
  ) -> Rows:
    """The rows of records whose labels are not known, or not looked at."""

  @abc.abstractmethod
  def results(self, predictions: Predictions, rows: Rows) -> list[dict]:
    """The label of each record, as it is printed and written."""


class Answers(Labels):
  """One that labels questions, and writes files that the official scorer of SQuAD reads."""

  @abc.abstractmethod
  def write(self, predictions: Predictions, rows: Rows, path: pathlib.Path):
    """Writes the answers to `path`, and what else is known of them beside it."""


class Writes(Objective):
  """An objective whose checkpoints are also judged by the text that they write."""

  @abc.abstractmethod
  def written(
    self, write: Callable[[Sequence[str], int], list[str]], rows: Rows
  ) -> dict[str, np.ndarray]:
    """More outcomes of an evaluation source. write: (inputs, most tokens) -> texts."""


def int_spec(*shape: int) -> jax.ShapeDtypeStruct:
  """An int32 array of a row."""
  return jax.ShapeDtypeStruct(shape, np.int32)


def float_spec(*shape: int) -> jax.ShapeDtypeStruct:
  """A float32 array of a row."""
  return jax.ShapeDtypeStruct(shape, np.float32)


def row_spec(length: int, *names: str) -> Spec:
  """Arrays of T ids, besides tokens, segments and positions."""
  return {name: int_spec(length) for name in ("tokens", "segments", "positions", *names)}


def row_sums(values_BxN: jax.Array, weights_BxN: jax.Array) -> jax.Array:
  """Bx2 of (weighted sum, weight): what a row adds to a mean, for `predict`."""
  return jax.numpy.stack([(values_BxN * weights_BxN).sum(-1), weights_BxN.sum(-1)], -1)


def mean_of_sums(outcomes: dict[str, np.ndarray]) -> dict[str, float]:
  """name -> mean, of such sums over all rows."""
  return {
    name: float(sums[:, 0].sum() / max(sums[:, 1].sum(), 1e-9)) for name, sums in outcomes.items()
  }


def cross_entropy(logits_BxNxC: jax.Array, labels_BxN: jax.Array) -> jax.Array:
  """BxN: minus the log-probability of each label, in nats."""
  log_probs_BxNxC = jax.nn.log_softmax(logits_BxNxC)
  return -jax.numpy.take_along_axis(log_probs_BxNxC, labels_BxN[..., None], axis=-1)[..., 0]


def weighted_mean(values: jax.Array, weights: jax.Array, total: jax.Array) -> jax.Array:
  """sum(values * weights) / total, 0 where the total is 0."""
  return (values * weights).sum() / jax.numpy.maximum(total, 1)


def build(mapping: Mapping[str, Any]) -> Objective:
  """{"name": "masked_lm", ...} -> the Objective of that file. Raises UserError on what is unknown."""
  fields = {k: v for k, v in mapping.items() if k != "name"}
  return config_lib.build(_class(mapping["name"]), fields, "config.objective")


def defaults(name: str) -> dict[str, Any]:
  """The objective's mapping with every field at its default, for files in configs/."""
  return {"name": name, **dataclasses.asdict(_class(name)())}


def to_mapping(objective: Objective) -> dict[str, Any]:
  """The inverse of `build`."""
  module = type(objective).__module__
  name = module.removeprefix(f"{llm.objectives.__name__}.")
  return {"name": name, **dataclasses.asdict(objective)}


def check_kind(objective: Objective, model: ModelConfig):
  """Raises UserError where an objective does not train a model's kind of architecture."""
  if objective.trains(models.facts(model)):
    return
  fitting = [name for name in models.NAMES if objective.trains(models.facts_of(name))]
  raise UserError(
    f"config.objective.name={to_mapping(objective)['name']} trains "
    f"{' or '.join(kind.replace('_', '-') for kind in objective.kinds)} models, not "
    f"config.model.name={model.name}: take one of {', '.join(fitting)}"
  )


def _class(name: str) -> type[Objective]:
  known = [m.name for m in pkgutil.iter_modules(llm.objectives.__path__) if m.name != "base"]
  if name in known:
    return importlib.import_module(f"llm.objectives.{name}").Objective
  hint = f"config.objective.name must be one of {', '.join(known)}, or a module with an Objective"
  if "." not in name:
    raise UserError(f"{hint}, not {name!r}")
  try:
    return importlib.import_module(name).Objective
  except ModuleNotFoundError as error:
    if error.name and name.startswith(error.name):
      raise UserError(f"{hint}; there is no module {name!r}")
    raise
  except AttributeError:
    raise UserError(f"{hint}; {name!r} has none")
