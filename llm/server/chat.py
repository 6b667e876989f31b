"""/v1/chat/completions: a conversation goes on."""

import time
from typing import Annotated, Any, AsyncIterator, Literal

from fastapi import APIRouter, Request
from fastapi.concurrency import run_in_threadpool
from pydantic import Field

from llm.core import UserError, first_line
from llm.inference.engine import Piece
from llm.inference.talker import Talker
from llm.server import answers as answers_lib
from llm.server import examples
from llm.server.answers import Asked, Nothing, Sampled
from llm.server.errors import ApiError
from llm.server.files import Owner
from llm.server.methods import Model
from llm.server.state import new_id

router = APIRouter()


class ResponseFormat(Model):
  type: Literal["text"]


class ChatRequest(Sampled):
  messages: Annotated[list[dict[str, Any]], Field(min_length=1, max_length=10_000)]
  max_completion_tokens: Annotated[int, Field(ge=1, le=2**20)] | None = None
  logprobs: bool | None = None
  top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
  response_format: ResponseFormat | None = None
  tools: Nothing = None
  tool_choice: Literal["none"] | None = None
  store: Literal[False] | None = None
  modalities: Annotated[list[Literal["text"]], Field(max_length=1)] | None = None


@router.post("/v1/chat/completions")
async def chat(request: Request, owner: Owner, asked: ChatRequest) -> Any:
  answers_lib.settle(asked)
  if asked.top_logprobs is not None and not asked.logprobs:
    raise ApiError("top_logprobs needs logprobs=true", "top_logprobs")
  if asked.max_tokens is not None and asked.max_completion_tokens is not None:
    raise ApiError("give max_completion_tokens or max_tokens, not both", "max_tokens")
  catalog = request.app.state.server.catalog
  talker = await run_in_threadpool(catalog.talker, owner, asked.model)
  prompt = await run_in_threadpool(_opening, talker, asked.messages)
  max_tokens = asked.max_completion_tokens or asked.max_tokens
  alternatives = (asked.top_logprobs or 0) if asked.logprobs else -1
  answers = answers_lib.submit(talker, asked, [prompt], max_tokens, alternatives)
  head = {"id": new_id("chatcmpl"), "created": int(time.time()), "model": asked.model}
  if asked.stream:
    return answers_lib.events(_chunks(talker, asked, answers, head))
  pieces = await answers_lib.whole(request, answers)
  return {
    **head,
    "object": "chat.completion",
    "choices": [_choice(talker, asked, i, piece) for i, piece in enumerate(pieces)],
    "usage": answers_lib.usage(answers, sum(piece.tokens for piece in pieces)),
  }


def _opening(talker: Talker, messages: list[dict[str, Any]]) -> list[int]:
  """The ids of the conversation so far. Raises ApiError if a message is wrong."""
  try:
    turns = examples.messages_of(messages, "messages", learned=False)
    answers_lib.check_size(talker, (turn["content"] for turn in turns), "messages")
    return talker.opening(turns)
  except UserError as error:
    raise ApiError(first_line(error), "messages")


def _choice(talker: Talker, asked: ChatRequest, index: int, piece: Piece) -> dict[str, Any]:
  message = {"role": "assistant", "content": piece.text, "refusal": None}
  return {
    "index": index,
    "message": message,
    "finish_reason": piece.ended,
    "logprobs": _logprobs(talker, asked, piece),
  }


def _logprobs(talker: Talker, asked: ChatRequest, piece: Piece) -> dict[str, Any] | None:
  if not asked.logprobs:
    return None
  return {"content": answers_lib.logprobs(talker.tokenizer, piece.explained), "refusal": None}


async def _chunks(
  talker: Talker, asked: ChatRequest, answers: list[Asked], head: dict[str, Any]
) -> AsyncIterator[dict[str, Any]]:
  """The answers as they grow, and at the end the usage where it is asked for."""
  head = {**head, "object": "chat.completion.chunk"}
  with_usage = bool(asked.stream_options and asked.stream_options.include_usage)
  none = {"usage": None} if with_usage else {}
  written = 0
  for answer in answers:
    delta = {"role": "assistant", "content": ""}
    yield {**head, "choices": [{"index": answer.index, "delta": delta, "finish_reason": None}]}
  async for answer, piece in answers_lib.as_they_come(answers):
    choice = {
      "index": answer.index,
      "delta": {"content": piece.text},
      "logprobs": _logprobs(talker, asked, piece),
      "finish_reason": piece.ended or None,
    }
    written += piece.tokens if piece.ended else 0
    yield {**head, "choices": [choice], **none}
  if with_usage:
    yield {**head, "choices": [], "usage": answers_lib.usage(answers, written)}
