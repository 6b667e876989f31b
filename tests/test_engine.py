"""Continuous batching: what a request gets does not depend on who else is served."""

import queue
import random
import threading
import time
from typing import Callable

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import llm
from llm import sharding
from llm.config import MeshConfig
from llm.core import UserError
from llm.inference.engine import Engine, Full, Request
from llm.inference.growing_text import GrowingText
from llm.inference.writer import Writer
from llm.models import decoding


@pytest.fixture(scope="module")
def bundle(gpt_start):
  return llm.load(gpt_start)


@pytest.fixture(scope="module")
def engine(bundle):
  engine = Engine(Writer(bundle), rows=3, waiting=40)
  yield engine
  engine.close()


def submit(engine, prompt, max_tokens, **settings):
  pieces = queue.Queue()
  request = Request(list(prompt.encode()), max_tokens, pieces.put, **settings)
  engine.submit(request)
  return request, pieces


def whole(pieces):
  """(the text, the last piece, all explained tokens)."""
  text, explained = "", []
  while True:
    piece = pieces.get(timeout=120)
    text += piece.text
    explained += piece.explained
    if piece.ended:
      return text, piece, explained


def test_requests_that_join_and_leave_get_what_they_would_get_alone(bundle, engine):
  rng = random.Random(0)
  words = ["the film was", "a", "every scene of it had warmth but", "critics of that year"]
  asked = [(rng.choice(words) + str(i), rng.choice([3, 9, 17, 40])) for i in range(14)]
  answers = [submit(engine, *one, streams=i % 2 == 0)[1] for i, one in enumerate(asked)]
  wholes = [whole(pieces) for pieces in answers]
  writer = Writer(bundle)
  for (prompt, max_tokens), (text, last, _) in zip(asked, wholes):
    # As long as the longest, so that one program serves all.
    (alone,) = writer.write([list(prompt.encode())], 40)
    assert last.tokens == min(max_tokens, len(alone.tokens))
    assert text == bundle.tokenizer.decode(alone.tokens[:max_tokens])


def test_on_a_cpu_a_request_is_alone_in_its_ring_until_another_comes(bundle, monkeypatch):
  """The ring of one row gets further rows and columns, and loses them with the last request."""
  one_device = sharding.make_mesh(MeshConfig(), jax.local_devices()[:1])
  monkeypatch.setattr("llm.inference.writer._mesh", lambda config: one_device)
  writer = Writer(bundle)
  engine = Engine(writer, rows=3)
  prompts = "the film was", "critics of that year said that every scene of it had warmth"
  texts = ["", ""]
  rings = []
  ended = threading.Semaphore(0)

  def ask(number: int, tokens: int, then: Callable[[], None]):
    def take(piece):
      texts[number] += piece.text
      rings.append(engine.ring)
      if len(rings) == 1:
        then()
      if piece.ended:
        ended.release()

    engine.submit(Request(list(prompts[number].encode()), tokens, take, streams=True))

  ask(0, 50, then=lambda: ask(1, 40, then=lambda: None))
  assert ended.acquire(timeout=120) and ended.acquire(timeout=120)
  assert rings[0] == (1, 64) and rings[-1] == (3, 128)
  for prompt, text, tokens in zip(prompts, texts, (50, 40)):
    (expected,) = writer.write([list(prompt.encode())], tokens)
    assert text == expected.text
  assert whole(submit(engine, prompts[0], 50)[1])[0] == texts[0]
  assert engine.ring == (1, 64)
  engine.close()


def test_a_draw_depends_on_its_seed_alone(engine):
  busy = [submit(engine, "noise", 30, temperature=1.5, seed=n)[1] for n in range(2)]
  first = whole(submit(engine, "the film", 12, temperature=1.0, seed=5)[1])[0]
  for pieces in busy:
    whole(pieces)
  assert whole(submit(engine, "the film", 12, temperature=1.0, seed=5)[1])[0] == first
  assert whole(submit(engine, "the film", 12, temperature=1.0, seed=6)[1])[0] != first
  greedy = whole(submit(engine, "the film", 12)[1])[0]
  assert whole(submit(engine, "the film", 12, temperature=1.0, top_p=1e-6, seed=5)[1])[0] == greedy


def test_log_probabilities_are_those_of_the_model(bundle, engine):
  _, pieces = submit(engine, "the film", 8, alternatives=3, temperature=1.0, seed=1)
  _, _, explained = whole(pieces)
  ids = [*b"the film", *(one.token for one in explained)]
  tokens_BxT = np.array([ids], np.int32)
  batch = {
    "tokens": tokens_BxT,
    "targets": np.roll(tokens_BxT, -1, 1),
    "segments": np.ones_like(tokens_BxT),
    "positions": np.arange(len(ids))[None],
  }
  losses = bundle.model.apply({"params": bundle.params}, batch, train=False)["losses"][0]
  told = [one.logprob for one in explained]
  np.testing.assert_allclose(told, -losses[len(b"the film") - 1 : -1], atol=1e-4)
  for one in explained:
    assert [logprob for _, logprob in one.likeliest] == sorted((p for _, p in one.likeliest))[::-1]
    assert one.logprob <= one.likeliest[0][1] + 1e-6


def test_stops_cancellation_and_a_full_queue(engine):
  text = whole(submit(engine, "the film", 40)[1])[0]
  stop = text[10:12]
  cut, last, _ = whole(submit(engine, "the film", 40, stops=(stop,), streams=True)[1])
  assert cut == text[: text.index(stop)] and last.ended == "stop"
  endless = [submit(engine, "a", 120)[0] for _ in range(43 - engine.busy)]
  with pytest.raises(Full):
    submit(engine, "a", 1)
  for request in endless:
    request.cancelled = True
  assert whole(submit(engine, "the film", 40)[1])[0] == text
  while engine.busy:
    time.sleep(0.01)
  with pytest.raises(UserError, match="positions"):
    submit(engine, "a", 128)


def test_a_model_that_is_let_go_of_answers_what_it_has(bundle, engine):
  """Those in a slot and those who wait. It takes no more."""
  expected = whole(submit(engine, "the film", 40)[1])[0]
  leaving = Engine(Writer(bundle), rows=3)
  pieces = [submit(leaving, "the film", 40)[1] for _ in range(5)]
  leaving.retire()
  with pytest.raises(Full):
    submit(leaving, "the film", 1)
  assert [whole(one)[0] for one in pieces] == [expected] * 5
  leaving._thread.join(60)
  assert not leaving._thread.is_alive()


class Words:
  """A tokenizer of bytes with a few longer pieces."""

  pieces = [bytes([byte]) for byte in range(256)] + [b"ab", "é".encode(), "€".encode()[:2], b"\n\n"]

  def decode(self, ids):
    return b"".join(self.pieces[i] for i in ids).decode(errors="replace")


@settings(max_examples=200, deadline=None)
@given(
  st.lists(st.sampled_from([*b"ab\n", *"é€😀".encode(), 256, 257, 258, 259]), max_size=30),
  st.lists(st.sampled_from(["ab", "aab", "\n\n", "é", "b\na"]), max_size=3),
)
def test_pieces_of_a_text_are_the_text(ids, stops):
  growing = GrowingText(Words(), stops)
  text = ""
  for token in ids:
    text += growing.add(token)
    if growing.stopped:
      break
  text += growing.end()
  whole_text = Words().decode(growing.ids)
  places = [whole_text.find(stop) for stop in stops if stop in whole_text]
  assert text == (whole_text[: min(places)] if places else whole_text)


def test_nucleus_keeps_the_fewest_tokens():
  logits = np.log(np.array([[0.5, 0.3, 0.15, 0.05]], np.float32))
  kept = jax.jit(decoding.nucleus)(logits, np.array([[0.7]], np.float32))
  assert np.isfinite(kept).tolist() == [[True, True, False, False]]
