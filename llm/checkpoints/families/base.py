"""What all tables share: their form, the usual layers, and checked keys of config.json.

Tensors have the names of the class with a language-model head; {} stands for the number of a layer.
`ours` is a name here, `theirs` a name in transformers.
"""

import dataclasses
import sys
from typing import Any, Callable, Mapping

import numpy as np

from llm.config import ModelConfig
from llm.core import UserError

LAYERS = "backbone/layers/"  # our layers
MODEL_LAYER = "model.layers.{}."  # a layer of ModernBERT, Llama and Qwen3
QUERY_KEY_VALUE = tuple(f"{LAYERS}attention/{part}" for part in ("query", "key", "value"))

# Our names of a model's sizes, and those of BERT and of all that followed it.
SIZES = {
  "num_layers": "num_hidden_layers",
  "width": "hidden_size",
  "num_heads": "num_attention_heads",
  "mlp_dim": "intermediate_size",
  "vocab_size": "vocab_size",
  "max_length": "max_position_embeddings",
}
# The objective of BertForPreTraining.
PAIRS = "masked_lm with next_sentence"
# The objectives of a decoder with an output layer.
DECODER_OBJECTIVES = ("causal_lm", "chat", "preference")
# bos_token_id and eos_token_id are both the id of our eos.
DECODER_SPECIAL = {"bos": "eos", "eos": "eos"}


@dataclasses.dataclass(frozen=True)
class Tensor:
  """One tensor of transformers and the parameters that it holds.

  theirs: its name.
  ours: the path of one parameter, or of several that transformers fuses along the outputs.
  transposed: it is outputs x inputs, as in torch.nn.Linear.
  inputs: how many leading dimensions of our kernel are contracted.
  reverse: its classes come in the reverse order.
  first: the first layer that has it. Earlier layers hold ones here and do not use them.
  """

  theirs: str
  ours: tuple[str, ...]
  transposed: bool = False
  inputs: int = 1
  reverse: bool = False
  first: int = 0

  def to_ours(self, tensor: np.ndarray, shapes: list[tuple[int, ...]]) -> list[np.ndarray]:
    """The parameters that a tensor of one layer holds, in the given shapes.

    Raises ValueError where the sizes differ.
    """
    tensor = tensor.T if self.transposed else tensor
    tensor = tensor[..., ::-1] if self.reverse else tensor
    return [
      np.ascontiguousarray(part).reshape(shape)
      for part, shape in zip(np.split(tensor, len(shapes), axis=-1), shapes)
    ]

  def to_theirs(self, leaves: list[np.ndarray]) -> np.ndarray:
    """The tensor of transformers: the inverse of `to_ours`."""
    flat = leaves
    if self.ours[0].endswith("kernel"):
      flat = [leaf.reshape(int(np.prod(leaf.shape[: self.inputs])), -1) for leaf in leaves]
    elif self.ours[0].endswith("bias"):
      flat = [leaf.reshape(-1) for leaf in leaves]
    tensor = np.concatenate(flat, axis=-1)
    tensor = tensor[..., ::-1] if self.reverse else tensor
    return np.ascontiguousarray(tensor.T if self.transposed else tensor)


@dataclasses.dataclass(frozen=True)
class Family:
  """One architecture of transformers.

  model_type: its name in config.json.
  ours: the name of our architecture.
  classes: our objective -> the class with its head. A checkpoint without another head serves the
    first objective.
  prefix: of names; a checkpoint may leave it out.
  tensors: all that a checkpoint may hold.
  buffers: a regex of tensors that are no parameters.
  tied: name of a copy -> name of the tensor that it copies.
  model: config.json -> our config. config: the inverse.
  special: key of a special token in config.json -> its name here.
  padded: vocab_size counts the rows that pad the vocabulary.
  gated: the `gated` of the models that the family serves; None serves both.
  tied_unscaled: an untied config.json without lm_head.weight is tied, and its output not scaled.
  kept: parameters that are imported even without the head that they belong to.
  dropped: a regex of parameters that are not exported.
  tokenizer_json: the tokenizer must be written as tokenizer.json.
  sentinels: how many ids follow the pieces of a SentencePiece file.
  """

  model_type: str
  ours: str
  classes: Mapping[str, str]
  prefix: str
  tensors: tuple[Tensor, ...]
  buffers: str
  tied: Mapping[str, str]
  model: Callable[[Mapping[str, Any]], ModelConfig]
  config: Callable[[ModelConfig], dict[str, Any]]
  special: Mapping[str, str]
  padded: bool = False
  gated: bool | None = None
  tied_unscaled: bool = False
  kept: tuple[str, ...] = ()
  dropped: str = r"^$"
  tokenizer_json: bool = False
  sentinels: int = 0

  def serves(self, model: ModelConfig) -> bool:
    """Whether the family can export this model."""
    return self.ours == model.name and self.gated in (None, model.gated)


def linear(theirs: str, ours: str, **how: Any) -> tuple[Tensor, Tensor]:
  """A linear layer with bias. how: fields of `Tensor`."""
  return (
    Tensor(f"{theirs}.weight", (f"{ours}/kernel",), transposed=True, **how),
    Tensor(f"{theirs}.bias", (f"{ours}/bias",), reverse=how.get("reverse", False)),
  )


def norm(theirs: str, ours: str) -> tuple[Tensor, Tensor]:
  """A norm with bias."""
  return (
    Tensor(f"{theirs}.weight", (f"{ours}/scale",)),
    Tensor(f"{theirs}.bias", (f"{ours}/bias",)),
  )


def conv1d(theirs: str, *ours: str, inputs: int = 1) -> tuple[Tensor, Tensor]:
  """A Conv1D of GPT-2: a linear layer whose kernel is inputs x outputs, as ours is."""
  return (
    Tensor(f"{theirs}.weight", tuple(f"{path}/kernel" for path in ours), inputs=inputs),
    Tensor(f"{theirs}.bias", tuple(f"{path}/bias" for path in ours)),
  )


def kernel(theirs: str, *ours: str, **how: Any) -> Tensor:
  """A linear layer without bias. how: fields of `Tensor`."""
  kernels = tuple(f"{path}/kernel" for path in ours)
  return Tensor(f"{theirs}.weight", kernels, transposed=True, **how)


def scale(theirs: str, ours: str, **how: Any) -> Tensor:
  """A norm without bias. how: fields of `Tensor`."""
  return Tensor(f"{theirs}.weight", (f"{ours}/scale",), **how)


def expect(config: Mapping[str, Any], supported: Mapping[str, Any]):
  """Raises UserError where a key of config.json has another value than the supported one."""
  for key, value in supported.items():
    if config.get(key, value) != value:
      raise UserError(f"config.json: {key}={config[key]!r} is not supported, only {value!r}")


def positive_integer(config: Mapping[str, Any], key: str) -> int:
  value = config.get(key)
  if type(value) is not int or value < 1:
    raise UserError(f"config.json: {key} must be a positive integer, not {value!r}")
  return value


def sizes_of(config: Mapping[str, Any], names: Mapping[str, str] = SIZES) -> dict[str, Any]:
  """The sizes in a config.json, by our names. names: ours -> theirs."""
  return {ours: positive_integer(config, theirs) for ours, theirs in names.items()}


def their_sizes(model: ModelConfig, names: Mapping[str, str] = SIZES) -> dict[str, Any]:
  """The sizes of a model, by their names."""
  return {theirs: getattr(model, ours) for ours, theirs in names.items()}


def non_negative(config: Mapping[str, Any], key: str, default: float) -> float:
  value = config.get(key, default)
  if type(value) not in (int, float) or not 0 <= value <= sys.float_info.max:
    raise UserError(f"config.json: {key} must be a number of at least 0, not {value!r}")
  return float(value)


def boolean(config: Mapping[str, Any], key: str, default: bool) -> bool:
  value = config.get(key, default)
  if type(value) is not bool:
    raise UserError(f"config.json: {key} must be true or false, not {value!r}")
  return value


def json_object(config: Mapping[str, Any], key: str) -> dict[str, Any]:
  value = config.get(key) or {}
  if not isinstance(value, dict):
    raise UserError(f"config.json: {key} must be an object, not {value!r}")
  return value


def expect_plain_rope(rope: Mapping[str, Any]):
  """Raises UserError where config.json scales the rotary positions."""
  kind = rope.get("rope_type", rope.get("type", "default"))
  if kind != "default":
    raise UserError(
      f"config.json: rotary positions of type {kind!r} are not supported, only 'default'"
    )
