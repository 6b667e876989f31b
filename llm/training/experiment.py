"""From a config to all that a run is made of, on the host alone: no device is touched here."""

import dataclasses
import functools
from typing import Callable, NamedTuple, Self, Sequence

import jax
import numpy as np
from etils import epath
from flax import linen as nn
from jax.sharding import Mesh

from llm import cache, models
from llm import config as config_lib
from llm.checkpoints import locate, manager
from llm.config import Config, ModelConfig
from llm.core import UserError, flatten, warn
from llm.data import (
  cooccurrence,
  documents,
  duplicates,
  frequencies,
  overlap,
  shards,
  sources,
  tokenizer_training,
)
from llm.data import tokenizer as tokenizer_lib
from llm.data.batches import Batches, rows_a_batch
from llm.models import resolve
from llm.models.architecture import embedding_width_of
from llm.objectives import base
from llm.runs import workdir as workdir_lib
from llm.training import consistency, inherited, recipe

# What is settled anew on every machine: it changes no more than the last bits of a result.
OF_THE_MACHINE = ("dtype", "scan", "attention")


@dataclasses.dataclass(frozen=True)
class Experiment:
  """A config with everything resolved but its data: the model's shape, the tokenizer, the classes.

  asked: the config before `on` settled what "auto" is. start: the verified step that the run
  resumes or transfers from.
  """

  config: Config
  objective: base.Objective
  tokenizer: tokenizer_lib.Tokenizer
  asked: Config
  start: epath.Path | None

  @functools.cached_property
  def model(self) -> nn.Module:
    """The network; "auto" must be settled."""
    return self.objective.model(self.config.model)

  def on(self, mesh: Mesh) -> Self:
    """The experiment with "auto" settled for the devices of a mesh. Raises UserError."""
    platform = mesh.devices.flat[0].platform
    return self.on_platform(platform, mesh.shape["context"])

  def on_platform(self, platform: str, context: int = 1, *, trains: bool = True) -> Self:
    """As `on`, for cpu, gpu or tpu. context: how many devices share a row."""
    length = self.config.training.sequence_length
    model = resolve.resolved(self.config.model, length, platform, context, trains=trains)
    return dataclasses.replace(self, config=dataclasses.replace(self.config, model=model))

  def one_row(self) -> dict[str, np.ndarray]:
    """A batch of one row of zeros: it shows the shapes."""
    spec = self.objective.batch_spec(self.config.model, self.config.training.sequence_length)
    return base.zero_row(spec)

  def description(self) -> dict:
    """What a checkpoint says of itself. settled: what "auto" became where it was trained."""
    settled = {name: getattr(self.config.model, name) for name in OF_THE_MACHINE}
    return {"config": config_lib.thaw(self.asked), "settled": settled}


@dataclasses.dataclass(frozen=True)
class Training(Experiment):
  """An experiment with its data.

  train, held_out: the sources of training and of evaluation. digests: of their content.
  """

  batches: Batches
  eval_rows: base.Rows | None
  train: tuple[sources.Source, ...]
  held_out: sources.Source | None
  digests: dict[str, str]

  @property
  def names(self) -> tuple[str, ...]:
    """The training sources, as the config names them."""
    return tuple(source.spec for source in self.train)

  @property
  def eval_batch_size(self) -> int:
    """Rows at a time that nothing is learned from: as many as a step takes at once."""
    return self.batches.batch_size // self.config.optimizer.grad_accum_steps

  def description(self) -> dict:
    """The same, with the digests of the data."""
    return {**super().description(), "data": self.digests}

  def remarks(self) -> list[str]:
    """What there is to say of the data, a line each."""
    return self.objective.remarks(self.batches.rows)

  def warn_of_shared_data(self):
    """Warns where held-out records or text are in the training data too."""
    if self.held_out is None:
      return
    if self.objective.labelled:
      duplicates.warn(self.train, self.held_out)
    text = self.objective.text_of(self.eval_rows) if self.eval_rows else None
    if text is not None:
      name = self.held_out.spec
      length = overlap.run_length(self.tokenizer.name)
      overlap.warn(self._texts(), text, name, length, self.tokenizer.decode, self.held_out.cache)

  def _texts(self) -> list[documents.Documents]:
    """The running text of each training source that has some."""
    texts = [self.objective.text_of(rows) for rows in self.batches.rows]
    return [text for text in texts if text is not None]

  def unigram_loss(self) -> float | None:
    """What the frequencies of the pieces reach in the held-out text; None where there is none."""
    texts = self._texts() if self.objective.text_loss else []
    if not texts:
      return None
    held_out = self.objective.text_of(self.eval_rows) if self.eval_rows else None
    vocab_size = self.tokenizer.vocab_size
    return frequencies.unigram_loss(texts, texts[0] if held_out is None else held_out, vocab_size)

  def vectors(self, say: Callable) -> np.ndarray | None:
    """VxE: what the table of tokens starts as, 0 for pieces that start at random.

    None where all do. Counts the running text of all training sources.
    """
    model = self.config.model
    if model.embedding_start == "random":
      return None
    say("counting which pieces stand near which, for the embeddings")
    texts = [documents.load(source, self.tokenizer, "none") for source in self.train]
    width = embedding_width_of(model)
    return cooccurrence.vectors(texts, self.tokenizer.vocab_size, width, self.train[0].cache)


class Bundle(NamedTuple):
  """A checkpoint in memory (llm.load). config: as it was asked for, "auto" included."""

  model: nn.Module
  params: dict
  tokenizer: tokenizer_lib.Tokenizer
  config: Config


def prepare(
  config: Config, resume_from: epath.Path | None = None, say: Callable = print
) -> Training:
  """Everything that a run of `config` needs. resume_from: its own checkpoint, where it goes on.

  Raises UserError on bad input of every kind.
  """
  consistency.check_run(config)
  start = _start(config, resume_from, say)
  description = manager.describe(start) if start else None
  saved = description if resume_from else None  # of this very run
  objective = base.build(saved.config.objective if saved else config.objective)
  train = sources.parse(config.data.train, config.data)
  tokenizer = (
    manager.load_tokenizer(resume_from) if resume_from else _tokenizer(config, start, train)
  )
  model = inherited.completed(config.model, description, tokenizer.vocab_size, objective.labelled)
  if start:
    config = inherited.within_positions(config, model, say)
    config = inherited.with_start(config, start, saved)
  length = config.training.sequence_length
  consistency.check_task(objective, model, length)
  if models.facts(model).kind != "encoder" and tokenizer.lowercase:
    _warn_of_small_letters(train)
  if description and not saved:
    objective = objective.following(description.config.objective)
  objective = objective.fit(train, tokenizer)
  rows = [objective.rows(source, tokenizer, config.data, model, length) for source in train]
  consistency.check_rows(rows[0], objective, model, length)
  batches = _batches(config, rows, [source.weight for source in train])
  held_out = _held_out(config, objective)
  eval_rows = held_out and objective.eval_rows(held_out, tokenizer, config.data, model, length)
  fitted = dataclasses.replace(config, model=model, objective=base.to_mapping(objective))
  if saved:
    fitted = inherited.with_learning_rate(fitted, saved)
  asked = recipe.resolved(fitted, batches.steps_an_epoch(), objective.goal)
  return Training(
    config=inherited.with_dtype(asked, saved) if saved else asked,
    objective=objective,
    tokenizer=tokenizer,
    asked=asked,
    start=start,
    batches=batches,
    eval_rows=eval_rows,
    train=train,
    held_out=held_out,
    digests=workdir_lib.data_digests(config),
  )


def without_data(config: Config, say: Callable = print) -> Experiment:
  """The experiment of a config whose programs are looked at: no source is read.

  How many examples share a row is the data's: here each has a row, the most that a batch takes.
  Raises UserError as `prepare`.
  """
  start = _start(config, None, say)
  objective = base.build(config.objective)
  stand_in = tokenizer_lib.ByteTokenizer(max(100, config.tokenizer.sentinels))
  if start and not config.tokenizer.name:
    vocab_size = manager.load_tokenizer(start).vocab_size
  elif config.tokenizer.path or config.tokenizer.name == "bytes":
    vocab_size = _tokenizer(config, start, ()).vocab_size
  else:
    trained = config.tokenizer.vocab_size + config.tokenizer.sentinels
    vocab_size = config.model.vocab_size or trained
  description = manager.describe(start) if start else None
  model = inherited.completed(config.model, description, vocab_size, objective.labelled)
  if description:
    config = inherited.within_positions(config, model, say)
    objective = objective.following(description.config.objective)
  consistency.check_task(objective, model, config.training.sequence_length)
  objective = objective.fit((), stand_in)
  steps = config.training.steps or 1000
  fitted = dataclasses.replace(
    config,
    model=model,
    objective=base.to_mapping(objective),
    training=dataclasses.replace(config.training, steps=steps, epochs=0.0),
  )
  resolved = recipe.resolved(fitted, steps, objective.goal)
  return Experiment(resolved, objective, stand_in, resolved, start)


def from_checkpoint(step: epath.Path) -> Experiment:
  """The experiment that wrote a step, without its data; "auto" is not settled.

  Raises manager.Damaged where the parts of its description do not fit one another.
  """
  config = manager.describe(step).config
  tokenizer = manager.load_tokenizer(step)
  try:
    objective = base.build(config.objective)
    # The attention that computed it where it was trained may not run here.
    model = dataclasses.replace(config.model, attention="auto")
    consistency.check_model(model, tokenizer.vocab_size)
    base.check_kind(objective, model)
    if not model.vocab_size:
      raise UserError("config.model.vocab_size is 0")
  except UserError as error:
    raise manager.Damaged(f"{step}: its description cannot be used here: {error}")
  config = dataclasses.replace(config, model=model)
  return Experiment(config, objective, tokenizer, config, None)


def load(step: epath.Path) -> Bundle:
  """A step in memory, on the host. The model takes texts of any length."""
  saved = from_checkpoint(step)
  model = build(saved.objective, saved.config.model)
  return Bundle(model, params_of(step, saved), saved.tokenizer, saved.config)


def params_of(step: epath.Path, saved: Experiment) -> dict:
  """The parameters of a step, on the host.

  Raises manager.Damaged where its arrays have not the shapes that its description says.
  """
  params = manager.restore(step, "params")
  shapes = {path: leaf.shape for path, leaf in flatten(params).items()}
  for path, expected in base.shapes(saved.objective, saved.config.model).items():
    # A published checkpoint may lack a head.
    actual = shapes.get(path, None if path.startswith("backbone/") else expected)
    if actual != expected:
      raise manager.Damaged(
        f"{step}: its arrays do not fit its description: {path} is {actual}, not {expected}"
      )
  return params


def build(
  objective: base.Objective, model: ModelConfig, length: int = 0, *, trains: bool = False
) -> nn.Module:
  """The network of an objective, with "auto" settled for this machine and the mesh in use.

  length: tokens of a row; 0 is any, which the reference attention takes.
  """
  return objective.model(settled(model, length, trains=trains))


def settled(model: ModelConfig, length: int, *, trains: bool = False) -> ModelConfig:
  """A model with "auto" settled for this machine and the mesh in use; length: as of `build`."""
  if not length and model.attention == "auto":
    model = dataclasses.replace(model, attention="reference")
  context = jax.sharding.get_abstract_mesh().shape.get("context", 1)
  return resolve.resolved(model, length, jax.default_backend(), context, trains=trains)


def _warn_of_small_letters(train: Sequence[sources.Source]):
  """Warns where a model that writes is trained on shards of a tokenizer without capitals."""
  if of_shards := [source.spec for source in train if source.kind == "shards"]:
    warn(
      f"{of_shards[0]}: its tokenizer makes all letters small, so the model will never write a "
      "capital: prepare it with --config.tokenizer.lowercase=False"
    )


def _start(config: Config, resume_from: epath.Path | None, say: Callable) -> epath.Path | None:
  """The step that a run starts from: its own, else that of config.transfer.checkpoint."""
  if resume_from or not config.transfer.checkpoint:
    return resume_from
  return locate.find(config.transfer.checkpoint, say, config.data.cache)


def _tokenizer(
  config: Config, start: epath.Path | None, train: tuple[sources.Source, ...]
) -> tokenizer_lib.Tokenizer:
  if start and not config.tokenizer.name:
    return manager.load_tokenizer(start)
  if not start and (of_shards := [source for source in train if source.kind == "shards"]):
    return shards.tokenizer(of_shards[0])
  tokenizer = tokenizer_training.make(config.tokenizer, train, cache.cache_dir(config.data.cache))
  if not start or config.transfer.vocabulary != "same":
    return tokenizer
  if tokenizer.digest() != manager.load_tokenizer(start).digest():
    raise UserError(
      "the vocabulary does not fit the checkpoint: config.tokenizer makes another one than "
      f"{start} was trained with (config.tokenizer.name='' takes the checkpoint's; "
      "config.transfer.vocabulary='match' matches the rows of another)"
    )
  return tokenizer


def _held_out(config: Config, objective: base.Objective) -> sources.Source | None:
  """The source of evaluation; None without one."""
  if not config.data.eval:
    return None
  source = sources.parse_one(config.data.eval, config.data)
  if not objective.labelled:
    return source
  return sources.in_memory(source)  # for its rows, its duplicates and the baselines


def _batches(config: Config, rows: list[base.Rows], weights: list[float]) -> Batches:
  accum_steps = config.optimizer.grad_accum_steps
  count = rows_a_batch(config.training.batch_size, accum_steps, rows, weights)
  return Batches(rows, weights, count, config.training.seed)
