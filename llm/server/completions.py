"""/v1/completions: a text goes on, without a chat template."""

import time
from typing import Annotated, Any, AsyncIterator, Literal

from fastapi import APIRouter, Request
from fastapi.concurrency import run_in_threadpool
from pydantic import Field

from llm.inference.engine import Explained, Piece
from llm.inference.talker import Talker
from llm.server import answers as answers_lib
from llm.server.answers import Asked, Sampled
from llm.server.errors import ApiError
from llm.server.files import Owner
from llm.server.state import new_id

router = APIRouter()
MOST_PROMPTS = 64
Ids = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]
Prompts = (
  str
  | Annotated[list[str], Field(min_length=1, max_length=MOST_PROMPTS)]
  | Ids
  | Annotated[list[Ids], Field(min_length=1, max_length=MOST_PROMPTS)]
)


class CompletionRequest(Sampled):
  prompt: Prompts
  logprobs: Annotated[int, Field(ge=0, le=5)] | None = None
  echo: Literal[False] | None = None
  best_of: Literal[1] | None = None
  suffix: Literal[""] | None = None


@router.post("/v1/completions")
async def complete(request: Request, owner: Owner, asked: CompletionRequest) -> Any:
  answers_lib.settle(asked)
  catalog = request.app.state.server.catalog
  talker = await run_in_threadpool(catalog.talker, owner, asked.model)
  prompts = await run_in_threadpool(_encoded, talker, asked.prompt)
  alternatives = -1 if asked.logprobs is None else asked.logprobs
  max_tokens = asked.max_tokens or 16  # OpenAI's default
  answers = answers_lib.submit(talker, asked, prompts, max_tokens, alternatives)
  head = {"id": new_id("cmpl"), "created": int(time.time()), "model": asked.model}
  head["object"] = "text_completion"
  if asked.stream:
    return answers_lib.events(_chunks(talker, asked, answers, head))
  pieces = await answers_lib.whole(request, answers)
  return {
    **head,
    "choices": [_choice(talker, asked, i, piece, 0) for i, piece in enumerate(pieces)],
    "usage": answers_lib.usage(answers, sum(piece.tokens for piece in pieces)),
  }


def _encoded(talker: Talker, prompt: Any) -> list[list[int]]:
  """The ids of each prompt: a text, ids, or a list of either. Raises ApiError."""
  prompts = [prompt] if isinstance(prompt, str) or isinstance(prompt[0], int) else prompt
  for text in prompts:
    answers_lib.check_size(talker, text if isinstance(text, str) else "", "prompt")
  tokenizer = talker.tokenizer
  encoded = [tokenizer.encode([p])[0] if isinstance(p, str) else list(p) for p in prompts]
  for ids in encoded:
    if not ids:
      raise ApiError("the prompt is empty: give it a word at least", "prompt")
    if max(ids) >= tokenizer.vocab_size:
      raise ApiError(f"the vocabulary has {tokenizer.vocab_size} ids, no {max(ids)}", "prompt")
  return encoded


def _choice(
  talker: Talker, asked: CompletionRequest, index: int, piece: Piece, offset: int
) -> dict[str, Any]:
  """offset: the characters that were given out before."""
  logprobs = None
  if asked.logprobs is not None:
    logprobs = _logprobs(talker, piece.explained, offset)
  finish_reason = piece.ended or None
  return {"index": index, "text": piece.text, "logprobs": logprobs, "finish_reason": finish_reason}


def _logprobs(talker: Talker, explained: list[Explained], offset: int) -> dict[str, Any]:
  """Tokens with their log-probabilities, as completions give them."""
  tokens = [answers_lib.text_of(talker, one.token) for one in explained]
  offsets = [offset + sum(map(len, tokens[:number])) for number in range(len(tokens))]
  likeliest = [
    {answers_lib.text_of(talker, token): logprob for token, logprob in one.likeliest}
    for one in explained
  ]
  return {
    "tokens": tokens,
    "token_logprobs": [one.logprob for one in explained],
    "top_logprobs": likeliest,
    "text_offset": offsets,
  }


async def _chunks(
  talker: Talker, asked: CompletionRequest, answers: list[Asked], head: dict[str, Any]
) -> AsyncIterator[dict[str, Any]]:
  """The answers as they grow, and at the end the usage where it is asked for."""
  with_usage = bool(asked.stream_options and asked.stream_options.include_usage)
  written = 0
  offsets = [0] * len(answers)
  async for answer, piece in answers_lib.as_they_come(answers):
    choice = _choice(talker, asked, answer.index, piece, offsets[answer.index])
    offsets[answer.index] += len(piece.text)
    written += piece.tokens if piece.ended else 0
    yield {**head, "choices": [choice]}
  if with_usage:
    yield {**head, "choices": [], "usage": answers_lib.usage(answers, written)}
