"""Rows of an encoder-decoder: (input, target) pairs after one another, each a segment of its own."""

import math
from typing import Sequence

import jax
import numpy as np

from llm.data import packing


def row(
  pairs: Sequence[tuple[np.ndarray, np.ndarray]], input_length: int, target_length: int, pad: int
) -> dict[str, np.ndarray]:
  """One row of a batch: inputs S, targets T, and what the decoder sees, the targets one later.

  The decoder starts every target with `pad`, as T5 does.
  """
  inputs, _ = packing.lay_out([{"tokens": given} for given, _ in pairs], input_length, pad)
  seen = [{"tokens": np.r_[pad, target[:-1]], "targets": target} for _, target in pairs]
  decoder, _ = packing.lay_out(seen, target_length, pad)
  targets = decoder.pop("targets")
  weights = (decoder["segments"] > 0).astype(np.float32)
  decoder = {f"decoder_{name}": array for name, array in decoder.items()}
  return {**inputs, **decoder, "targets": targets, "weights": weights}


def row_spec(input_length: int, target_length: int) -> dict[str, jax.ShapeDtypeStruct]:
  """The arrays of such a row."""
  inputs = ("tokens", "segments", "positions")
  targets = ("decoder_tokens", "decoder_segments", "decoder_positions", "targets")
  return {
    **{name: jax.ShapeDtypeStruct((input_length,), np.int32) for name in inputs},
    **{name: jax.ShapeDtypeStruct((target_length,), np.int32) for name in targets},
    "weights": jax.ShapeDtypeStruct((target_length,), np.float32),
  }


def sizes(
  inputs: np.ndarray, targets: np.ndarray, input_length: int, target_length: int
) -> np.ndarray:
  """What pairs take of a row, in tokens of the input, so that neither side overflows."""
  scaled = [math.ceil(n * input_length / target_length) for n in targets]
  return np.maximum(inputs, scaled)
