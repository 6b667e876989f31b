"""Rows of an encoder-decoder: several (input, target) pairs a row, each a segment of its own."""

import math
from typing import Sequence

import jax
import numpy as np

from llm.data import packing


def row(
  pairs: Sequence[tuple[np.ndarray, np.ndarray]], input_length: int, target_length: int, pad: int
) -> dict[str, np.ndarray]:
  """One row: S input tokens, T targets, and the T tokens that the decoder reads.

  The decoder reads each target shifted by one position, with `pad` first, as in T5.
  """
  inputs, _ = packing.lay_out([{"tokens": tokens} for tokens, _ in pairs], input_length, pad)
  shifted = [{"tokens": np.r_[pad, target[:-1]], "targets": target} for _, target in pairs]
  decoder, _ = packing.lay_out(shifted, target_length, pad)
  targets = decoder.pop("targets")
  weights = (decoder["segments"] > 0).astype(np.float32)
  decoder = {f"decoder_{name}": array for name, array in decoder.items()}
  return {**inputs, **decoder, "targets": targets, "weights": weights}


def row_spec(input_length: int, target_length: int) -> dict[str, jax.ShapeDtypeStruct]:
  """The shapes and types of the arrays that `row` gives."""
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
  """The size of each pair in a row, in input tokens. `inputs` and `targets` are its two lengths.

  Targets are scaled by the ratio of the row lengths: pairs whose sizes fit a row overflow neither
  side.
  """
  scaled = [math.ceil(n * input_length / target_length) for n in targets]
  return np.maximum(inputs, scaled)
