"""A checkpoint that writes after prompts, or fills the masks of a text."""

import dataclasses
import functools
import math
from typing import Sequence

import jax
import numpy as np
import tqdm
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from llm import sharding
from llm.checkpoints import adapters
from llm.config import MeshConfig, ModelConfig
from llm.core import UserError, round_up
from llm.models import decoding, heads, precision, transformer
from llm.models.decoding import Sampling
from llm.training import step as step_lib
from llm.training.experiment import Bundle

CHUNK = 16  # tokens between two looks at what was written


@dataclasses.dataclass(frozen=True)
class Written:
  """What a checkpoint wrote after one prompt, and why it ended: end (of text), stop (a stop string), length."""

  text: str
  tokens: list[int]
  ended: str
  choices: list[
    list[tuple[int, float]]
  ]  # the likeliest tokens and their probabilities at each step


def _mesh(config: ModelConfig) -> jax.sharding.Mesh:
  """As many of this process's devices as divide what they share: heads, feed-forward, vocabulary."""
  devices = jax.local_devices()
  count = math.gcd(
    config.num_kv_heads or config.num_heads,
    config.mlp_dim,
    transformer.padded_vocab(config.vocab_size),
    len(devices),
  )
  return sharding.make_mesh(MeshConfig(data=1, tensor=count), devices[:count])


class Writer:
  """A checkpoint ready to write. Programs are compiled once for a bucket of prompt lengths and rows."""

  def __init__(self, bundle: Bundle):
    self.config, self.tokenizer = bundle.config.model, bundle.tokenizer
    if self.config.name == "bert":
      raise UserError("a BERT does not write; give a --prompt with [MASK] to be filled")
    self.tokenizer.require("eos")
    self.config = dataclasses.replace(self.config, lora_rank=0)
    self.pad, self.mesh = max(self.tokenizer.pad, 0), _mesh(self.config)
    self.layers = transformer.unstacked(
      adapters.merge(bundle.params, bundle.config.model.lora_alpha)
    )
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
    narrow = self.config.dtype == "auto" and precision.native_bfloat16()
    name = "bfloat16_operands" if narrow else self.config.dtype
    config = dataclasses.replace(self.config, dtype=name)
    dtype = precision.of(config).operands
    prepared = jax.jit(decoding.for_one_row, static_argnums=1)(self.layers, dtype)
    return config, jax.device_put(prepared, NamedSharding(self.mesh, P()))

  def _batch(self, prompts: Sequence[Sequence[int]], most: int) -> tuple[dict, int]:
    """Prompts as one batch in a bucket of lengths, and the slots of the cache."""
    longest = max(map(len, prompts))
    length = max(16, 1 << (longest - 1).bit_length())
    left = self.config.name != "t5"  # a decoder's prompts end in one slot
    batch = {"tokens": np.full((len(prompts), length), self.pad, np.int32)}
    batch |= {k: np.zeros((len(prompts), length), np.int32) for k in ("segments", "positions")}
    for row, ids in enumerate(prompts):
      here = slice(length - len(ids), length) if left else slice(0, len(ids))
      batch["tokens"][row, here], batch["segments"][row, here] = ids, 1
      batch["positions"][row, here] = np.arange(len(ids))
    return batch, round_up(most + (length if left else 1), 64)

  def write(
    self,
    prompts: Sequence[str | list[int]],
    most: int,
    sampling: Sampling = Sampling(),
    seed: int = 0,
    stops: Sequence[str] = (),
    seen=None,
  ) -> list[Written]:
    """Continues each prompt, a text or its ids. seen: called with the texts so far, every CHUNK tokens. Raises UserError."""
    ids = [
      self.tokenizer.encode([prompt])[0] if isinstance(prompt, str) else prompt
      for prompt in prompts
    ]
    for prompt, found in zip(prompts, ids):
      if not found:
        raise UserError(f"the prompt {prompt!r} is empty: give it a word at least")
      if len(found) + most > self.config.max_length and self.config.name != "t5":
        raise UserError(
          f"the prompt has {len(found)} tokens and --max_tokens={most} more do not fit the model's "
          f"{self.config.max_length} positions"
        )
    if self.config.name == "t5":
      ids = [[*i, self.tokenizer.eos] for i in ids]
    batch, slots = self._batch(ids, most)
    new = round_up(most, 64)
    on_cpu = self.mesh.size == 1 and jax.default_backend() == "cpu"
    config, params = self.for_one_row if on_cpu and len(ids) == 1 else (self.config, self.params)
    run = lambda program, *args: step_lib.one_at_a_time(program)(config, params, *args)
    with jax.set_mesh(self.mesh):
      writing = run(self.start, batch, slots, new, self.pad, jax.random.key(seed))
      return self._advanced(run, writing, most, sampling, stops, seen)

  def _advanced(self, run, writing, most: int, sampling: Sampling, stops, seen) -> list[Written]:
    while True:
      left = min(CHUNK if stops or seen else most, most - int(writing.count))
      writing = run(self.advance, writing, left, self.tokenizer.eos, self.pad, sampling)
      found = jax.device_get(
        (writing.tokens_BxN, writing.best_BxNxE, writing.odds_BxNxE, writing.finished_B)
      )
      done = [self._written(*row, int(writing.count), stops) for row in zip(*found)]
      if seen:
        seen([w.text for w in done])
      if int(writing.count) >= most or all(w.ended != "length" for w in done):
        return done

  def _written(self, tokens, best, odds, finished: bool, count: int, stops) -> Written:
    ids = [int(t) for t in tokens[:count]]
    ended = "length"
    if finished:
      ids, ended = ids[: ids.index(self.tokenizer.eos)], "end"
    text = self.tokenizer.decode(ids)
    if places := [text.find(s) for s in stops if s in text]:
      text, ended = text[: min(places)], "stop"
    choices = [
      list(zip(map(int, b), map(float, o))) for b, o in zip(best[: len(ids) + finished], odds)
    ]
    return Written(text, ids, ended, choices)


def in_batches(bundle: Bundle, rows: int):
  """write(prompts, most tokens) -> texts, greedily, `rows` prompts at a time, those of like length together."""
  made = Writer(bundle)

  def write(prompts: Sequence[str], most: int) -> list[str]:
    out = [""] * len(prompts)
    order = sorted(range(len(prompts)), key=lambda n: len(prompts[n]))
    for start in tqdm.tqdm(
      range(0, len(order), rows), desc="writing", unit=" batches", disable=None
    ):
      part = order[start : start + rows]
      filled = [prompts[n] for n in part] + [prompts[part[0]]] * (
        rows - len(part)
      )  # one shape for all
      for n, found in zip(part, made.write(filled, most)):
        out[n] = found.text
    return out

  return write


def fill(bundle: Bundle, text: str, count: int = 5) -> list[list[tuple[str, float]]]:
  """The likeliest pieces for each [MASK] of a text, with their probabilities. Raises UserError."""
  tokenizer, config = bundle.tokenizer, bundle.config.model
  tokenizer.require("cls", "sep", "mask")
  if bundle.config.objective["name"] != "masked_lm" or "transform" not in bundle.params.get(
    "head", {}
  ):
    raise UserError("the checkpoint has no masked-language-model head to fill masks with")
  parts = tokenizer.encode(text.split("[MASK]"))
  ids = [
    tokenizer.cls,
    *parts[0],
    *(t for part in parts[1:] for t in (tokenizer.mask, *part)),
    tokenizer.sep,
  ]
  if len(ids) > config.max_length:
    raise UserError(
      f"the prompt has {len(ids)} tokens, more than the model's {config.max_length} positions"
    )
  if len(parts) < 2:
    raise UserError("--prompt has no [MASK] to fill")
  row = lambda values: np.array(values, np.int32)[None]
  places = np.flatnonzero(np.array(ids) == tokenizer.mask)
  batch = {
    "tokens": row(ids),
    "segments": row([1] * len(ids)),
    "positions": row(range(len(ids))),
    "types": row([0] * len(ids)),
    "masked_positions": row(np.repeat(places, config.vocab_size)),
    "masked_targets": row(np.tile(np.arange(config.vocab_size), len(places))),
  }
  model = heads.Model(bundle.model.backbone, heads.MaskedLMHead(config, False))
  params = {
    "backbone": bundle.params["backbone"],
    "head": {
      k: v for k, v in bundle.params["head"].items() if k in ("transform", "transform_norm", "lm")
    },
  }
  losses = jax.jit(functools.partial(model.apply, train=False))({"params": params}, batch)["losses"]
  odds = np.exp(-np.asarray(losses)).reshape(len(places), config.vocab_size)
  return [
    [(tokenizer.pieces[i], float(of_mask[i])) for i in np.argsort(-of_mask)[:count]]
    for of_mask in odds
  ]
