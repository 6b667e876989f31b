"""Rules address layers one by one, although the layers of a stack are stored as one array.

A leaf whose layers are partly frozen is split along its layer axis.
"""

import re
from typing import Callable

import jax.numpy as jnp
import numpy as np

from llm.core import STACKED, Params, UserError, flatten, unflatten, virtual_paths


def by_layer(tree: dict, value: Callable[[str], float]) -> dict:
  """path -> leaf becomes path -> value: a number, or an array that broadcasts over the layers."""
  out = {}
  for path, leaf in tree.items():
    values = [value(p) for p in virtual_paths(path, leaf)]
    shape = (len(values),) + (1,) * (leaf.ndim - 1)
    out[path] = np.array(values, np.float32).reshape(shape) if STACKED in path else values[0]
  return out


def frozen_layers(params: Params, freeze: str) -> dict[str, list[bool]]:
  """path -> whether each of its virtual paths is frozen.

  Raises UserError where the regex matches nothing or everything.
  """
  leaves = flatten(params)
  try:
    rule = re.compile(freeze) if freeze else None
  except re.error as error:
    raise UserError(f"config.optimizer.freeze={freeze!r} is no regular expression: {error}")
  marks = {
    path: [bool(rule and rule.search(p)) for p in virtual_paths(path, leaf)]
    for path, leaf in leaves.items()
  }
  count = sum(map(sum, marks.values()))
  if freeze and count == 0:
    raise UserError(
      f"config.optimizer.freeze={freeze!r} matches no parameter; "
      "`python -m llm.show sharding --config=...` lists the paths"
    )
  if count == sum(map(len, marks.values())):
    raise UserError(
      f"config.optimizer.freeze={freeze!r} matches every parameter: nothing is left to train"
    )
  return marks


def split(params: Params, marks: dict[str, list[bool]]) -> tuple[dict, dict]:
  """params -> (trained, frozen), two dicts of path -> array."""
  trained, frozen = {}, {}
  for path, leaf in flatten(params).items():
    mark = np.array(marks[path])
    if not mark.any():
      trained[path] = leaf
    elif mark.all():
      frozen[path] = leaf
    else:
      trained[path], frozen[path] = leaf[np.flatnonzero(~mark)], leaf[np.flatnonzero(mark)]
  return trained, frozen


def merge(trained: dict, frozen: dict, marks: dict[str, list[bool]]) -> Params:
  """The inverse of `split`."""
  leaves = {}
  for path, mark in marks.items():
    if path in trained and path in frozen:
      order = np.argsort(np.argsort(np.array(mark), kind="stable"), kind="stable")
      leaves[path] = jnp.concatenate([trained[path], frozen[path]])[order]
    else:
      leaves[path] = trained[path] if path in trained else frozen[path]
  return unflatten(leaves)
