"""The contract between a task and the rest of the code, which knows no task by its name.

An objective is a frozen dataclass called `Objective`. Its fields are its hyper-parameters, with
their bounds (config.key). It lives in a file of this folder, or in any module that can be imported;
`config.objective.name` names the file or the module. A new task is one file and one config.
"""

import abc
import dataclasses
import importlib
import pathlib
import pkgutil
from typing import Any, Callable, ClassVar, Iterable, Mapping, NamedTuple, Protocol, Sequence

import jax
import numpy as np
from flax import linen as nn

import llm.objectives
from llm import config as config_lib
from llm import models
from llm.config import DataConfig, ModelConfig
from llm.core import Batch, UserError, flatten
from llm.data.documents import Documents
from llm.data.sources import Source
from llm.data.tokenizer import Tokenizer
from llm.models import heads
from llm.models.architecture import Facts

HELPERS = ("base", "rollouts")  # the modules of this package that are no objectives
Metrics = dict[str, tuple[jax.Array, jax.Array]]  # name -> (sum, weight), divided at the end
Outputs = dict[str, jax.Array]  # what the network computes
Spec = dict[str, jax.ShapeDtypeStruct]  # the shape and type of each array of a row
Predictions = dict[str, np.ndarray]  # what `predict` gives, for all rows of a source


class Rows(Protocol):
  """The rows of a source, which are planned or encoded once.

  tokens: how many an epoch has. examples: how many labelled examples an epoch has, where the
  objective counts batches by them, else how many rows. note: a line about the rows for the header
  of a run.
  """

  @property
  def tokens(self) -> int: ...
  @property
  def examples(self) -> int: ...
  @property
  def note(self) -> str: ...
  def __len__(self) -> int: ...

  def example(self, i: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Row i as the arrays of a batch, without the dimension B. All randomness is that of rng."""
    ...


class Answer(NamedTuple):
  """What a model wrote after a prompt.

  ids: with the end token, where it wrote one. losses: minus the log-probability of each, in nats,
  when it was drawn. ended: whether it wrote the end token.
  """

  ids: np.ndarray
  losses: np.ndarray
  ended: bool


class Actor(Protocol):
  """The model with its current parameters, lent to an objective that learns from what it writes.

  All that it does is a function of the parameters, of config.training.seed and of the step.
  """

  def write(
    self,
    prompts: Sequence[np.ndarray],
    answers: int,
    max_tokens: int,
    temperature: float,
    draw: int = 0,
  ) -> list[Answer]:
    """`answers` answers to each prompt, given as ids: those of the first prompt first.

    A temperature of 0 takes the likeliest tokens. draw: numbers the calls of one step.
    """
    ...

  def rng(self, draw: int) -> np.random.Generator:
    """Randomness of this step for the host."""
    ...

  def place(self, rows: Sequence[dict[str, np.ndarray]]) -> Batch:
    """These rows as a batch on the mesh. Rows of zeros fill it up, which have weight 0."""
    ...

  def reference_losses(self, batch: Batch) -> jax.Array:
    """`losses` of the network, BxT, with the parameters of the checkpoint that the run starts from.

    Raises UserError where there is none.
    """
    ...


class OnPolicy(NamedTuple):
  """What a step learns from, where the current parameters have a part in it.

  tokens: of the batch, without padding; None where they are those of the rows. metrics: (sum,
  weight), as those of the loss. samples: records to look at, as JSON takes them.
  """

  batch: Batch
  tokens: int | None = None
  metrics: Mapping[str, tuple[float, float]] = {}
  samples: Sequence[Mapping[str, Any]] = ()


@dataclasses.dataclass(frozen=True)
class Objective(abc.ABC):
  """What every objective can do. A subclass is a frozen dataclass.

  kinds: the kinds of architecture that it trains (models.architecture.Facts).
  labelled: whether it learns from labelled records, not from running text. text_loss: the
  loss, in nats a token, that is compared with what piece frequencies alone reach; "" is none.
  """

  kinds: ClassVar[tuple[str, ...]] = ("encoder", "decoder", "encoder_decoder")
  labelled: ClassVar[bool] = False
  text_loss: ClassVar[str] = ""

  @property
  def goal(self) -> str:
    """The figure of an evaluation by which checkpoints are compared, and whether more is better."""
    return "min:loss"

  @property
  def updates(self) -> int:
    """How many updates a step takes with its batch."""
    return 1

  def __post_init__(self):
    config_lib.check_bounds(self, "config.objective")

  def following(self, before: Mapping[str, Any]) -> "Objective":
    """This objective with what it takes from the checkpoint that the run starts from.

    before: the hyperparameters of that checkpoint's objective.
    """
    return self

  def fit(self, sources: Sequence[Source], tokenizer: Tokenizer) -> "Objective":
    """This objective with the fields that come from data or tokenizer, such as the classes.

    Without sources, default values stand for those of the data: the shapes of a batch are known.
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
    """The rows of a source, `length` tokens each. Raises UserError if the data do not fit."""

  def eval_rows(
    self,
    source: Source,
    tokenizer: Tokenizer,
    data: DataConfig,
    model: ModelConfig,
    length: int,
  ) -> Rows:
    """The rows of an evaluation source, where they differ from those of training."""
    return self.rows(source, tokenizer, data, model, length)

  def remarks(self, rows: Sequence[Any]) -> list[str]:
    """What a run says of its data before the first step, a line each.

    rows: the `Rows` of each training source.
    """
    return []

  def text_of(self, rows: Any) -> Documents | None:
    """The documents that rows of running text are made of; None where it cannot be told."""
    return None

  def baselines(self, train: Sequence[Source], held_out: Source) -> dict[str, float]:
    """What models without a network reach on held-out data, logged beside every evaluation.

    train: what they learn from.
    """
    return {}

  def with_reference(self, rows: Rows, predict: Callable[[Rows], Predictions]) -> Rows:
    """The rows with the predictions of the reference, the checkpoint that the run starts from.

    predict: computes them, in one pass over all rows. An objective without a reference does not
    call it.
    """
    return rows

  def on_policy(self, batch: Batch, rows: Sequence[Any], actor: Actor, *, train: bool) -> OnPolicy:
    """What the current parameters make of a batch, before a step learns from it.

    It is for data that the model itself makes, such as its answers to prompts; by default the batch
    is learned as it came. rows: the `Rows` of each source. With train=False, an evaluation: row n
    of the result belongs to row n of the batch, and nothing is drawn at random.
    """
    return OnPolicy(batch)

  def trains(self, facts: Facts) -> bool:
    """Whether it trains an architecture of these facts."""
    return facts.kind in self.kinds

  @abc.abstractmethod
  def batch_spec(self, model: ModelConfig, length: int) -> Spec:
    """The shape and type of each array of `Rows.example`. It reads no data."""

  def model(self, config: ModelConfig) -> nn.Module:
    """The network: called with a batch and `train=`, it returns the outputs for `loss`."""
    return heads.Model(models.build_backbone(config), self.head(config))

  def head(self, config: ModelConfig) -> nn.Module:
    """The head of the default network (models/heads.py)."""
    raise NotImplementedError(f"{type(self)} has neither a head nor a model of its own")

  @abc.abstractmethod
  def totals(self, batch: Batch) -> dict[str, jax.Array]:
    """The weight of each loss term over the global batch of a step.

    A step that accumulates gradients cuts the batch into parts after this.
    """

  @abc.abstractmethod
  def loss(
    self, outputs: Outputs, batch: Batch, totals: dict[str, jax.Array]
  ) -> tuple[jax.Array, Metrics]:
    """(loss, metrics) of a part of the batch.

    The loss is a sum over this part, divided by the totals of the whole batch. So the losses of all
    parts add up to the loss of the step.
    """

  def predict(self, outputs: Outputs, batch: Batch) -> dict[str, jax.Array]:
    """The predictions for a batch, B rows each."""
    return {}

  def outcomes(self, predictions: Predictions, rows: Rows) -> dict[str, np.ndarray]:
    """The outcome of each record of an evaluation source, such as whether it is right.

    All arrays have the same length. It runs on the host.
    """
    return {}

  def summary(self, outcomes: dict[str, np.ndarray]) -> dict[str, float]:
    """The figures of merit of these outcomes. For intervals, they are a random draw of all."""
    return {}

  def derived(self, means: Mapping[str, float]) -> dict[str, float]:
    """Figures that follow from the mean metrics of steps, such as a perplexity."""
    return {}

  def score(self, predictions: Predictions, rows: Rows) -> dict[str, float]:
    """The figures of merit over an evaluation source."""
    return self.summary(self.outcomes(predictions, rows))

  def chat_template(self) -> str:
    """The template of the conversations that it trains on; "" if it trains on none."""
    return ""

  def label_name(self, label: float) -> str:
    """The name of a label of a batch."""
    return str(label)


class Labels(Objective):
  """An objective whose checkpoints label records (llm.predict).

  fields: those that a record must have. optional: those that it may have too.
  """

  labelled = True
  fields: ClassVar[tuple[str, ...]] = ("text",)
  optional: ClassVar[tuple[str, ...]] = ()

  @abc.abstractmethod
  def encode(
    self, records: Sequence[dict], tokenizer: Tokenizer, model: ModelConfig, length: int
  ) -> Rows:
    """The rows of records without their labels."""

  @abc.abstractmethod
  def results(self, predictions: Predictions, rows: Rows) -> list[dict]:
    """The label of each record, as llm.predict prints and writes it."""


class Answers(Labels):
  """An objective that answers questions, in files that the official scorer of SQuAD reads."""

  @abc.abstractmethod
  def write(self, predictions: Predictions, rows: Rows, path: pathlib.Path):
    """Writes the answers to `path`, and further files about them beside it."""


class Writes(Objective):
  """An objective whose checkpoints are also scored by the text that they write."""

  labelled = True

  @abc.abstractmethod
  def written(
    self, write: Callable[[Sequence[str], int], list[str]], rows: Rows
  ) -> dict[str, np.ndarray]:
    """Outcomes of the texts that `write(inputs, max_tokens)` writes for an evaluation source."""


def int_spec(*shape: int) -> jax.ShapeDtypeStruct:
  """The spec of an int32 array of this shape."""
  return jax.ShapeDtypeStruct(shape, np.int32)


def float_spec(*shape: int) -> jax.ShapeDtypeStruct:
  """The spec of a float32 array of this shape."""
  return jax.ShapeDtypeStruct(shape, np.float32)


def row_spec(length: int, *names: str) -> Spec:
  """The specs of tokens, segments, positions and the named arrays: T int32 each."""
  return {name: int_spec(length) for name in ("tokens", "segments", "positions", *names)}


def zero_row(spec: Spec) -> dict[str, np.ndarray]:
  """A batch of one row of zeros: it shows a network the shapes of its input."""
  return {name: np.zeros((1, *array.shape), array.dtype) for name, array in spec.items()}


def shapes(objective: Objective, model: ModelConfig) -> dict[str, tuple[int, ...]]:
  """path -> shape of every parameter of a model with the head of an objective."""
  model = dataclasses.replace(model, dtype="float32", scan="scan", attention="reference")
  batch = zero_row(objective.batch_spec(model, min(8, model.max_length)))
  network = objective.model(model)
  tree = jax.eval_shape(lambda: network.init(jax.random.key(0), batch, train=False)["params"])
  return {path: leaf.shape for path, leaf in flatten(tree).items()}


def row_sums(values_BxN: jax.Array, weights_BxN: jax.Array) -> jax.Array:
  """(weighted sum, weight) of each row, for `predict`: Bx2."""
  return jax.numpy.stack([(values_BxN * weights_BxN).sum(-1), weights_BxN.sum(-1)], -1)


def mean_of_sums(outcomes: dict[str, np.ndarray]) -> dict[str, float]:
  """The mean over all rows of each array of `row_sums`."""
  means = {}
  for name, sums_Rx2 in outcomes.items():
    total, weight = sums_Rx2[:, 0].sum(), sums_Rx2[:, 1].sum()
    means[name] = float(total / max(weight, 1e-9))
  return means


def cross_entropy(logits_BxNxC: jax.Array, labels_BxN: jax.Array) -> jax.Array:
  """Minus the log-probability of each label, in nats: BxN."""
  log_probs_BxNxC = jax.nn.log_softmax(logits_BxNxC)
  return -jax.numpy.take_along_axis(log_probs_BxNxC, labels_BxN[..., None], axis=-1)[..., 0]


def weighted_mean(values: jax.Array, weights: jax.Array, total: jax.Array) -> jax.Array:
  """sum(values * weights) / total; 0 if the total is 0."""
  return (values * weights).sum() / jax.numpy.maximum(total, 1)


def build(mapping: Mapping[str, Any]) -> Objective:
  """{"name": "masked_lm", ...} -> the Objective of that file.

  Raises UserError if there is no such objective or field, or a value is out of its bounds.
  """
  fields = {field: value for field, value in mapping.items() if field != "name"}
  check_keys(mapping["name"], fields)
  return config_lib.build(_class(mapping["name"]), fields, "config.objective")


def check_keys(name: str, keys: Iterable[str]):
  """Raises UserError on a key that the objective of this name does not have."""
  known = ["name", *(field.name for field in dataclasses.fields(_class(name)))]
  for key in keys:
    if key not in known:
      raise config_lib.unknown_key("config.objective", key, known, f" of {name}")


def defaults(name: str) -> dict[str, Any]:
  """The mapping of an objective with every field at its default, for files in configs/."""
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
  """The class that config.objective.name names. Raises UserError if there is none."""
  modules = [module.name for module in pkgutil.iter_modules(llm.objectives.__path__)]
  known = [module for module in modules if module not in HELPERS]
  if name in known:
    return importlib.import_module(f"llm.objectives.{name}").Objective
  hint = (
    f"config.objective.name must be one of {', '.join(known)}, or a module with an Objective and a "
    "dot in its name"
  )
  if "." not in name:
    raise UserError(f"{hint}, not {name!r}")
  try:
    module = importlib.import_module(name)
  except ModuleNotFoundError as error:
    if error.name and name.startswith(error.name):
      raise UserError(
        f"{hint}; Python has no module {name!r}: start from the folder that holds "
        f"{name.split('.')[0]}, or put that folder on PYTHONPATH"
      )
    raise
  if not hasattr(module, "Objective"):
    raise UserError(f"{hint}; {name!r} has none")
  cls = module.Objective
  if "__dataclass_params__" not in vars(cls):
    raise UserError(f"{name}.Objective: put @dataclasses.dataclass(frozen=True) above the class")
  return cls
