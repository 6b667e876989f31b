"""Names that every file shares. Imports nothing of ours.

Dimension legend, used as suffixes (`tokens_BxT`, `kernel_DxHxK`):

  B batch rows          T target or token position   S source (key) position
  M masked slots a row  D model width                H attention heads
  E embedding width
  K head width          F feed-forward width         V vocabulary, padded to a multiple of 128
  L layers              C classes                    N examples of a row, or a number of something
                                                       named beside it

A `Batch` is a dict of fixed-shape arrays, B rows each:

  tokens, segments, positions  BxT int32; segment 0 is padding, 1.. the documents of a packed row
  types                        BxT int32, where the model has token types
  targets, weights             BxT, causal language modelling
  masked_positions, masked_targets, masked_weights   BxM, masked language modelling
  firsts                       BxN int32, where each example of a row begins; example n is segment
                               n + 1, and slots left empty have no weight
  next_sentence, pair_weights  BxN int32 and float32, 1 where the second part follows the first
  labels, label_weights        BxN, classification (int32) and regression (float32)
  decoder_tokens, decoder_segments, decoder_positions   BxT, where an encoder reads BxS and a decoder writes
                               `targets`, T of them; segments of one number belong together
"""

from typing import Any, Mapping

import flax.struct
import jax
from flax import traverse_util

Batch = Mapping[str, Any]  # of arrays: of NumPy on the host, of JAX on devices
Params = dict[str, Any]
Leaves = dict[str, Any]  # parameters by their path

STACKED = "/layers/"  # in the path of a leaf that holds all layers of a stack, along its first axis


class UserError(Exception):
  """A mistake of the user's: printed as one line, without a traceback, exit status 2."""


class TrainState(flax.struct.PyTreeNode):
  """All that a training step changes. `trained` and `frozen` are path -> array dicts."""

  step: jax.Array
  trained: Leaves
  frozen: Leaves
  opt_state: Any


def flatten(tree: Params) -> dict[str, Any]:
  """Nested parameters -> {"backbone/layers/mlp/up/kernel": leaf}."""
  return traverse_util.flatten_dict(tree, sep="/")


def unflatten(leaves: dict[str, Any]) -> Params:
  """The inverse of `flatten`."""
  return traverse_util.unflatten_dict(leaves, sep="/")


def virtual_paths(path: str, leaf) -> list[str]:
  """The path of every layer of a stacked leaf; the path itself of any other.

  Those of `backbone/layers/mlp/up/kernel` are `backbone/layers/0/mlp/up/kernel`, .. : by them, rules
  address layers one by one.
  """
  if STACKED not in path:
    return [path]
  return [path.replace(STACKED, f"{STACKED}{i}/") for i in range(leaf.shape[0])]


def round_up(n: int, multiple: int) -> int:
  """The smallest multiple of `multiple` that is at least n."""
  return -(-n // multiple) * multiple


def first_line(error: BaseException) -> str:
  """What an exception says, shortly."""
  text = (
    str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
  )  # str of a KeyError is quoted
  return (text.strip().splitlines() or [repr(error)])[0].strip()
