"""Names that every file shares. It imports no other file of this package.

Dimension legend, used as suffixes (`tokens_BxT`, `kernel_DxHxK`):

  B batch rows          T target or token position   S source (key) position
  M masked slots a row  D model width                H attention heads
  E embedding width     G heads of keys and values R rows of predictions or of answers
  K head width          F feed-forward width         V vocabulary, padded to a multiple of 128
  L layers              C classes                    N examples of a row, or a number of something
                                                       named beside it

A `Batch` is a dict of fixed-shape arrays of B rows:

  tokens, segments, positions  BxT int32; segment 0 is padding, 1.. are a packed row's documents
  types                        BxT int32, where the model has token types
  targets, weights             BxT, causal language modelling
  advantages, sampled_losses, reference_losses   BxT, answers that the model wrote: what each token
                               earned, and minus its log-probability when it was drawn and under
                               the reference
  masked_positions, masked_targets, masked_weights   BxM, masked language modelling
  firsts                       BxN int32, where each example of a row begins; example n is segment
                               n + 1; an empty slot has weight 0
  next_sentence, pair_weights  BxN int32 and float32; next_sentence is 1 where the second part
                               follows the first
  labels, label_weights        BxN, classification (int32) and regression (float32)
  decoder_tokens, decoder_segments, decoder_positions   BxT, where an encoder reads S tokens and a
                               decoder writes the T `targets`; a target and its input have the same
                               segment number

An objective may add arrays of its own.
"""

import warnings
from typing import Any, Iterable, Mapping

import flax.struct
import jax
from flax import traverse_util

Batch = Mapping[str, Any]  # name -> array: of NumPy on the host, of JAX on devices
Params = dict[str, Any]  # nested
Leaves = dict[str, Any]  # path -> parameter

# Part of the path of a stacked leaf. Such a leaf holds all layers along its first axis.
STACKED = "/layers/"


class UserError(Exception):
  """Bad input or settings. A command prints it in one line and exits with status 2."""


class Diverged(UserError):
  """A run whose loss, or another figure of a step, is not finite."""


class InputWarning(UserError, UserWarning):
  """Input that is accepted though it is surely a mistake. With --strict, an error."""


def warn(message: str) -> None:
  """Says in one line that some input is surely a mistake. Every such warning goes through here.

  A command prints each line once. With --strict, InputWarning is raised in its place.
  """
  warnings.warn(message, InputWarning, stacklevel=2)


class TrainState(flax.struct.PyTreeNode):
  """The state of a run, which a training step maps to the next one.

  trained, frozen: path -> array. No step changes the frozen ones.
  """

  step: jax.Array
  trained: Leaves
  frozen: Leaves
  opt_state: Any


def flatten(tree: Params) -> Leaves:
  """Nested parameters -> {"backbone/layers/mlp/up/kernel": leaf}."""
  return traverse_util.flatten_dict(tree, sep="/")


def unflatten(leaves: Leaves) -> Params:
  """The inverse of `flatten`."""
  return traverse_util.unflatten_dict(leaves, sep="/")


def virtual_paths(path: str, leaf: Any, layers: Iterable[int] | None = None) -> list[str]:
  """One path for every layer of a stacked leaf; for any other leaf, its own path.

  layers: the numbers of those that the leaf holds; None is all layers.

  The leaf `backbone/layers/mlp/up/kernel` has the paths `backbone/layers/0/mlp/up/kernel`,
  `backbone/layers/1/mlp/up/kernel` and so on. Rules match these, so they can address each layer.
  """
  if STACKED not in path:
    return [path]
  numbers = range(leaf.shape[0]) if layers is None else layers
  return [path.replace(STACKED, f"{STACKED}{number}/") for number in numbers]


def round_up(n: int, multiple: int) -> int:
  """The smallest multiple of `multiple` that is at least n."""
  return -(-n // multiple) * multiple


def next_power_of_two(n: int) -> int:
  """n, at least 1, rounded up to a power of two."""
  return 1 << (n - 1).bit_length()


def first_line(error: BaseException) -> str:
  """The first line of an exception's message, or its repr where the message is empty."""
  message = str(error)
  if isinstance(error, KeyError) and error.args:
    message = str(error.args[0])  # str(error) would quote it
  lines = message.strip().splitlines() or [repr(error)]
  return lines[0].strip()
