"""Rows of an encoder-decoder: (input, target) pairs after one another, each a segment of its own."""

import math
from typing import Iterable

import numpy as np


def row(
  pairs: Iterable[tuple[np.ndarray, np.ndarray]], input_length: int, target_length: int, pad: int
) -> dict[str, np.ndarray]:
  """One row of a batch: inputs S, targets T, and what the decoder sees, the targets one later.

  The decoder starts every target with `pad`, as T5 does.
  """
  out = {
    "tokens": np.full(input_length, pad, np.int32),
    "decoder_tokens": np.full(target_length, pad, np.int32),
  }
  out |= {k: np.zeros(input_length, np.int32) for k in ("segments", "positions")}
  out |= {
    k: np.zeros(target_length, np.int32)
    for k in ("decoder_segments", "decoder_positions", "targets")
  }
  here, there = 0, 0
  for number, (given, wanted) in enumerate(pairs, 1):
    inputs, targets = slice(here, here + len(given)), slice(there, there + len(wanted))
    out["tokens"][inputs], out["segments"][inputs] = given, number
    out["positions"][inputs] = np.arange(len(given))
    out["targets"][targets], out["decoder_segments"][targets] = wanted, number
    out["decoder_positions"][targets] = np.arange(len(wanted))
    out["decoder_tokens"][there + 1 : there + len(wanted)] = wanted[:-1]
    here, there = here + len(given), there + len(wanted)
  return {**out, "weights": (out["decoder_segments"] > 0).astype(np.float32)}


def sizes(
  inputs: np.ndarray, targets: np.ndarray, input_length: int, target_length: int
) -> np.ndarray:
  """What pairs take of a row, in tokens of the input, so that neither side overflows."""
  scaled = [math.ceil(n * input_length / target_length) for n in targets]
  return np.maximum(inputs, scaled)
