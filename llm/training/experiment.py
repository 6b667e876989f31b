"""From a config to all that a run is made of, on the host alone: no device is touched here."""

import dataclasses
import json
import math
import pathlib
import re
import tempfile
from typing import Callable, NamedTuple

from etils import epath

from llm import config as config_lib
from llm.checkpoints import locate, manager
from llm.config import Config, ModelConfig
from llm.core import UserError
from llm.data import cache, sources
from llm.data import tokenizer as tokenizer_lib
from llm.data.batches import Batches, rows_a_batch
from llm.models import build_backbone
from llm.models.heads import Model
from llm.objectives import base

SHAPE = ("name", "num_layers", "width", "num_heads", "mlp_dim", "max_length")
# What else follows a checkpoint whose architecture is taken.
DETAILS = ("num_kv_heads", "head_width", "norm_epsilon", "rope_theta", "tied", "gated", "init_std")


@dataclasses.dataclass(frozen=True)
class Experiment:
  """A config with everything resolved: the model's shape, the tokenizer, the classes, the rows."""

  config: Config
  objective: base.Objective
  tokenizer: tokenizer_lib.Tokenizer
  model: Model
  batches: Batches | None = None
  eval_rows: base.Rows | None = None
  names: tuple[str, ...] = ()  # of the training sources
  start: epath.Path | None = None  # the verified step that the run resumes or transfers from

  def description(self) -> dict:
    """What a checkpoint says of itself."""
    return {"config": config_lib.thaw(self.config)}


class Bundle(NamedTuple):
  """A checkpoint in memory (llm.load)."""

  model: Model
  params: dict
  tokenizer: tokenizer_lib.Tokenizer
  config: Config


def _following(model: ModelConfig, start: dict | None, vocab_size: int) -> ModelConfig:
  """The model with what is not set taken from the checkpoint that the run starts from."""
  if start:
    same = dataclasses.asdict(config_lib.freeze(start["config"]).model)
    unset = {k: same[k] for k in SHAPE if not getattr(model, k)}
    if not model.name:
      unset |= {k: same[k] for k in DETAILS}
    if model.dropout < 0:
      unset["dropout"] = same["dropout"]
    model = dataclasses.replace(model, **unset)
  if missing := [k for k in SHAPE if not getattr(model, k)]:
    raise UserError(
      f"config.model.{missing[0]} is not set: give config.transfer.checkpoint, which has "
      "a model, or set the model's keys"
    )
  if model.vocab_size and model.vocab_size != vocab_size:
    raise UserError(
      f"config.model.vocab_size={model.vocab_size} but the tokenizer has {vocab_size} pieces; "
      "0 takes the tokenizer's"
    )
  if not model.head_width and model.width % model.num_heads:
    raise UserError(
      f"config.model.width={model.width} must be a multiple of num_heads={model.num_heads}"
    )
  if model.num_kv_heads and model.num_heads % model.num_kv_heads:
    raise UserError(
      f"config.model.num_heads={model.num_heads} must be a multiple of num_kv_heads={model.num_kv_heads}"
    )
  if not model.tied and model.name not in ("llama", "t5"):
    raise UserError(
      f"config.model.tied=False: the output layer of {model.name} is its embedding table"
    )
  try:
    re.compile(model.lora_targets)
  except re.error as error:
    raise UserError(
      f"config.model.lora_targets={model.lora_targets!r} is no regular expression: {error}"
    )
  if model.dropout >= 1:
    raise UserError(f"config.model.dropout must lie in [0, 1), not {model.dropout}")
  return dataclasses.replace(model, vocab_size=vocab_size, dropout=max(model.dropout, 0.0))


def _own_or_transferred(config: Config, own: epath.Path | None, say) -> epath.Path | None:
  if own:
    return own
  return (
    locate.find(config.transfer.checkpoint, say, config.data.cache)
    if config.transfer.checkpoint
    else None
  )


def _tokenizer(config: Config, start: epath.Path | None, train) -> tokenizer_lib.Tokenizer:
  if start and not config.tokenizer.name:
    return manager.load_tokenizer(start)
  made = tokenizer_lib.make(config.tokenizer, train, cache.cache_dir(config.data.cache))
  if (
    start
    and config.transfer.vocabulary == "same"
    and made.digest() != manager.load_tokenizer(start).digest()
  ):
    raise UserError(
      "the vocabulary does not fit the checkpoint: config.tokenizer makes another one than "
      f"{start} was trained with (config.tokenizer.name='' takes the checkpoint's; "
      "config.transfer.vocabulary='match' matches the rows of another)"
    )
  return made


def _steps(config: Config, batches: Batches) -> int:
  if bool(config.training.steps) == bool(config.training.epochs):
    raise UserError("set either config.training.steps or config.training.epochs, the other to 0")
  return config.training.steps or max(
    1, math.ceil(config.training.epochs * batches.steps_an_epoch())
  )


def prepare(config: Config, own: epath.Path | None = None, say: Callable = print) -> Experiment:
  """Everything that a run of `config` needs. own: the run's own checkpoint, when it goes on.

  Raises UserError on bad input of every kind.
  """
  if not config.data.train:
    raise UserError("config.data.train is not set: give a source, e.g. text:corpus.txt")
  if config.training.keep_best and not (
    config.training.keep_best.startswith(("max:", "min:")) and config.data.eval
  ):
    raise UserError(
      "config.training.keep_best must be 'max:METRIC' or 'min:METRIC' and needs config.data.eval"
    )
  start = _own_or_transferred(config, own, say)
  description = manager.describe(start) if start else None
  if own:
    objective = base.build(description["config"]["objective"])
  else:
    objective = base.build(config.objective)
  train = sources.parse(config.data.train, config.data)
  tokenizer = _tokenizer(config, start, train)
  model = _following(config.model, description, tokenizer.vocab_size)
  length = config.training.sequence_length
  if length > model.max_length:
    raise UserError(
      f"config.training.sequence_length={length} is longer than the model's "
      f"{model.max_length} positions (config.model.max_length)"
    )
  objective = objective.fit(train, tokenizer)
  rows = [objective.rows(s, tokenizer, config.data, model, length) for s in train]
  weights = [s.weight for s in train]
  count = rows_a_batch(config.training.batch_size, config.optimizer.grad_accum_steps, rows, weights)
  batches = Batches(rows, weights, objective.example, count, config.training.seed)
  eval_rows = None
  if config.data.eval:
    held_out = sources.parse(config.data.eval, config.data)
    if len(held_out) > 1:
      raise UserError("config.data.eval must be one source")
    eval_rows = objective.eval_rows(held_out[0], tokenizer, config.data, model, length)
  resolved = dataclasses.replace(
    config,
    model=model,
    objective=base.to_mapping(objective),
    training=dataclasses.replace(config.training, steps=_steps(config, batches), epochs=0.0),
  )
  return Experiment(
    resolved,
    objective,
    tokenizer,
    build(objective, model),
    batches,
    eval_rows,
    tuple(s.spec for s in train),
    start,
  )


# Something for every task: without data, only the shapes of a batch are asked for, which no text changes.
MADE_UP = {
  "text": "One two three four.\nFive six.",
  "text_pair": "Seven eight nine.",
  "label": "1",
  "target": "two",
  "question": "Which?",
  "answers": [{"text": "two", "answer_start": 4}],
  "id": "1",
  "messages": [{"role": "user", "content": "Which?"}, {"role": "assistant", "content": "Two."}],
  "chosen": "Two.",
  "rejected": "Six.",
}


def without_data(config: Config, say: Callable = print) -> Experiment:
  """The experiment of a config on made-up rows: no source is read and no tokenizer trained, for looking at its programs.

  How many examples share a row is the data's: here each has a row, the most that a batch takes.
  Raises UserError as `prepare`.
  """
  start = _own_or_transferred(config, None, say)
  objective = base.build(config.objective)
  stand_in = tokenizer_lib.ByteTokenizer(max(100, config.tokenizer.sentinels))
  if start and not config.tokenizer.name:
    vocab_size = manager.load_tokenizer(start).vocab_size
  elif config.tokenizer.path or config.tokenizer.name == "bytes":
    vocab_size = _tokenizer(config, start, ()).vocab_size
  else:
    vocab_size = config.model.vocab_size or config.tokenizer.vocab_size + config.tokenizer.sentinels
  model = _following(config.model, manager.describe(start) if start else None, vocab_size)
  labels = [target.split("=")[0] for target in getattr(objective, "targets", ())] or ["0", "1"]
  with tempfile.TemporaryDirectory() as folder:
    path = pathlib.Path(folder) / "made_up.jsonl"
    path.write_text(
      "".join(json.dumps(MADE_UP | {"label": labels[n % len(labels)]}) + "\n" for n in range(8))
    )
    train = sources.parse(
      f"jsonl:{path}", dataclasses.replace(config.data, fields="", cache=folder)
    )
    objective = objective.fit(train, stand_in)
    rows = objective.rows(train[0], stand_in, config.data, model, config.training.sequence_length)
    batches = Batches([rows], [1.0], objective.example, config.training.batch_size, 0)
    batches.read(0, range(1))  # while the files are there
  resolved = dataclasses.replace(
    config,
    model=model,
    objective=base.to_mapping(objective),
    training=dataclasses.replace(config.training, steps=config.training.steps or 1000, epochs=0.0),
  )
  return Experiment(resolved, objective, stand_in, build(objective, model), batches, start=start)


def build(objective: base.Objective, model: ModelConfig) -> Model:
  """Backbone and head."""
  return Model(build_backbone(model), objective.head(model))


def from_checkpoint(step: epath.Path) -> Experiment:
  """The experiment that wrote a step, without its data."""
  config = config_lib.freeze(manager.describe(step)["config"])
  # What computed attention where it was trained may not be had here.
  config = dataclasses.replace(config, model=dataclasses.replace(config.model, attention="auto"))
  objective = base.build(config.objective)
  return Experiment(config, objective, manager.load_tokenizer(step), build(objective, config.model))


def load(step: epath.Path) -> Bundle:
  """A step in memory, on the host."""
  saved = from_checkpoint(step)
  return Bundle(saved.model, manager.restore(step, "params"), saved.tokenizer, saved.config)
