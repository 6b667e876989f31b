"""Writes with the parameters that a run is training, on the run's mesh (objectives/base.py: Actor).

The writing program and the training step are the same network in the same types. So the
log-probabilities of a sampled token are equal in both, to the last digits.
"""

import dataclasses
from typing import Any, Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from llm import sharding
from llm.config import ModelConfig
from llm.core import Batch, Leaves, Params, next_power_of_two, round_up
from llm.data import batches as batches_lib
from llm.data.tokenizer import Tokenizer
from llm.models import decoding, transformer
from llm.models.decoding import Sampling
from llm.objectives import base
from llm.sharding import BATCH, constrain
from llm.training import partition
from llm.training import step as step_lib
from llm.training.partition import FrozenMasks

STREAM = 0x5A3D  # parts the randomness of writing from that of dropout


def _on_mesh(writing: Any) -> Any:
  """Rows over the batch axes, and heads of keys and values over `tensor`."""

  def placed(array: jax.Array) -> jax.Array:
    if not array.ndim:
      return array
    return constrain(array, BATCH, "tensor") if array.ndim == 4 else constrain(array, BATCH)

  return jax.tree.map(placed, writing)


def write(
  config: ModelConfig,
  params: Params,
  batch: Batch,
  key: jax.Array,
  answers: int,
  max_tokens: int,
  eos: int,
  pad: int,
  sampling: Sampling,
) -> tuple[jax.Array, jax.Array]:
  """(tokens, their losses) of `answers` answers to each prompt of a batch, RxN with N = max_tokens.

  The prompts are read once each. batch: tokens, segments and positions, BxP, that all end in the
  last slot.
  """
  params = transformer.unstacked(params)
  slots = batch["tokens"].shape[1] + max_tokens
  writing = decoding.start(config, params, batch, slots, max_tokens, pad, key)
  rows = jax.tree.map(lambda a: jnp.repeat(a, answers, axis=0) if a.ndim else a, writing)
  rows = decoding.advance(config, params, _on_mesh(rows), jnp.int32(max_tokens), eos, pad, sampling)
  return rows.tokens_BxN, rows.losses_BxN


def row_count(rows: int, multiple: int) -> int:
  """`rows` rounded up, to one of eight sizes between two powers of two, and to a multiple."""
  rows = max(rows, 1)
  step = max(1, next_power_of_two(rows) // 16)
  return round_up(round_up(rows, step), multiple)


class Sampler:
  """The writing program of a run.

  config: with "auto" settled as for training. accum_steps: parts that a batch is computed in.
  reference: gives `losses` of a batch under the checkpoint that the run starts from.
  """

  def __init__(
    self,
    config: ModelConfig,
    tokenizer: Tokenizer,
    frozen_masks: FrozenMasks,
    mesh: Mesh,
    seed: int,
    accum_steps: int,
    reference: Callable[[Batch], jax.Array] | None = None,
  ):
    config = dataclasses.replace(config, attention="reference")
    self.tokenizer = tokenizer
    self.mesh = mesh
    self.seed = seed
    self.multiple = mesh.shape["data"] * mesh.shape["fsdp"] * accum_steps
    self.reference = reference

    def program(trained, frozen, batch, key, *settings):
      params = partition.merge(trained, frozen, frozen_masks)
      return write(config, params, batch, key, *settings)

    self.program = step_lib.one_at_a_time(jax.jit(program, static_argnums=range(4, 9)))

  def at(self, trained: Leaves, frozen: Leaves, step: int) -> "Actor":
    """The actor of a step, with these parameters."""
    return Actor(self, trained, frozen, step)


@dataclasses.dataclass(frozen=True)
class Actor:
  """What base.Actor asks for."""

  sampler: Sampler
  trained: Leaves
  frozen: Leaves
  step: int

  def write(
    self,
    prompts: Sequence[np.ndarray],
    answers: int,
    max_tokens: int,
    temperature: float,
    draw: int = 0,
  ) -> list[base.Answer]:
    sampler, tokenizer = self.sampler, self.sampler.tokenizer
    pad = max(tokenizer.pad, 0)
    # A power of two, so that few programs are compiled.
    length = next_power_of_two(max(map(len, prompts)))
    batch = batches_lib.of_texts(prompts, length, pad, padding_first=True)
    batch = batches_lib.place(batch, sampler.mesh)
    key = jax.random.fold_in(jax.random.key(sampler.seed), STREAM)
    key = jax.random.fold_in(jax.random.fold_in(key, self.step), draw)
    tokens_RxN, losses_RxN = sampler.program(
      self.trained,
      self.frozen,
      batch,
      key,
      answers,
      max_tokens,
      tokenizer.eos,
      pad,
      Sampling(temperature),
    )
    rows = zip(sharding.host_rows(tokens_RxN), sharding.host_rows(losses_RxN))
    return [_answer(tokens_N, losses_N, tokenizer.eos) for tokens_N, losses_N in rows]

  def rng(self, draw: int) -> np.random.Generator:
    return np.random.default_rng((self.sampler.seed, STREAM, self.step, draw))

  def place(self, rows: Sequence[dict[str, np.ndarray]]) -> Batch:
    batch = batches_lib.stack(rows)
    count = row_count(len(rows), self.sampler.multiple)
    return batches_lib.place(batches_lib.pad_rows(batch, count), self.sampler.mesh)

  def reference_losses(self, batch: Batch) -> jax.Array:
    assert self.sampler.reference is not None, "an evaluation has no reference"
    return self.sampler.reference(batch)


def _answer(tokens_N: np.ndarray, losses_N: np.ndarray, eos: int) -> base.Answer:
  """The tokens up to the first end token, or all of them."""
  ends = np.flatnonzero(tokens_N == eos)
  length = ends[0] + 1 if len(ends) else len(tokens_N)
  return base.Answer(tokens_N[:length], losses_N[:length], bool(len(ends)))
