"""A checkpoint that writes after prompts."""

import dataclasses
import functools
import math
from typing import Any, Callable, Sequence

import jax
import numpy as np
import tqdm
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from llm import models, sharding
from llm.checkpoints import adapters
from llm.config import MeshConfig, ModelConfig
from llm.core import UserError, round_up
from llm.models import decoding, precision, resolve, transformer
from llm.models.architecture import kv_heads_of, padded_vocab
from llm.models.decoding import Sampling
from llm.training import step as step_lib
from llm.training.experiment import Bundle

CHUNK = 16  # tokens between two looks at what was written


@dataclasses.dataclass(frozen=True)
class Written:
  """What a checkpoint wrote after one prompt.

  ended: by `end` (of text), `stop` (a stop string) or `length`. choices: the likeliest tokens and
  their probabilities at each step.
  """

  text: str
  tokens: list[int]
  ended: str
  choices: list[list[tuple[int, float]]]


def _mesh(config: ModelConfig) -> jax.sharding.Mesh:
  """As many of this process's devices as divide what they share: heads, feed-forward, vocabulary."""
  devices = jax.local_devices()
  count = math.gcd(
    kv_heads_of(config), config.mlp_dim, padded_vocab(config.vocab_size), len(devices)
  )
  return sharding.make_mesh(MeshConfig(data=1, tensor=count), devices[:count])


class Writer:
  """A checkpoint ready to write. Programs are compiled once a bucket of prompt lengths and rows."""

  def __init__(self, bundle: Bundle):
    asked = bundle.config.model
    kind = models.facts(asked).kind
    if kind == "encoder":
      raise UserError(
        f"{asked.name} is an encoder and does not write; give a --prompt with [MASK] to be filled"
      )
    self.tokenizer = bundle.tokenizer
    self.tokenizer.require("eos")
    self.pad = max(self.tokenizer.pad, 0)
    self.reads_first = kind == "encoder_decoder"
    self.any_type = asked.dtype == "auto"
    merged = dataclasses.replace(asked, lora_rank=0, attention="reference")
    self.config = resolve.resolved(merged, 0, jax.default_backend(), trains=False)
    self.mesh = _mesh(self.config)
    self.layers = transformer.unstacked(adapters.merge(bundle.params, asked.lora_alpha))
    placed = decoding.shardings(self.mesh)
    self.start = jax.jit(decoding.start, static_argnums=(0, 3, 4, 5), out_shardings=placed)
    self.advance = jax.jit(
      decoding.advance, static_argnums=(0, 4, 5, 6), donate_argnums=2, out_shardings=placed
    )

  @functools.cached_property
  def params(self) -> dict:
    """The parameters on the mesh."""
    return jax.device_put(self.layers, sharding.shardings(self.layers, self.mesh))

  @functools.cached_property
  def for_one_row(self) -> tuple[ModelConfig, dict]:
    """(config, parameters) that write one row on one CPU device fastest.

    A token reads every weight once, so half the bytes are half the time where the CPU can multiply
    bfloat16 numbers, even where its bfloat16 products of many rows are not faster. Many rows are
    written in the type of training.
    """
    narrow = self.any_type and precision.native_bfloat16()
    name = "bfloat16_operands" if narrow else self.config.dtype
    config = dataclasses.replace(self.config, dtype=name)
    dtype = precision.of(config).operands
    prepared = jax.jit(decoding.for_one_row, static_argnums=1)(self.layers, dtype)
    return config, jax.device_put(prepared, NamedSharding(self.mesh, P()))

  def write(
    self,
    prompts: Sequence[str | list[int]],
    most: int,
    sampling: Sampling = Sampling(),
    seed: int = 0,
    stops: Sequence[str] = (),
    seen: Callable[[list[str]], None] | None = None,
  ) -> list[Written]:
    """Continues each prompt, a text or its ids, by `most` tokens at most.

    stops: texts at which writing ends. seen: called with the texts so far, every CHUNK tokens.
    Raises UserError on a prompt that is empty or too long.
    """
    ids = [self._encoded(prompt, most) for prompt in prompts]
    batch, slots = self._batch(ids, most)
    on_cpu = self.mesh.size == 1 and jax.default_backend() == "cpu"
    alone = on_cpu and len(ids) == 1
    config, params = self.for_one_row if alone else (self.config, self.params)

    def run(program: Callable, *args: Any) -> decoding.Writing:
      return step_lib.one_at_a_time(program)(config, params, *args)

    with jax.set_mesh(self.mesh):
      key = jax.random.key(seed)
      writing = run(self.start, batch, slots, round_up(most, 64), self.pad, key)
      return self._advanced(run, writing, most, sampling, stops, seen)

  def _encoded(self, prompt: str | list[int], most: int) -> list[int]:
    """The ids of a prompt, checked."""
    ids = self.tokenizer.encode([prompt])[0] if isinstance(prompt, str) else prompt
    if not ids:
      raise UserError(f"the prompt {prompt!r} is empty: give it a word at least")
    if self.reads_first:
      return [*ids, self.tokenizer.eos]
    if len(ids) + most > self.config.max_length:
      raise UserError(
        f"the prompt has {len(ids)} tokens and --max_tokens={most} more do not fit the model's "
        f"{self.config.max_length} positions"
      )
    return ids

  def _batch(self, prompts: Sequence[Sequence[int]], most: int) -> tuple[dict, int]:
    """Prompts as one batch in a bucket of lengths, and the slots of the cache."""
    longest = max(map(len, prompts))
    length = max(16, 1 << (longest - 1).bit_length())
    shape = (len(prompts), length)
    batch = {name: np.zeros(shape, np.int32) for name in ("segments", "positions")}
    batch["tokens"] = np.full(shape, self.pad, np.int32)
    for row, ids in enumerate(prompts):
      # A decoder's prompts end in one slot.
      here = slice(0, len(ids)) if self.reads_first else slice(length - len(ids), length)
      batch["tokens"][row, here] = ids
      batch["segments"][row, here] = 1
      batch["positions"][row, here] = np.arange(len(ids))
    return batch, round_up(most + (1 if self.reads_first else length), 64)

  def _advanced(
    self,
    run: Callable,
    writing: decoding.Writing,
    most: int,
    sampling: Sampling,
    stops: Sequence[str],
    seen: Callable[[list[str]], None] | None,
  ) -> list[Written]:
    """Writes on until all rows have ended."""
    while True:
      left = min(CHUNK if stops or seen else most, most - int(writing.count))
      writing = run(self.advance, writing, left, self.tokenizer.eos, self.pad, sampling)
      of_rows = jax.device_get(
        (writing.tokens_BxN, writing.best_BxNxE, writing.odds_BxNxE, writing.finished_B)
      )
      texts = [self._written(*of_row, int(writing.count), stops) for of_row in zip(*of_rows)]
      if seen:
        seen([written.text for written in texts])
      if int(writing.count) >= most or all(written.ended != "length" for written in texts):
        return texts

  def _written(
    self,
    tokens: np.ndarray,
    best: np.ndarray,
    odds: np.ndarray,
    finished: bool,
    count: int,
    stops: Sequence[str],
  ) -> Written:
    """What stands in one row, up to where it ended."""
    ids = [int(token) for token in tokens[:count]]
    ended = "length"
    if finished:
      ids, ended = ids[: ids.index(self.tokenizer.eos)], "end"
    text = self.tokenizer.decode(ids)
    if places := [text.find(stop) for stop in stops if stop in text]:
      text, ended = text[: min(places)], "stop"
    choices = [
      list(zip(map(int, tokens), map(float, probabilities)))
      for tokens, probabilities in zip(best[: len(ids) + finished], odds)
    ]
    return Written(text, ids, ended, choices)


def in_batches(bundle: Bundle, rows: int) -> Callable[[Sequence[str], int], list[str]]:
  """write(prompts, most tokens) -> texts, greedily, `rows` prompts at a time.

  Prompts of like length are written together.
  """
  writer = Writer(bundle)

  def write(prompts: Sequence[str], most: int) -> list[str]:
    texts = [""] * len(prompts)
    by_length = sorted(range(len(prompts)), key=lambda number: len(prompts[number]))
    starts = range(0, len(by_length), rows)
    for start in tqdm.tqdm(starts, desc="writing", unit=" batches", disable=None):
      numbers = by_length[start : start + rows]
      same_shape = [prompts[numbers[0]]] * (rows - len(numbers))
      written = writer.write([prompts[number] for number in numbers] + same_shape, most)
      for number, one in zip(numbers, written):
        texts[number] = one.text
    return texts

  return write
