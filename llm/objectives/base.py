"""The contract between a task and the rest: the loop and the step name no task.

An objective is a frozen dataclass called `Objective` in a file of this folder; its fields are its
hyper-parameters. One file and one config make a new task.
"""

import dataclasses
import importlib
import pkgutil
from typing import Any, Callable, Mapping, Protocol, Sequence

import jax
import numpy as np
from flax import linen as nn

import llm.objectives
from llm import config as config_lib
from llm.config import DataConfig, ModelConfig
from llm.core import Batch, UserError
from llm.data.sources import Source
from llm.data.tokenizer import Tokenizer

Metrics = dict[str, tuple[jax.Array, jax.Array]]  # name -> (sum, weight): divided once, at the end


class Rows(Protocol):
  """Training rows by number: `len(rows)`, `rows[i]`. `tokens` and `examples` are how many an epoch
  holds; a row that labelled examples do not share is one example. A `note`, where there is one,
  stands in the header of the run.
  """

  tokens: int
  examples: int

  def __len__(self) -> int: ...
  def __getitem__(self, i: int) -> Any: ...


@dataclasses.dataclass(frozen=True)
class Objective:
  """The methods that every objective has; a subclass is a frozen dataclass."""

  def fit(self, sources: Sequence[Source], tokenizer: Tokenizer) -> "Objective":
    """This objective with what only the training data or the tokenizer can tell (classes, a chat template)."""
    return self

  def rows(
    self, source: Source, tokenizer: Tokenizer, data: DataConfig, model: ModelConfig, length: int
  ) -> Rows:
    """All rows of a source, planned or encoded once. `length` is T."""
    raise NotImplementedError

  def eval_rows(
    self, source: Source, tokenizer: Tokenizer, data: DataConfig, model: ModelConfig, length: int
  ) -> Rows:
    """The rows that an evaluation reads, where they are others."""
    return self.rows(source, tokenizer, data, model, length)

  def with_reference(self, rows: Rows, predict: Callable[[Rows], dict[str, np.ndarray]]) -> Rows:
    """`rows` with what the checkpoint that the run starts from predicts of them, for who asks `predict`."""
    return rows

  def example(self, row, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """One row -> the arrays of a batch, without the B dimension. All chance comes from rng."""
    raise NotImplementedError

  def head(self, model: ModelConfig) -> nn.Module:
    """The head that computes what `loss` and `predict` need (models/heads.py)."""
    raise NotImplementedError

  def totals(self, batch: Batch) -> dict[str, jax.Array]:
    """The weight of each loss term over the whole global batch, before it is cut for accumulation."""
    raise NotImplementedError

  def loss(self, outputs, batch: Batch, totals) -> tuple[jax.Array, Metrics]:
    """The loss (this part of the batch over the totals of the whole) and metrics, one named loss."""
    raise NotImplementedError

  def predict(self, outputs, batch: Batch) -> dict[str, jax.Array]:
    """What `outcomes` needs, B rows each."""
    return {}

  def outcomes(self, predictions: dict[str, np.ndarray], rows: Rows) -> dict[str, np.ndarray]:
    """What became of each record of an evaluation source, on the host: arrays of one length."""
    return {}

  def summary(self, outcomes: dict[str, np.ndarray]) -> dict[str, float]:
    """Figures of merit of these outcomes, or of a draw of them (for intervals)."""
    return {}

  def score(self, predictions: dict[str, np.ndarray], rows: Rows) -> dict[str, float]:
    """Figures of merit over a whole evaluation source."""
    return self.summary(self.outcomes(predictions, rows))


def row_sums(values_BxN, weights_BxN) -> jax.Array:
  """Bx2 of (weighted sum, weight): what a row adds to a mean, for `predict`."""
  return jax.numpy.stack([(values_BxN * weights_BxN).sum(-1), weights_BxN.sum(-1)], -1)


def mean_of_sums(outcomes: dict[str, np.ndarray]) -> dict[str, float]:
  """name -> mean, of such sums over all rows."""
  return {
    name: float(sums[:, 0].sum() / max(sums[:, 1].sum(), 1e-9)) for name, sums in outcomes.items()
  }


def cross_entropy(logits_BxNxC, labels_BxN) -> jax.Array:
  """BxN: minus the log-probability of each label, in nats."""
  log_probs_BxNxC = jax.nn.log_softmax(logits_BxNxC)
  return -jax.numpy.take_along_axis(log_probs_BxNxC, labels_BxN[..., None], axis=-1)[..., 0]


def weighted_mean(values, weights, total):
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
  return {"name": type(objective).__module__.rpartition(".")[2], **dataclasses.asdict(objective)}


def _class(name: str) -> type[Objective]:
  known = [m.name for m in pkgutil.iter_modules(llm.objectives.__path__) if m.name != "base"]
  if name not in known:
    raise UserError(f"config.objective.name must be one of {', '.join(known)}, not {name!r}")
  return importlib.import_module(f"llm.objectives.{name}").Objective
