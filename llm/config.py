"""Configs: an `ml_collections.ConfigDict` from a file in configs/, checked and frozen.

The dataclasses below are the whole list of keys, with their meanings, defaults and bounds. A key
that is not here is an error that names the nearest one. Defaults are never None or lists, because
ml_collections cannot override those from the command line: "" and 0 mean "not set".
"""

import dataclasses
import difflib
import math
from typing import Any, Mapping

import ml_collections

from llm.core import UserError

# Steps and the dimensions of arrays are counted in 32 bits.
MOST = 2**31


@dataclasses.dataclass(frozen=True)
class Bounds:
  """What a number may be, and which strings a string may be. None and () mean: anything.

  A number is finite, and a whole one that has no other limit is below 2**31.
  """

  at_least: float | None = None
  at_most: float | None = None
  above: float | None = None
  below: float | None = None
  choices: tuple[str, ...] = ()
  # Stands for "not set", outside the other bounds.
  unset: float | None = None

  def violated_by(self, value: Any) -> str:
    """What `value` must be where it is not; empty where it is."""
    if self.choices:
      known = ", ".join(map(repr, self.choices))
      return "" if value in self.choices else f"must be one of {known}"
    if not isinstance(value, int | float) or value == self.unset:
      return ""
    if isinstance(value, int) and (self.at_most, self.below) == (None, None) and value >= MOST:
      return f"must be below {MOST:,}"
    holds = (
      math.isfinite(value)
      and (self.at_least is None or value >= self.at_least)
      and (self.at_most is None or value <= self.at_most)
      and (self.above is None or value > self.above)
      and (self.below is None or value < self.below)
    )
    return "" if holds else f"must {self}"

  def __str__(self) -> str:
    if self.above == 0 and self.at_most is None and self.below is None:
      return "be positive"
    bounds = {
      "at least": self.at_least,
      "above": self.above,
      "at most": self.at_most,
      "below": self.below,
    }
    parts = [f"{word} {bound:,}" for word, bound in bounds.items() if bound is not None]
    unset = "" if self.unset is None else f", or {self.unset:,} for the default"
    return f"be {' and '.join(parts) or 'a number'}{unset}"


def key(default: Any, **bounds: Any) -> Any:
  """A field of a config or an objective, with the `Bounds` of its values."""
  return dataclasses.field(default=default, metadata={"bounds": Bounds(**bounds)})


@dataclasses.dataclass(frozen=True)
class ModelConfig:
  """The network. In a run with `transfer.checkpoint`, what is not set follows the checkpoint."""

  # A file of llm/models: bert, gpt, ..
  name: str = ""
  num_layers: int = key(0, at_least=0)
  width: int = key(0, at_least=0)
  # Columns of the embedding table, where ELECTRA projects it to the width of its layers; 0: width.
  embedding_width: int = key(0, at_least=0)
  num_heads: int = key(0, at_least=0)
  # Heads of keys and values; 0: num_heads.
  num_kv_heads: int = key(0, at_least=0)
  # 0: width / num_heads.
  head_width: int = key(0, at_least=0)
  mlp_dim: int = key(0, at_least=0)
  # 0: the tokenizer's.
  vocab_size: int = key(0, at_least=0)
  # The most positions that the model knows.
  max_length: int = key(0, at_least=0)
  # -1: as the checkpoint.
  dropout: float = key(-1.0, at_least=0, below=1, unset=-1)
  # Standard deviation of fresh kernels and embeddings; 0: by the width (models/architecture.py).
  # Kernels of T5 take it over sqrt(inputs).
  init_std: float = key(0.0, at_least=0)
  # How the table of tokens starts: cooccurrence takes the neighbours of each piece in the training
  # text (data/cooccurrence.py).
  embedding_start: str = key("random", choices=("random", "cooccurrence"))
  # 0: the architecture's.
  norm_epsilon: float = key(0.0, at_least=0)
  # Base of the rotary wavelengths, and that of local layers.
  rope_theta: float = key(10_000.0, above=0)
  local_rope_theta: float = key(10_000.0, above=0)
  # Every so many layers sees the whole text, from the first on; 1: all of them do.
  global_every: int = key(1, at_least=1)
  # The others see so many tokens, half on each side.
  window: int = key(0, at_least=0)
  # The output layer is the embedding table.
  tied: bool = True
  # A tied output of T5 is scaled by width ** -0.5, as the published v1.0 is.
  scaled_output: bool = True
  # The feed-forward layer of T5: gated GELU (v1.1) or ReLU (v1.0).
  gated: bool = True
  # Rank of low-rank adapters beside frozen kernels; 0: none.
  lora_rank: int = key(0, at_least=0)
  # The adapters' output is scaled by alpha / rank.
  lora_alpha: float = key(16.0, above=0)
  # Regex of the linear layers that get an adapter.
  lora_targets: str = "attention/(query|value)$"
  # Dropout of the adapters' input.
  lora_dropout: float = key(0.0, at_least=0, below=1)
  # Types of the computation (models/precision.py): bfloat16_operands is that of products alone.
  # auto takes what is fastest.
  dtype: str = key("auto", choices=("auto", "float32", "bfloat16", "bfloat16_operands", "float64"))
  # auto unrolls the layers on CPU and scans them elsewhere.
  scan: str = key("auto", choices=("auto", "scan", "unroll"))
  # What a block recomputes in the backward pass. dots: all but matrix products with weights.
  remat: str = key("none", choices=("none", "dots", "full"))
  # splash runs on TPUs, cudnn on GPUs. auto takes splash on a TPU where it can serve.
  attention: str = key("auto", choices=("auto", "reference", "splash", "cudnn"))
  # Rows of logits at a time; 0: all at once.
  loss_chunk: int = key(0, at_least=0)


@dataclasses.dataclass(frozen=True)
class DataConfig:
  """Sources are strings: KIND:NAME[SPLIT]@WEIGHT, with commas between those of a mixture."""

  train: str = ""
  # "": no evaluation.
  eval: str = ""
  # Renames the fields of records: "text=sentence1,text_pair=sentence2".
  fields: str = ""
  # How sentences are told apart in a document.
  sentences: str = key("split", choices=("split", "lines"))
  # "": $PRETUNE_CACHE, else ~/.cache/pretune.
  cache: str = ""
  # Batches prepared ahead, by each worker.
  prefetch: int = key(4, above=0)
  # Processes that prepare batches; 0: a thread of the run's own process.
  workers: int = key(0, at_least=0, at_most=256)


@dataclasses.dataclass(frozen=True)
class TokenizerConfig:
  """How text becomes ids. In a run with `transfer.checkpoint`, "" follows the checkpoint."""

  name: str = key("", choices=("", "sentencepiece", "wordpiece", "huggingface", "bytes"))
  # A .model, vocab.txt or tokenizer.json to load; "": one is trained.
  path: str = ""
  # The pieces of a tokenizer that is trained.
  vocab_size: int = key(8192, at_least=0, at_most=2**24)
  # Whether a tokenizer that is trained, or a WordPiece vocabulary, ignores case.
  lowercase: bool = True
  # Ids for spans that are cut out (T5: 100), after the pieces of the file.
  sentinels: int = key(0, at_least=0, at_most=10_000)


@dataclasses.dataclass(frozen=True)
class TransferConfig:
  """Which parameters of another run this one starts from (checkpoints/transfer.py)."""

  # A workdir, its checkpoints/ or a step; a folder of transformers; hf:NAME; embedded:minilm.
  checkpoint: str = ""
  # Regexes: these stay fresh in this model, and are dropped from the checkpoint.
  skip: tuple = ()
  # "pattern=>replacement", applied to the checkpoint's paths.
  rename: tuple = ()
  # Regexes: these may differ in length along one axis, and the overlap is copied.
  adapt: tuple = ()
  # match: the checkpoint has another tokenizer; rows are matched by piece and text.
  vocabulary: str = key("same", choices=("same", "match"))


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
  """The optimizer and its schedule."""

  # muon trains the matrices of layers, and adamw at the same rate the rest.
  name: str = key("adamw", choices=("adamw", "adafactor", "muon"))
  # -1: that of config.recipe, carried over to this run (training/recipe.py).
  learning_rate: float = key(-1.0, at_least=0, unset=-1)
  # After the warm-up: linear falls to 0, cosine to a tenth; wsd is constant and falls to 0 in the
  # last `decay_share` of the run. rsqrt (T5) has no rise: it is constant through the warm-up and
  # then falls with the root of the step.
  schedule: str = key("linear", choices=("linear", "cosine", "constant", "rsqrt", "wsd"))
  # -1: a tenth of the run.
  warmup_steps: int = key(-1, at_least=0, unset=-1)
  # The share of the steps in which the rate of the schedule wsd falls.
  decay_share: float = key(0.1, above=0, at_most=1)
  # The hyper-parameters of adamw. moment_dtype: of its first moment and of muon's momentum.
  beta1: float = key(0.9, at_least=0, below=1)
  beta2: float = key(0.999, at_least=0, below=1)
  epsilon: float = key(1e-6, above=0)
  moment_dtype: str = key("float32", choices=("float32", "bfloat16"))
  weight_decay: float = key(0.01, at_least=0)
  # Regex of paths without decay.
  no_decay: str = r"bias$|scale$"
  # 0: no clipping.
  grad_clip_norm: float = key(1.0, at_least=0)
  grad_accum_steps: int = key(1, above=0, at_most=2**20)
  # Regex of paths that are not trained.
  freeze: str = ""
  # "regex=0.1": factor on the learning rate of these paths; the first match counts.
  multipliers: tuple = ()
  # Multiplies the rate once for every layer below the head.
  layer_decay: float = key(1.0, above=0)


@dataclasses.dataclass(frozen=True)
class RecipeConfig:
  """A published run, from which settings that are -1 are carried over (training/recipe.py)."""

  # The highest learning rate of the published run, and the width of its model.
  learning_rate: float = key(1e-4, above=0)
  width: int = key(768, above=0)
  # The rate falls with this power of the width.
  width_power: float = key(1.0, at_least=0)
  # The layers of its model: a deeper one gets a lower rate; 0: the depth does not matter.
  num_layers: int = key(0, at_least=0)
  # Its tokens a step; 0: the batch does not matter.
  batch_tokens: int = key(0, at_least=0)
  # Its steps, which need batch_tokens; 0: the length of the run does not matter.
  steps: int = key(0, at_least=0)
  # Its epochs. Small data get more, until they are so many steps (training/recipe.py).
  epochs: float = key(3.0, above=0)
  least_steps: int = key(1_000, at_least=0)


@dataclasses.dataclass(frozen=True)
class MeshConfig:
  """Axis sizes; one of them may be -1 and takes the devices that are left."""

  data: int = -1
  fsdp: int = 1
  tensor: int = 1
  context: int = 1
  # TPU slices joined by a data-centre network: part of `data`.
  slices: int = key(1, above=0)


@dataclasses.dataclass(frozen=True)
class TrainingConfig:
  """Length and rhythm of a run. All counts are global, not per device."""

  steps: int = key(0, at_least=0)
  # Passes over the rows of the first training source, in place of steps. -1: those of
  # config.recipe, or more where the data are small.
  epochs: float = key(0.0, at_least=0, at_most=1e9, unset=-1)
  # Examples: rows of text where a model learns to write or to fill in; labelled texts and
  # questions, of which several share a row.
  batch_size: int = key(32, above=0)
  sequence_length: int = key(128, above=0, at_most=2**21)
  seed: int = key(0, at_least=0, below=2**31)
  log_every: int = key(50, above=0)
  # 0: at the end only; -1: at the end of every epoch.
  eval_every: int = key(0, at_least=0, unset=-1)
  # 0: the whole evaluation source.
  eval_batches: int = key(0, at_least=0)
  # 0: at the end only; -1: at the end of every epoch, and every 200 steps at least.
  save_every: int = key(0, at_least=0, unset=-1)
  # The newest checkpoints that stay.
  keep: int = key(2, above=0)
  # "max:accuracy", "min:loss": the best checkpoint stays too, and is what other commands take.
  # auto: by the objective's own figure, where there is an evaluation source.
  keep_best: str = ""
  # Evaluations in a row without a better one after which a run ends; 0: it does not.
  patience: int = key(0, at_least=0)
  # "10:15": a profile of the steps from 10 to 15.
  profile: str = ""


@dataclasses.dataclass(frozen=True)
class Config:
  """One experiment. `objective` stays a mapping: its keys are the fields of its dataclass."""

  model: ModelConfig
  objective: Mapping[str, Any]
  data: DataConfig
  tokenizer: TokenizerConfig
  transfer: TransferConfig
  optimizer: OptimizerConfig
  recipe: RecipeConfig
  mesh: MeshConfig
  training: TrainingConfig


GROUPS: dict[str, Any] = {
  f.name: f.type for f in dataclasses.fields(Config) if f.name != "objective"
}

# What users of other codebases type, and what it is called here.
ELSEWHERE = {
  "init_from": "transfer.checkpoint",
  "init_checkpoint": "transfer.checkpoint",
  "lr": "optimizer.learning_rate",
  "warmup": "optimizer.warmup_steps",
  "per_device_batch_size": "training.batch_size (global)",
  "per_device_train_batch_size": "training.batch_size (global)",
  "max_seq_length": "training.sequence_length",
  "hidden_size": "model.width",
  "num_hidden_layers": "model.num_layers",
  "num_attention_heads": "model.num_heads",
  "intermediate_size": "model.mlp_dim",
  "emb_dim": "model.width",
  "num_train_epochs": "training.epochs",
  "max_steps": "training.steps",
  "num_train_steps": "training.steps",
  "gradient_accumulation_steps": "optimizer.grad_accum_steps",
  "block_size": "training.sequence_length",
  "n_layer": "model.num_layers",
  "n_head": "model.num_heads",
  "n_embd": "model.width",
  "max_iters": "training.steps",
}


def place_of(name: str) -> str:
  """GROUP.KEY of what is called `name` here or in other codebases; "" where there is none."""
  if name in ELSEWHERE:
    return ELSEWHERE[name]
  groups = [group for group, cls in GROUPS.items() if hasattr(cls, name) and group != "recipe"]
  return f"{groups[0]}.{name}" if len(groups) == 1 else ""


def unknown_key(where: str, key: str, known, of: str = "") -> UserError:
  """The error for a key that does not exist, naming what was probably meant.

  of: whose keys they are, after the key, where `where` does not say it.
  """
  name = key.rpartition(".")[2]
  if name in ELSEWHERE:
    hint = f"here it is config.{ELSEWHERE[name]}"
  elif (place := place_of(name)) and (where != "config" or place.split(".")[0] in known):
    hint = f"did you mean config.{place}?"
  elif near := difflib.get_close_matches(key, known, n=1, cutoff=0.5):
    hint = f"did you mean {where}.{near[0]}?"
  else:
    hint = f"known keys: {', '.join(sorted(known))}"
  shown = key if key.isprintable() else repr(key)
  return UserError(f"unknown key {where}.{shown}{of}: {hint}")


def check_name(group: str, names: list[str], group_class: Any):
  """Raises UserError, naming the nearest key, if a group of a config has no key of that name.

  names: what follows the group, parted by dots; [] is the group itself.
  """
  known = [field.name for field in dataclasses.fields(group_class)]
  if names and (names[0] not in known or len(names) > 1):
    raise unknown_key(f"config.{group}", ".".join(names), known)


def _as_float(value: int) -> float:
  """An integer as a float; beyond the largest float it is infinite, which no key may be."""
  try:
    return float(value)
  except OverflowError:
    return math.inf if value > 0 else -math.inf


def _checked(value, default, where: str):
  """`value`, if its type is that of `default` (an int may stand for a float)."""
  if isinstance(value, list):
    value = tuple(value)
  if isinstance(default, float) and type(value) is int:
    value = _as_float(value)
  if type(value) is not type(default):
    raise UserError(
      f"{where} must be of type {type(default).__name__}, not {type(value).__name__} ({value!r})"
    )
  if isinstance(value, tuple) and not all(isinstance(v, str) for v in value):
    raise UserError(f"{where} must be a tuple of strings, not {value!r}")
  return value


def build(cls: type, mapping: Mapping[str, Any], where: str) -> Any:
  """mapping -> cls(**mapping), every key known, of the type of its default and within its bounds.

  Raises UserError naming the key, what was expected, and the nearest known key.
  """
  known = {f.name: f.default for f in dataclasses.fields(cls)}
  if not isinstance(mapping, Mapping):
    raise UserError(f"{where} must be a group of keys, not {mapping!r}")
  for name in mapping:
    if name not in known:
      raise unknown_key(where, name, known)
  group = cls(**{k: _checked(v, known[k], f"{where}.{k}") for k, v in mapping.items()})
  check_bounds(group, where)
  return group


def check_bounds(group: Any, where: str):
  """Raises UserError naming the first field of a dataclass that is outside its bounds."""
  for field in dataclasses.fields(group):
    value = getattr(group, field.name)
    if problem := field.metadata.get("bounds", Bounds()).violated_by(value):
      raise UserError(f"{where}.{field.name} {problem}, not {value!r}")


def freeze(config: Mapping[str, Any]) -> Config:
  """ConfigDict or plain dict -> Config. Raises UserError on an unknown or ill-typed key."""
  plain = config.to_dict() if isinstance(config, ml_collections.ConfigDict) else config
  if not isinstance(plain, Mapping):
    raise UserError(f"config must hold groups of keys, not {plain!r}")
  for key in plain:
    if key != "objective" and key not in GROUPS:
      raise unknown_key("config", key, [*GROUPS, "objective"])
  groups = {name: build(cls, plain.get(name, {}), f"config.{name}") for name, cls in GROUPS.items()}
  objective = plain.get("objective", {})
  if not isinstance(objective, Mapping) or not isinstance(objective.get("name"), str):
    raise UserError("config.objective.name must name a file of llm/objectives, e.g. masked_lm")
  return Config(objective=dict(objective), **groups)


def thaw(config: Config) -> dict[str, Any]:
  """Config -> plain dict, for JSON."""
  groups = {name: dataclasses.asdict(getattr(config, name)) for name in GROUPS}
  return {**groups, "objective": dict(config.objective)}


def defaults(objective: Mapping[str, Any]) -> Any:
  """An ml_collections.ConfigDict with every key at its default, for files in configs/."""
  groups = {name: dataclasses.asdict(cls()) for name, cls in GROUPS.items()}
  return ml_collections.ConfigDict({**groups, "objective": dict(objective)})
