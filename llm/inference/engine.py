"""Continuous batching: requests are written together, and join and leave at any token.

One thread writes. While the devices write a token of every slot, it deals with the one before.
"""

import collections
import dataclasses
import functools
import threading
import traceback
from typing import Any, Callable, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from llm import sharding
from llm.core import Params, UserError, next_power_of_two
from llm.inference.growing_text import GrowingText
from llm.inference.writer import Writer
from llm.models import decoding, precision
from llm.models import slots as slots_lib
from llm.models.slots import Wishes
from llm.training import step as step_lib

LEAST_COLUMNS = 64  # of the ring
CONTEXT = 8  # tokens of a prompt, on which the text of those that follow depends
JOINS = 4  # prompts that are read between two tokens: all others wait for them


class Full(Exception):
  """As many requests wait as may wait."""


class Explained(NamedTuple):
  """A token that was written: its id, its log-probability in nats, and the likeliest ones.

  before: the tokens ahead of it, as many as its text depends on.
  """

  token: int
  logprob: float
  likeliest: list[tuple[int, float]]
  before: tuple[int, ...]


class Piece(NamedTuple):
  """What is new of an answer.

  tokens: written so far. ended: "" while it goes on, `stop`, `length`, or `error`.
  """

  text: str
  tokens: int
  explained: list[Explained]
  ended: str = ""


@dataclasses.dataclass
class Request:
  """A prompt to continue.

  on_piece: is called by the writing thread, for every new text if the request `streams`, else once,
  at the end. alternatives: how many of the likeliest tokens are reported; -1: no probabilities at
  all. goes_on: the text is that of the prompt, which goes on: it may begin with a space.
  """

  ids: list[int]
  max_tokens: int
  on_piece: Callable[[Piece], None]
  temperature: float = 0.0
  top_p: float = 1.0
  seed: int = 0
  stops: tuple[str, ...] = ()
  alternatives: int = -1
  streams: bool = False
  goes_on: bool = False
  cancelled: bool = False  # may be set by any thread: its slot is free at the next token


@dataclasses.dataclass
class _Answer:
  """A request in a slot."""

  request: Request
  text: GrowingText
  unsent: str = ""
  explained: list[Explained] = dataclasses.field(default_factory=list)


class Engine:
  """A checkpoint that answers many requests at once.

  rows: the slots of the program. waiting: how many requests may wait for one.
  """

  def __init__(self, writer: Writer, rows: int = 16, waiting: int = 64):
    if writer.has_encoder:
      raise UserError(f"{writer.config.name} reads with an encoder: it cannot be served in slots")
    self.writer = writer
    self.rows = rows
    self.limit = waiting
    self.waiting: collections.deque[Request] = collections.deque()
    self.answers: list[_Answer | None] = [None] * rows
    self.changed = threading.Condition()
    self.retired = False  # it takes no more requests
    self.closed = False
    # On a CPU each row of the ring costs, and a request is often alone: its ring has one row.
    self.rows_alone = 1 if writer.on_one_cpu else rows
    self.slots: Any = None
    self.wishes: Wishes | None = None
    self.params = _prepared(writer)
    shardings = slots_lib.shardings(writer.mesh)
    self._empty = jax.jit(slots_lib.empty, static_argnums=(0, 1, 2), out_shardings=shardings)
    self._enlarged = jax.jit(slots_lib.enlarged, static_argnums=(1, 2), out_shardings=shardings)
    self._join = jax.jit(
      slots_lib.join, static_argnums=0, donate_argnums=2, out_shardings=shardings
    )
    self._write = jax.jit(
      slots_lib.write, static_argnums=0, donate_argnums=2, out_shardings=(shardings, None)
    )
    self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
    self._thread.start()

  @property
  def ring(self) -> tuple[int, int]:
    """Rows and columns of the ring; none before the first request."""
    return (0, 0) if self.slots is None else self.slots.cache.segments_BxS.shape

  @property
  def busy(self) -> int:
    """Requests that wait or are being answered."""
    return len(self.waiting) + sum(answer is not None for answer in self.answers)

  def submit(self, *requests: Request):
    """Puts requests in the queue, all or none. Raises Full, or UserError if one is bad."""
    if len(requests) > self.rows + self.limit:
      raise UserError(
        f"{len(requests)} answers were asked for at once, and the server takes "
        f"{self.rows + self.limit} at most"
      )
    for request in requests:
      self.check(request.ids, request.max_tokens)
    with self.changed:
      if self.retired:  # another model has taken its place in memory just now
        raise Full("the model is being unloaded")
      self._forget_cancelled()
      free = self.rows - sum(answer is not None for answer in self.answers)
      if len(self.waiting) + len(requests) > self.limit + free:
        raise Full(f"{len(self.waiting)} requests wait already")
      self.waiting.extend(requests)
      self.changed.notify()

  def check(self, ids: list[int], max_tokens: int):
    """Raises UserError where a prompt is empty or too long."""
    if not ids:
      raise UserError("the prompt is empty: give it a word at least")
    if len(ids) + max_tokens > self.writer.config.max_length:
      raise UserError(
        f"the prompt has {len(ids)} tokens and {max_tokens} more do not fit the model's "
        f"{self.writer.config.max_length} positions"
      )

  def retire(self):
    """Takes no more requests. The thread ends when all that it has are answered."""
    with self.changed:
      self.retired = True
      self.changed.notify()

  def close(self):
    """Ends the thread after the token that it writes; requests that are left end as errors."""
    with self.changed:
      self.retired = self.closed = True
      self.changed.notify()
    self._thread.join()

  def _run(self):
    """Writes until the engine is closed."""
    in_progress = None  # the step that the devices write: (its arrays, who had its rows)
    while True:
      with self.changed:
        while not (self.retired or in_progress or self.busy):
          self.changed.wait()
        if self.closed or not (in_progress or self.busy):
          break
      try:
        with jax.set_mesh(self.writer.mesh):
          started = self._next_step()
          if in_progress:
            self._take(*in_progress)
          in_progress = started
      except Exception:  # a fault of ours or of the device ends these requests, not the server
        traceback.print_exc()
        in_progress = None
        self._fail()
    self._fail()

  def _fail(self):
    """Ends all requests as errors and forgets the ring."""
    with self.changed:
      left = [answer.request for answer in self.answers if answer] + list(self.waiting)
      self.answers = [None] * self.rows
      self.waiting.clear()
    self.slots, self.wishes = None, None
    for request in left:
      request.on_piece(Piece("", 0, [], "error"))

  def _next_step(self) -> tuple[Any, list[_Answer | None]] | None:
    """Lets the waiting join, and starts to write a token of every row; None if nobody is there."""
    self._drop_cancelled()
    self._admit()
    if not any(self.answers):
      return None
    if self.wishes is None:
      self.wishes = jax.device_put(self._wishes())
    self.slots, step = self._call(self._write, self.slots, self.wishes)
    return step, list(self.answers)

  def _call(self, program: Callable, *args: Any) -> Any:
    """Runs a program of (config, parameters, ...)."""
    if self.writer.mesh.size > 1:
      program = step_lib.one_at_a_time(program)
    return program(self.writer.config, self.params, *args)

  def _drop_cancelled(self):
    for row, answer in enumerate(self.answers):
      if answer and answer.request.cancelled:
        self._leave(row)

  def _leave(self, row: int):
    self.answers[row] = None
    self.wishes = None

  def _admit(self):
    """Gives free slots to some who wait, first come, first served."""
    for _ in range(min(JOINS, self.answers.count(None))):
      alone = not any(self.answers)
      with self.changed:
        self._forget_cancelled()
        if not self.waiting:
          return
        request = self.waiting.popleft()
        row = self.answers.index(None)
        self.answers[row] = _Answer(request, self._text(request))
      self._make_room(_columns(request), alone)
      batch, _ = self.writer.batch([request.ids], request.max_tokens)
      self.slots = self._call(self._join, self.slots, np.int32(row), batch)
      self.wishes = None

  def _text(self, request: Request) -> GrowingText:
    """What an answer will say."""
    before = request.ids[-CONTEXT:] if request.goes_on else ()
    return GrowingText(self.writer.tokenizer, request.stops, before)

  def _forget_cancelled(self):
    """Nobody waits for these any more."""
    self.waiting = collections.deque(r for r in self.waiting if not r.cancelled)

  def _make_room(self, columns: int, alone: bool):
    """Makes the ring long enough, and gives it all rows where a request is not alone.

    It gets smaller where nobody else is in it.
    """
    if alone:
      wanted = (self.rows if self.waiting else self.rows_alone, columns)
    else:
      wanted = (self.rows, max(columns, self.ring[1]))
    if wanted == self.ring:
      return
    if alone:
      self.slots = None  # the old ring's memory is free before the new one takes its own
      self.slots = self._empty(self.writer.config, *wanted)
    else:
      self.slots = self._enlarged(self.slots, *wanted)

  def _wishes(self) -> Wishes:
    """What the rows ask for."""
    answers = self.answers[: self.ring[0]]
    requests = [answer.request if answer else None for answer in answers]

    def of_each(name: str, dtype: type, absent: float) -> np.ndarray:
      return np.array([getattr(r, name) if r else absent for r in requests], dtype)

    return Wishes(
      live_B=np.array([r is not None for r in requests]),
      seeds_B=of_each("seed", np.uint32, 0),
      temperatures_B=of_each("temperature", np.float32, 0.0),
      top_p_B=of_each("top_p", np.float32, 1.0),
      explained=np.bool_(any(r and r.alternatives >= 0 for r in requests)),
    )

  def _take(self, step: Any, answers: list[_Answer | None]):
    """Gives the tokens of a step to those who had its rows."""
    tokens_B, *probabilities = jax.device_get(step)
    for row, answer in enumerate(answers):
      # It may have ended, or been cancelled, when this step was on its way.
      if answer is None or answer is not self.answers[row]:
        continue
      explain = functools.partial(_explained, row, int(tokens_B[row]), *probabilities)
      if self._took(answer, int(tokens_B[row]), explain):
        self._leave(row)

  def _took(self, answer: _Answer, token: int, explain: Callable[..., Explained]) -> bool:
    """Adds a token to an answer, and says whether that ends it."""
    request, text = answer.request, answer.text
    ended = ""
    if token == self.writer.tokenizer.eos:
      ended = "stop"
    else:
      if request.alternatives >= 0:
        answer.explained.append(explain(request.alternatives, text.recent))
      answer.unsent += text.add(token)
      if text.stopped:
        ended = "stop"
      elif text.count >= request.max_tokens:
        ended = "length"
    if ended:
      answer.unsent += text.end()
      if text.stopped:
        ended = "stop"
    if ended or request.streams and (answer.unsent or answer.explained):
      request.on_piece(Piece(answer.unsent, text.count, answer.explained, ended))
      answer.unsent, answer.explained = "", []
    return bool(ended)


def _prepared(writer: Writer) -> Params:
  """The parameters on the mesh, with weights in the type in which they are multiplied.

  In bfloat16, a CPU device takes them in the form for a single row: many rows are as fast with it.
  In float32 they would be a fifth slower.
  """
  dtype = precision.of(writer.config).operands
  if writer.on_one_cpu and dtype == jnp.bfloat16:
    return writer.for_one_row[1]
  params = jax.jit(decoding.for_many_rows, static_argnums=1)(writer.host_params, dtype)
  return jax.device_put(params, sharding.shardings(params, writer.mesh))


def _columns(request: Request) -> int:
  """The columns that a request needs: a power of two, so that few programs are compiled.

  One more than its tokens, for a step may be on its way when it ends.
  """
  needed = len(request.ids) + request.max_tokens + 1
  return max(LEAST_COLUMNS, next_power_of_two(needed))


def _explained(
  row: int,
  token: int,
  logprobs_B: np.ndarray,
  best_BxE: np.ndarray,
  best_logprobs_BxE: np.ndarray,
  alternatives: int,
  before: tuple[int, ...],
) -> Explained:
  """The token of a row with the likeliest ones."""
  likeliest = zip(best_BxE[row, :alternatives], best_logprobs_BxE[row, :alternatives])
  pairs = [(int(best), float(logprob)) for best, logprob in likeliest]
  return Explained(token, float(logprobs_B[row]), pairs, before)
