"""What chat and completions share: settings of a request, and answers as they come."""

import asyncio
import dataclasses
import json
import secrets
from typing import Annotated, Any, AsyncIterator, Callable, Iterable, Literal, NamedTuple, Sequence

from fastapi import Request
from fastapi.responses import StreamingResponse
from pydantic import Field, StringConstraints

from llm.data.tokenizer import MOST_CHARACTERS, Tokenizer
from llm.inference import engine as engine_lib
from llm.inference.engine import Explained, Piece
from llm.inference.growing_text import INCOMPLETE
from llm.inference.talker import Talker
from llm.server.errors import ApiError
from llm.server.methods import Model

MOST_ANSWERS = 16  # of one request
DEFAULT_TOKENS = 256
Stop = Annotated[str, StringConstraints(min_length=1, max_length=256)]
Zero = Annotated[float, Field(ge=0, le=0)] | None
Nothing = Annotated[list, Field(max_length=0)] | None


class StreamOptions(Model):
  include_usage: bool | None = None
  include_obfuscation: Literal[False] | None = None


class Sampled(Model):
  """The settings that chat and completions share. Those of one value are refused at any other."""

  model: str
  temperature: Annotated[float, Field(ge=0, le=2)] | None = None
  top_p: Annotated[float, Field(gt=0, le=1)] | None = None
  n: Annotated[int, Field(ge=1, le=MOST_ANSWERS)] | None = None
  seed: Annotated[int, Field(ge=-(2**63), le=2**63 - 1)] | None = None
  stop: Stop | Annotated[list[Stop], Field(max_length=4)] | None = None
  max_tokens: Annotated[int, Field(ge=1, le=2**20)] | None = None
  stream: bool | None = None
  stream_options: StreamOptions | None = None
  user: str | None = None  # changes nothing
  frequency_penalty: Zero = None
  presence_penalty: Zero = None
  logit_bias: Annotated[dict, Field(max_length=0)] | None = None


@dataclasses.dataclass(frozen=True)
class Asked:
  """One answer that is being written."""

  index: int
  pieces: asyncio.Queue
  request: engine_lib.Request


def settle(asked: Sampled):
  """Raises ApiError where settings do not fit one another."""
  if asked.stream_options and not asked.stream:
    raise ApiError("stream_options needs stream=true", "stream_options")


def submit(
  talker: Talker,
  asked: Sampled,
  prompts: list[list[int]],
  max_tokens: int | None,
  alternatives: int,
  goes_on: bool = False,
) -> list[Asked]:
  """Puts n answers to each prompt into the queue of a model, all or none.

  goes_on: as of engine.Request. Raises Full or ApiError.
  """
  loop = asyncio.get_running_loop()
  stops = (asked.stop,) if isinstance(asked.stop, str) else tuple(asked.stop or ())
  seed = secrets.randbits(32) if asked.seed is None else asked.seed
  answers = []
  for prompt in prompts:
    for number in range(asked.n or 1):
      pieces: asyncio.Queue = asyncio.Queue()
      request = engine_lib.Request(
        ids=prompt,
        max_tokens=_room(talker, prompt, max_tokens),
        on_piece=_putter(loop, pieces),
        temperature=1.0 if asked.temperature is None else asked.temperature,
        top_p=1.0 if asked.top_p is None else asked.top_p,
        seed=(seed + number) % 2**32,
        stops=stops,
        alternatives=alternatives,
        streams=bool(asked.stream),
        goes_on=goes_on,
      )
      answers.append(Asked(len(answers), pieces, request))
  talker.engine.submit(*(answer.request for answer in answers))
  return answers


def check_size(talker: Talker, texts: Iterable[str], param: str):
  """Raises ApiError where a prompt has more characters than any that fits, before it is encoded."""
  characters = sum(map(len, texts))
  if characters > talker.max_length * MOST_CHARACTERS:
    raise ApiError(
      f"the prompt has {characters} characters; the model has {talker.max_length} positions",
      param,
      "context_length_exceeded",
    )


def _room(talker: Talker, prompt: list[int], max_tokens: int | None) -> int:
  """The tokens to write at most: as many as asked for, or what the model has room for."""
  room = talker.max_length - len(prompt)
  if max_tokens is not None and max_tokens > room or room < 1:
    asked = "" if max_tokens is None else f" and max_tokens={max_tokens} more"
    raise ApiError(
      f"the prompt has {len(prompt)} tokens{asked}; the model has {talker.max_length} positions",
      "messages" if max_tokens is None else "max_tokens",
      "context_length_exceeded",
    )
  return min(room, DEFAULT_TOKENS) if max_tokens is None else max_tokens


def _putter(loop: asyncio.AbstractEventLoop, pieces: asyncio.Queue) -> Callable[[Piece], None]:
  """A function for the writing thread that hands a piece to the thread of the server."""

  def put(piece: Piece):
    try:
      loop.call_soon_threadsafe(pieces.put_nowait, piece)
    except RuntimeError:  # the server has stopped meanwhile
      pass

  return put


async def whole(request: Request, answers: list[Asked]) -> list[Piece]:
  """All answers, complete. They are cancelled if the client goes away."""
  gone = asyncio.create_task(_gone(request))
  waits = [asyncio.create_task(answer.pieces.get()) for answer in answers]
  try:
    left = set(waits)
    while left:
      done, _ = await asyncio.wait({*left, gone}, return_when=asyncio.FIRST_COMPLETED)
      if gone in done:
        raise ApiError("the client went away", status=499)
      left -= done
    return [_good(wait.result()) for wait in waits]
  finally:
    cancel(answers)
    for task in (gone, *waits):
      task.cancel()


async def _gone(request: Request):
  """Ends when the client has gone away."""
  while not await request.is_disconnected():
    await asyncio.sleep(0.1)


def _good(piece: Piece) -> Piece:
  """The piece. Raises ApiError if it says that writing failed."""
  if piece.ended == "error":
    raise ApiError("the server failed while it wrote; its log says where", status=500)
  return piece


def cancel(answers: list[Asked]):
  """Frees the slots of answers that are still being written."""
  for answer in answers:
    answer.request.cancelled = True


async def as_they_come(answers: list[Asked]) -> AsyncIterator[tuple[Asked, Piece]]:
  """The pieces of all answers. What is left is cancelled when nobody reads on."""
  waits = {asyncio.create_task(answer.pieces.get()): answer for answer in answers}
  try:
    while waits:
      done, _ = await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
      for task in done:
        answer = waits.pop(task)
        piece = _good(task.result())
        yield answer, piece
        if not piece.ended:
          waits[asyncio.create_task(answer.pieces.get())] = answer
  finally:
    cancel(answers)
    for task in waits:
      task.cancel()


def events(chunks: AsyncIterator[dict[str, Any]]) -> StreamingResponse:
  """The chunks as events that a client reads one by one."""

  async def lines() -> AsyncIterator[str]:
    try:
      async for chunk in chunks:
        yield f"data: {json.dumps(chunk)}\n\n"
    except ApiError as error:
      body = {"message": error.message, "type": "server_error", "param": None, "code": error.code}
      yield f"data: {json.dumps({'error': body})}\n\n"
    yield "data: [DONE]\n\n"

  return StreamingResponse(lines(), media_type="text/event-stream")


def usage(answers: list[Asked], written: int) -> dict[str, int]:
  """The tokens that were read and written. A prompt counts once, however many answers it has."""
  prompts = {id(answer.request.ids): len(answer.request.ids) for answer in answers}
  read = sum(prompts.values())
  return {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written}


class Shown(NamedTuple):
  """A token as text. width: the characters that it adds to the answer."""

  text: str
  content: bytes
  width: int


def shown(tokenizer: Tokenizer, token: int, before: Sequence[int]) -> Shown:
  """A token behind others. Its text is what it adds to theirs, on which its spaces depend.

  Where that is no text, it is the name of its piece: a special one, or a part of a character.
  """
  start = tokenizer.decode(before)
  whole = tokenizer.decode([*before, token])
  added = whole[len(start) :]
  width = len(whole) - len(start)
  if added and whole.startswith(start) and INCOMPLETE not in added:
    return Shown(added, added.encode(), width)
  return Shown(tokenizer.pieces[token], tokenizer.bytes_of(token), width)


def logprobs(tokenizer: Tokenizer, explained: list[Explained]) -> list[dict[str, Any]]:
  """Tokens with their log-probabilities, as chat gives them."""

  def of(token: int, logprob: float, before: Sequence[int]) -> dict[str, Any]:
    text, content, _ = shown(tokenizer, token, before)
    return {"token": text, "logprob": max(logprob, -9999.0), "bytes": list(content)}

  return [
    {
      **of(one.token, one.logprob, one.before),
      "top_logprobs": [of(*pair, one.before) for pair in one.likeliest],
    }
    for one in explained
  ]
