"""/v1/completions: a text goes on, without a chat template."""

import collections
import itertools
import time
from typing import Annotated, Any, AsyncIterator, Literal

from fastapi import APIRouter, Request
from fastapi.concurrency import run_in_threadpool
from pydantic import Field

from llm.data.tokenizer import Tokenizer
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
  answers = answers_lib.submit(talker, asked, prompts, max_tokens, alternatives, goes_on=True)
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
  """offset: the characters of the tokens before."""
  logprobs = None
  if asked.logprobs is not None:
    logprobs = _logprobs(talker.tokenizer, piece.explained, offset)
  finish_reason = piece.ended or None
  return {"index": index, "text": piece.text, "logprobs": logprobs, "finish_reason": finish_reason}


def _logprobs(tokenizer: Tokenizer, explained: list[Explained], offset: int) -> dict[str, Any]:
  """Tokens with their log-probabilities, as completions give them."""
  tokens = [answers_lib.shown(tokenizer, one.token, one.before) for one in explained]
  ends = itertools.accumulate((token.width for token in tokens), initial=offset)
  return {
    "tokens": [token.text for token in tokens],
    "token_logprobs": [one.logprob for one in explained],
    "top_logprobs": [_likeliest(tokenizer, one) for one in explained],
    "text_offset": list(ends)[:-1],
  }


def _likeliest(tokenizer: Tokenizer, one: Explained) -> dict[str, float]:
  """The likeliest tokens by their texts; by the names of their pieces where texts are the same."""
  texts = [answers_lib.shown(tokenizer, token, one.before).text for token, _ in one.likeliest]
  counts = collections.Counter(texts)
  return {
    text if counts[text] == 1 else tokenizer.pieces[token]: logprob
    for text, (token, logprob) in zip(texts, one.likeliest)
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
    for one in piece.explained:
      width = answers_lib.shown(talker.tokenizer, one.token, one.before).width
      offsets[answer.index] += width
    written += piece.tokens if piece.ended else 0
    yield {**head, "choices": [choice]}
  if with_usage:
    yield {**head, "choices": [], "usage": answers_lib.usage(answers, written)}
