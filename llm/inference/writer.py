"""A checkpoint continues prompts."""

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
from llm.core import Params, UserError, next_power_of_two, round_up
from llm.data import batches
from llm.models import decoding, precision, resolve, transformer
from llm.models.architecture import kv_heads_of, padded_vocab
from llm.models.decoding import Sampling
from llm.training import step as step_lib
from llm.training.experiment import Bundle

CHUNK = 16  # tokens between two looks at the text, where a caller reads along or a stop may end it


@dataclasses.dataclass(frozen=True)
class Written:
  """The text that a checkpoint wrote after one prompt.

  ended: what ended it: `end` (the end token), `stop` (a stop text) or `length`. choices: the
  likeliest tokens with their probabilities, at each step.
  """

  text: str
  tokens: list[int]
  ended: str
  choices: list[list[tuple[int, float]]]


def _mesh(config: ModelConfig) -> jax.sharding.Mesh:
  """A mesh of this process's devices, as many as divide the heads, feed-forward and vocabulary."""
  devices = jax.local_devices()
  count = math.gcd(
    kv_heads_of(config), config.mlp_dim, padded_vocab(config.vocab_size), len(devices)
  )
  return sharding.make_mesh(MeshConfig(data=1, tensor=count), devices[:count])


class Writer:
  """A checkpoint that is ready to write.

  A program is compiled once for each number of rows and each bucket of prompt lengths. Raises
  UserError if the checkpoint is an encoder or its vocabulary has no end token.
  """

  def __init__(self, bundle: Bundle):
    model = bundle.config.model
    kind = models.facts(model).kind
    if kind == "encoder":
      raise UserError(
        f"{model.name} is an encoder and does not write; give a --prompt with [MASK] to be filled"
      )
    self.tokenizer = bundle.tokenizer
    self.tokenizer.require("eos")
    self.pad = max(self.tokenizer.pad, 0)
    self.has_encoder = kind == "encoder_decoder"
    self.dtype_is_auto = model.dtype == "auto"
    merged = dataclasses.replace(model, lora_rank=0, attention="reference")
    self.config = resolve.resolved(merged, 0, jax.default_backend(), trains=False)
    self.mesh = _mesh(self.config)
    self.host_params = transformer.unstacked(adapters.merge(bundle.params, model.lora_alpha))
    shardings = decoding.shardings(self.mesh)
    self.start = jax.jit(decoding.start, static_argnums=(0, 3, 4, 5), out_shardings=shardings)
    self.advance = jax.jit(
      decoding.advance, static_argnums=(0, 4, 5, 6), donate_argnums=2, out_shardings=shardings
    )

  @property
  def on_one_cpu(self) -> bool:
    """Whether it writes on one CPU device, where a single row has a form of its own."""
    return self.mesh.size == 1 and jax.default_backend() == "cpu"

  @functools.cached_property
  def params(self) -> Params:
    """The parameters on the mesh."""
    return jax.device_put(self.host_params, sharding.shardings(self.host_params, self.mesh))

  @functools.cached_property
  def for_one_row(self) -> tuple[ModelConfig, Params]:
    """(config, parameters) that write one row on one CPU device fastest.

    Every token reads every weight once. Half the bytes take half the time where the CPU can
    multiply bfloat16 numbers, even where its bfloat16 products of many rows are not faster. So a
    single row may be written in bfloat16, while many rows are written in the type of training.
    """
    narrow = self.dtype_is_auto and precision.native_bfloat16()
    name = "bfloat16_operands" if narrow else self.config.dtype
    config = dataclasses.replace(self.config, dtype=name)
    dtype = precision.of(config).operands
    prepared = jax.jit(decoding.for_one_row, static_argnums=1)(self.host_params, dtype)
    return config, jax.device_put(prepared, NamedSharding(self.mesh, P()))

  def write(
    self,
    prompts: Sequence[str | list[int]],
    max_tokens: int,
    sampling: Sampling = Sampling(),
    seed: int = 0,
    stops: Sequence[str] = (),
    on_progress: Callable[[list[str]], None] | None = None,
  ) -> list[Written]:
    """Continues each prompt, a text or its ids, by `max_tokens` tokens at most.

    stops: texts at which writing ends. on_progress: is called with all texts so far, every CHUNK
    tokens. Raises UserError if a prompt is empty or too long.
    """
    ids = [self._encoded(prompt, max_tokens) for prompt in prompts]
    batch, slots = self.batch(ids, max_tokens)
    if self.on_one_cpu and len(ids) == 1:
      config, params = self.for_one_row
    else:
      config, params = self.config, self.params

    def run(program: Callable, *args: Any) -> decoding.Writing:
      return step_lib.one_at_a_time(program)(config, params, *args)

    with jax.set_mesh(self.mesh):
      key = jax.random.key(seed)
      writing = run(self.start, batch, slots, round_up(max_tokens, 64), self.pad, key)
      return self._advanced(run, writing, max_tokens, sampling, stops, on_progress)

  def _encoded(self, prompt: str | list[int], max_tokens: int) -> list[int]:
    """The ids of a prompt. Raises UserError if it is empty or too long."""
    ids = self.tokenizer.encode([prompt])[0] if isinstance(prompt, str) else prompt
    if not ids:
      raise UserError(f"the prompt {prompt!r} is empty: give it a word at least")
    if self.has_encoder:
      return [*ids, self.tokenizer.eos]
    if len(ids) + max_tokens > self.config.max_length:
      raise UserError(
        f"the prompt has {len(ids)} tokens and --max_tokens={max_tokens} more do not fit the "
        f"model's {self.config.max_length} positions"
      )
    return ids

  def batch(self, prompts: Sequence[Sequence[int]], max_tokens: int) -> tuple[dict, int]:
    """(the prompts as a batch, the slots that the cache needs).

    Lengths are rounded up to powers of two and slots to multiples of 64, so that few programs are
    compiled.
    """
    length = max(16, next_power_of_two(max(map(len, prompts))))
    batch = batches.of_texts(prompts, length, self.pad, padding_first=not self.has_encoder)
    cached = 1 if self.has_encoder else length
    return batch, round_up(max_tokens + cached, 64)

  def _advanced(
    self,
    run: Callable,
    writing: decoding.Writing,
    max_tokens: int,
    sampling: Sampling,
    stops: Sequence[str],
    on_progress: Callable[[list[str]], None] | None,
  ) -> list[Written]:
    """Writes until all rows have ended."""
    while True:
      steps = min(CHUNK if stops or on_progress else max_tokens, max_tokens - int(writing.count))
      writing = run(self.advance, writing, steps, self.tokenizer.eos, self.pad, sampling)
      count = int(writing.count)
      arrays = jax.device_get(
        (writing.tokens_BxN, writing.best_BxNxE, writing.odds_BxNxE, writing.finished_B)
      )
      texts = []
      for tokens_N, best_NxE, odds_NxE, finished in zip(*arrays):
        ids = [int(token) for token in tokens_N[:count]]
        texts.append(self._written(ids, best_NxE, odds_NxE, bool(finished), stops))
      if on_progress:
        on_progress([written.text for written in texts])
      if count >= max_tokens or all(written.ended != "length" for written in texts):
        return texts

  def _written(
    self,
    ids: list[int],
    best_NxE: np.ndarray,
    odds_NxE: np.ndarray,
    finished: bool,
    stops: Sequence[str],
  ) -> Written:
    """The text of one row, up to its end token or its first stop text."""
    ended = "length"
    if finished:
      ids = ids[: ids.index(self.tokenizer.eos)]
      ended = "end"
    text = self.tokenizer.decode(ids)
    if places := [text.find(stop) for stop in stops if stop in text]:
      text = text[: min(places)]
      ended = "stop"
      ids = next(ids[:n] for n in range(len(ids) + 1) if self._has_any(stops, ids[:n]))
      finished = False
    choices = []
    for best_E, odds_E in zip(best_NxE[: len(ids) + finished], odds_NxE):
      choices.append(list(zip(best_E.tolist(), odds_E.tolist())))
    return Written(text, ids, ended, choices)

  def _has_any(self, stops: Sequence[str], ids: list[int]) -> bool:
    text = self.tokenizer.decode(ids)
    return any(stop in text for stop in stops)


def in_batches(bundle: Bundle, rows: int) -> Callable[[Sequence[str], int], list[str]]:
  """A function write(prompts, max_tokens) -> texts that writes greedily, `rows` prompts at a time.

  Prompts of similar length are written together.
  """
  writer = Writer(bundle)

  def write(prompts: Sequence[str], max_tokens: int) -> list[str]:
    texts = [""] * len(prompts)
    by_length = sorted(range(len(prompts)), key=lambda number: len(prompts[number]))
    firsts = range(0, len(by_length), rows)
    for first in tqdm.tqdm(firsts, desc="writing", unit=" batches", disable=None):
      numbers = by_length[first : first + rows]
      # Every batch has the same number of rows, so that one program serves all.
      fillers = [prompts[numbers[0]]] * (rows - len(numbers))
      batch = writer.write([prompts[number] for number in numbers] + fillers, max_tokens)
      for number, written in zip(numbers, batch):
        texts[number] = written.text
    return texts

  return write
