"""Tensors of `transformers` become parameters, and parameters become such tensors."""

import pathlib
import re
from typing import Iterator, Mapping, Protocol

import numpy as np

from llm.checkpoints import families, vocabulary
from llm.checkpoints.families.base import Family, Tensor
from llm.config import ModelConfig
from llm.core import STACKED, Params, UserError, unflatten
from llm.models.architecture import padded_vocab


class TensorReader(Protocol):
  """Tensors by name, read one at a time, and the path that errors name."""

  @property
  def folder(self) -> pathlib.Path: ...

  def __iter__(self) -> Iterator[str]: ...

  def __getitem__(self, name: str) -> np.ndarray: ...


def to_params(
  family: Family, weights: TensorReader, wanted: dict[str, tuple[int, ...]], model: ModelConfig
) -> Params:
  """The parameters of a checkpoint of transformers: layers stacked, the vocabulary padded.

  wanted: path -> shape of the parameters to fill. Raises UserError on a tensor that is missing,
  has another shape, has no place here, or is not the copy that the family says it is.
  """
  unread = _names_to_read(family, weights, model)
  leaves = {}
  for tensor in family.tensors:
    if all(path in wanted for path in tensor.ours):
      leaves |= _read_leaves(family, tensor, weights, unread, wanted, model)
  if unread:
    message = f"{weights.folder}: no place for {', '.join(sorted(unread.values())[:4])}"
    if len(unread) > 4:
      message += f" and {len(unread) - 4} more tensors"
    raise UserError(message)
  return unflatten(leaves)


def _names_to_read(family: Family, weights: TensorReader, model: ModelConfig) -> dict[str, str]:
  """Name in the family's table -> name in the file, without buffers and tied copies.

  Raises UserError where a tied tensor differs from what it copies.
  """
  names = {families.full_name(family, name): name for name in weights}
  for name, file_name in list(names.items()):
    if re.search(family.buffers, name):
      del names[name]
      continue
    source = family.tied.get(name)
    if source not in names or (name == "lm_head.weight" and not model.tied):
      continue
    if not np.array_equal(weights[file_name], weights[names[source]]):
      raise UserError(f"{file_name} differs from {source}: for this model_type they must be tied")
    del names[name]
  return names


def _read_leaves(
  family: Family,
  tensor: Tensor,
  weights: TensorReader,
  unread: dict[str, str],
  wanted: dict[str, tuple[int, ...]],
  model: ModelConfig,
) -> dict[str, np.ndarray]:
  """path -> array of one entry of the table. Removes what it reads from `unread`."""
  stacked = STACKED in tensor.ours[0]
  file_names = []
  for number in range(tensor.first, model.num_layers) if stacked else range(1):
    name = tensor.theirs.format(number)
    if name not in unread:
      if tensor.ours[0].startswith("head/"):
        return {}  # the checkpoint has no such head; the transfer reports what stays fresh
      raise UserError(f"{weights.folder}: the tensor {name} is missing")
    file_names.append(unread.pop(name))
  layer_shapes = [wanted[path][1:] if stacked else wanted[path] for path in tensor.ours]
  layers = []
  if tensor.first:
    layers = [[np.ones(shape, np.float32) for shape in layer_shapes]] * tensor.first
  layers += [_parts(family, tensor, weights, name, layer_shapes, model) for name in file_names]
  leaves = {}
  for path, parts in zip(tensor.ours, zip(*layers)):
    leaves[path] = np.stack(parts) if stacked else parts[0]
  return leaves


def _parts(
  family: Family,
  tensor: Tensor,
  weights: TensorReader,
  name: str,
  layer_shapes: list[tuple[int, ...]],
  model: ModelConfig,
) -> list[np.ndarray]:
  """The arrays of one layer, one for every path of `tensor`."""
  array = weights[name]
  if tensor.ours[0] in vocabulary.PATHS:
    rows = padded_vocab(model.vocab_size)
    if family.padded:
      array = array[:rows]
    if len(array) == model.vocab_size:
      array = np.pad(array, [(0, rows - len(array))] + [(0, 0)] * (array.ndim - 1))
  try:
    return tensor.to_ours(array, layer_shapes)
  except ValueError:
    raise UserError(
      f"{weights.folder}: {name} has shape {array.shape}, which does not fit config.json"
    )


def from_params(
  family: Family, leaves: Mapping[str, np.ndarray], model: ModelConfig
) -> Iterator[tuple[str, np.ndarray]]:
  """Names and tensors of transformers, converted one at a time."""
  for tensor in family.tensors:
    if any(path not in leaves for path in tensor.ours):
      continue
    parts = [np.asarray(leaves[path]) for path in tensor.ours]
    if tensor.ours[0] in vocabulary.PATHS:
      parts = [parts[0] if family.padded else parts[0][: model.vocab_size]]
    if STACKED in tensor.ours[0]:
      for layer in range(tensor.first, model.num_layers):
        yield tensor.theirs.format(layer), tensor.to_theirs([part[layer] for part in parts])
    else:
      yield tensor.theirs, tensor.to_theirs(parts)
