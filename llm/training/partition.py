"""Which parameters are trained and which are frozen, layer by layer.

The layers of a stack are stored as one array, but rules address each of them by a path of its own
(core.virtual_paths). A leaf of which some layers are frozen is split along its layer axis.
"""

import re
from typing import Callable

import jax.numpy as jnp
import numpy as np

from llm.core import STACKED, Leaves, Params, UserError, flatten, unflatten, virtual_paths

# Path of a leaf -> for each of its layers, whether it is frozen; one entry where it has no layers.
FrozenMasks = dict[str, list[bool]]


def by_layer(
  trained: Leaves, value: Callable[[str], float], masks: FrozenMasks | None = None
) -> dict[str, float | np.ndarray]:
  """Path -> leaf becomes path -> value, for the trained parts of parameters.

  The value of a stacked leaf is an array that broadcasts over its layers, else a number. Without
  masks, every layer is trained.
  """
  result = {}
  for path, leaf in trained.items():
    layers = np.flatnonzero(~np.array(masks[path])) if masks else None
    values = [value(virtual_path) for virtual_path in virtual_paths(path, leaf, layers)]
    if STACKED in path:
      shape = (len(values),) + (1,) * (leaf.ndim - 1)
      result[path] = np.array(values, np.float32).reshape(shape)
    else:
      result[path] = values[0]
  return result


def frozen_layers(params: Params, freeze: str) -> FrozenMasks:
  """The layers whose path matches the regex `freeze`; none where it is "".

  Raises UserError where it is no regex, or matches nothing or everything.
  """
  try:
    rule = re.compile(freeze) if freeze else None
  except re.error as error:
    raise UserError(f"config.optimizer.freeze={freeze!r} is no regular expression: {error}")
  masks = {}
  for path, leaf in flatten(params).items():
    masks[path] = [bool(rule and rule.search(p)) for p in virtual_paths(path, leaf)]
  count = sum(map(sum, masks.values()))
  if freeze and count == 0:
    raise UserError(
      f"config.optimizer.freeze={freeze!r} matches no parameter; "
      "`python -m llm.show sharding --config=...` lists the paths"
    )
  if count == sum(map(len, masks.values())):
    raise UserError(
      f"config.optimizer.freeze={freeze!r} matches every parameter: nothing is left to train"
    )
  return masks


def split(params: Params, masks: FrozenMasks) -> tuple[Leaves, Leaves]:
  """Parameters -> (trained, frozen)."""
  trained = {}
  frozen = {}
  for path, leaf in flatten(params).items():
    mask = np.array(masks[path])
    if not mask.any():
      trained[path] = leaf
    elif mask.all():
      frozen[path] = leaf
    else:
      trained[path] = leaf[np.flatnonzero(~mask)]
      frozen[path] = leaf[np.flatnonzero(mask)]
  return trained, frozen


def merge(trained: Leaves, frozen: Leaves, masks: FrozenMasks) -> Params:
  """The inverse of `split`."""
  leaves = {}
  for path, mask in masks.items():
    if path in trained and path in frozen:
      # Where each layer is in the trained ones, followed by the frozen ones.
      order = np.argsort(np.argsort(np.array(mask), kind="stable"), kind="stable")
      leaves[path] = jnp.concatenate([trained[path], frozen[path]])[order]
    else:
      leaves[path] = trained[path] if path in trained else frozen[path]
  return unflatten(leaves)
