"""Configs: an `ml_collections.ConfigDict` from a file in configs/, turned strictly into dataclasses.

The dataclasses below are the whole list of keys, with their defaults and meanings; a key that is
not here is an error that names the nearest one. Defaults are never None or lists, because
ml_collections cannot override those from the command line: "" and 0 mean "not set".
"""

import dataclasses
import difflib
from typing import Any, Mapping

import ml_collections

from llm.core import UserError


@dataclasses.dataclass(frozen=True)
class ModelConfig:
  """The network. In a run with `transfer.checkpoint`, what is not set follows the checkpoint."""

  name: str = ""  # bert, gpt, llama, t5
  num_layers: int = 0
  width: int = 0
  num_heads: int = 0
  num_kv_heads: int = 0  # heads of keys and values (llama); 0: num_heads
  head_width: int = 0  # 0: width / num_heads
  mlp_dim: int = 0
  vocab_size: int = 0  # 0: the tokenizer's
  max_length: int = 0  # positions that the model knows
  dropout: float = -1.0  # -1: as the checkpoint
  init_std: float = (
    0.02  # of fresh kernels and embeddings (t5: of embeddings; kernels over sqrt(inputs))
  )
  norm_epsilon: float = 0.0  # 0: the architecture's
  rope_theta: float = 10000.0  # base of the rotary wavelengths (llama)
  tied: bool = True  # the output layer is the embedding table (untied: llama, t5 v1.1)
  gated: bool = True  # feed-forward of t5: gated GELU (v1.1), or ReLU (v1.0)
  lora_rank: int = 0  # of low-rank adapters beside frozen kernels; 0: none
  lora_alpha: float = 16.0  # the adapters' output is scaled by alpha / rank
  lora_targets: str = "attention/(query|value)$"  # regex of the linear layers that get one
  lora_dropout: float = 0.0  # of the adapters' input
  dtype: str = "auto"  # of the computation: float32; bfloat16; bfloat16_operands (of products
  # alone); auto: what is fastest (models/precision.py)
  scan: str = "auto"  # scan, unroll; auto: unroll on CPU, scan elsewhere
  remat: str = "none"  # what a block recomputes in the backward pass: none; dots: all but matrix products with weights;
  # full: everything
  attention: str = "auto"  # reference; splash (TPU); cudnn (GPU); auto: splash on TPUs where it can serve, else reference
  loss_chunk: int = 0  # rows of logits at a time; 0: all at once


@dataclasses.dataclass(frozen=True)
class DataConfig:
  """Sources are strings: KIND:NAME[SPLIT]@WEIGHT, parted by commas in a mixture."""

  train: str = ""
  eval: str = ""  # "" : no evaluation
  fields: str = ""  # renames the fields of records: "text=sentence1,text_pair=sentence2"
  sentences: str = "split"  # how sentences are found in a document: split, lines
  cache: str = ""  # "" : ~/.cache/pretune, or $PRETUNE_CACHE
  prefetch: int = 4  # batches made ahead, and as many by each worker
  workers: int = 0  # processes that make them; 0: a thread of the run's own


@dataclasses.dataclass(frozen=True)
class TokenizerConfig:
  """How text becomes ids. In a run with `transfer.checkpoint`, "" follows the checkpoint."""

  name: str = ""  # sentencepiece, wordpiece, huggingface, bytes
  path: str = ""  # a .model, vocab.txt or tokenizer.json to load; "" : train one
  vocab_size: int = 8192  # of a tokenizer that is trained
  lowercase: bool = True  # of a tokenizer that is trained, or a wordpiece vocabulary
  sentinels: int = 0  # ids for spans that are cut out (t5: 100), after those of the file


@dataclasses.dataclass(frozen=True)
class TransferConfig:
  """Which parameters of another run are the start of this one (checkpoints/transfer.py)."""

  checkpoint: str = (
    ""  # a workdir, its checkpoints/ or a step; a folder of transformers; hf:NAME; embedded:minilm
  )
  skip: tuple = ()  # regexes: stay fresh in this model, are dropped from the checkpoint
  rename: tuple = ()  # "pattern=>replacement", applied to the checkpoint's paths
  adapt: tuple = ()  # regexes: may differ in length along one axis: the overlap is copied
  vocabulary: str = "same"  # same; match: another tokenizer, rows matched by piece and text


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
  """The optimizer and its schedule."""

  name: str = "adamw"  # adamw, adafactor
  learning_rate: float = 1e-4
  schedule: str = "linear"  # after the warm-up: linear (to 0), cosine (to a tenth), constant; rsqrt (t5): constant,
  # then falling with the root of the step, without a rise
  warmup_steps: int = -1  # -1: a tenth of the run
  beta1: float = 0.9  # of adamw, as the next two
  beta2: float = 0.999
  epsilon: float = 1e-6
  moment_dtype: str = "float32"  # of adamw's first moment: float32, bfloat16
  weight_decay: float = 0.01
  no_decay: str = r"bias$|scale$"  # regex of paths without decay
  grad_clip_norm: float = 1.0  # 0: no clipping
  grad_accum_steps: int = 1
  freeze: str = ""  # regex of paths that are not trained
  multipliers: tuple = ()  # "regex=0.1" : learning rate of these paths, the first match counts
  layer_decay: float = 1.0  # multiplies the rate once for every layer below the head


@dataclasses.dataclass(frozen=True)
class MeshConfig:
  """Axis sizes; one of them may be -1 and takes the devices that are left."""

  data: int = -1
  fsdp: int = 1
  tensor: int = 1
  context: int = 1
  slices: int = 1  # of TPU pods joined by a data-centre network: part of `data`


@dataclasses.dataclass(frozen=True)
class TrainingConfig:
  """Length and rhythm of a run. All counts are global, not per device."""

  steps: int = 0
  epochs: float = 0.0  # of the training rows, in place of steps
  batch_size: int = 32  # examples: rows of text where a model learns to write or to fill in;
  # labelled texts and questions, of which several share a row
  sequence_length: int = 128
  seed: int = 0
  log_every: int = 50
  eval_every: int = 0  # 0: at the end only
  eval_batches: int = 0  # 0: the whole evaluation source
  save_every: int = 0  # 0: at the end only
  keep: int = 2  # newest checkpoints that stay
  keep_best: str = ""  # "max:accuracy", "min:loss": one more stays, the best
  profile: str = ""  # "10:15" : a profile of the steps from 10 to 15


@dataclasses.dataclass(frozen=True)
class Config:
  """One experiment. `objective` stays a mapping: its keys are the fields of its dataclass."""

  model: ModelConfig
  objective: Mapping[str, Any]
  data: DataConfig
  tokenizer: TokenizerConfig
  transfer: TransferConfig
  optimizer: OptimizerConfig
  mesh: MeshConfig
  training: TrainingConfig


GROUPS = {f.name: f.type for f in dataclasses.fields(Config) if f.name != "objective"}

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
}

CHOICES = {
  "optimizer.schedule": ("linear", "cosine", "constant", "rsqrt"),
  "optimizer.name": ("adamw", "adafactor"),
  "optimizer.moment_dtype": ("float32", "bfloat16"),
  "model.dtype": ("auto", "float32", "bfloat16", "bfloat16_operands", "float64"),
  "model.attention": ("auto", "reference", "splash", "cudnn"),
  "model.scan": ("auto", "scan", "unroll"),
  "model.remat": ("none", "dots", "full"),
  "model.name": ("", "bert", "gpt", "llama", "t5"),
  "data.sentences": ("split", "lines"),
  "transfer.vocabulary": ("same", "match"),
  "tokenizer.name": ("", "sentencepiece", "wordpiece", "huggingface", "bytes"),
}

NON_NEGATIVE = {
  "num_layers",
  "width",
  "num_heads",
  "num_kv_heads",
  "head_width",
  "norm_epsilon",
  "lora_rank",
  "lora_dropout",
  "mlp_dim",
  "vocab_size",
  "max_length",
  "loss_chunk",
  "steps",
  "epochs",
  "log_every",
  "eval_every",
  "eval_batches",
  "save_every",
  "sentinels",
  "workers",
  "learning_rate",
  "weight_decay",
  "grad_clip_norm",
  "seed",
}
POSITIVE = {
  "batch_size",
  "sequence_length",
  "grad_accum_steps",
  "keep",
  "slices",
  "prefetch",
  "log_every",
  "layer_decay",
  "epsilon",
  "rope_theta",
  "init_std",
  "lora_alpha",
}

AT_MOST = {"sentinels": 10_000, "sequence_length": 2**24, "workers": 256}


def unknown_key(where: str, key: str, known) -> UserError:
  """The error for a key that does not exist, naming what was probably meant."""
  if key in ELSEWHERE:
    hint = f"here it is config.{ELSEWHERE[key]}"
  elif near := difflib.get_close_matches(key, known, n=1, cutoff=0.5):
    hint = f"did you mean {where}.{near[0]}?"
  else:
    hint = f"known keys: {', '.join(sorted(known))}"
  return UserError(f"unknown key {where}.{key}: {hint}")


def _checked(value, default, where: str):
  """`value`, if its type is that of `default` (an int may stand for a float)."""
  if isinstance(value, list):
    value = tuple(value)
  if isinstance(default, float) and type(value) is int:
    value = float(value)
  if type(value) is not type(default):
    raise UserError(
      f"{where} must be of type {type(default).__name__}, not {type(value).__name__} ({value!r})"
    )
  if isinstance(value, tuple) and not all(isinstance(v, str) for v in value):
    raise UserError(f"{where} must be a tuple of strings, not {value!r}")
  return value


def build(cls, mapping: Mapping[str, Any], where: str):
  """mapping -> cls(**mapping), every key known and of the type of its default.

  Raises UserError naming the key, what was expected, and the nearest known key.
  """
  known = {f.name: f.default for f in dataclasses.fields(cls)}
  if not isinstance(mapping, Mapping):
    raise UserError(f"{where} must be a group of keys, not {mapping!r}")
  for key in mapping:
    if key not in known:
      raise unknown_key(where, key, known)
  values = {k: _checked(v, known[k], f"{where}.{k}") for k, v in mapping.items()}
  group = where.removeprefix("config.")
  for key, value in values.items():
    if (choices := CHOICES.get(f"{group}.{key}")) and value not in choices:
      raise UserError(
        f"{where}.{key} must be one of {', '.join(map(repr, choices))}, not {value!r}"
      )
    if key in POSITIVE and value <= 0 or key in NON_NEGATIVE and value < 0 or value != value:
      raise UserError(
        f"{where}.{key} must be {'positive' if key in POSITIVE else 'at least 0'}, not {value!r}"
      )
    if key in AT_MOST and value > AT_MOST[key]:
      raise UserError(f"{where}.{key} must be at most {AT_MOST[key]:,}, not {value!r}")
  return cls(**values)


def freeze(config: Mapping[str, Any]) -> Config:
  """ConfigDict or plain dict -> Config. Raises UserError on an unknown or ill-typed key."""
  plain = config.to_dict() if isinstance(config, ml_collections.ConfigDict) else dict(config)
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
  return {
    k: dict(v) if isinstance(v, Mapping) else dataclasses.asdict(v)
    for k, v in ((f.name, getattr(config, f.name)) for f in dataclasses.fields(config))
  }


def defaults(objective: Mapping[str, Any]) -> ml_collections.ConfigDict:
  """A ConfigDict with every key at its default: the start of each file in configs/."""
  groups = {name: dataclasses.asdict(cls()) for name, cls in GROUPS.items()}
  return ml_collections.ConfigDict({**groups, "objective": dict(objective)})
