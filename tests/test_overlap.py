"""Held-out text that is in the training text: found by its runs of tokens, and said by a run."""

import numpy as np
import pytest

from llm import core
from llm.data import overlap
from llm.data.documents import Documents


def documents(texts, digest):
  ends = np.cumsum([0, *map(len, texts)])
  return Documents(
    np.concatenate(texts).astype(np.uint16), ends, np.arange(len(ends)), digest, None
  )


def runs(tokens, length):
  return [tuple(tokens[i : i + length]) for i in range(len(tokens) - length + 1)]


@pytest.mark.parametrize("chunk, length", [(64, 20), (2**20, 20), (2**20, 16), (64, 23)])
def test_shared_runs_are_those_of_sets(monkeypatch, chunk, length):
  """Beside Python's sets of tuples, wherever the training text is cut into chunks."""
  monkeypatch.setattr(overlap, "CHUNK", chunk)
  rng = np.random.default_rng(0)
  train = [rng.integers(0, 900, rng.integers(1, 300)) for _ in range(30)]
  held_out = [rng.integers(0, 900, rng.integers(1, 100)) for _ in range(20)]
  for number in range(0, 20, 3):  # some have a piece of a training text, of 15 to 25 tokens
    source = train[number]
    piece = source[: 15 + number % 11]
    held_out[number] = np.concatenate([held_out[number], piece, held_out[number][:9]])
  seen = {run for text in train for run in runs(text.tolist(), length)}
  expected = []
  start = 0
  for number, text in enumerate(held_out):
    places = [i for i, run in enumerate(runs(text.tolist(), length)) if run in seen]
    if places:
      expected.append((number, start + places[0]))
    start += len(text)
  halves = documents(train[:15], "a"), documents(train[15:], "b")
  assert overlap.shared_runs(halves, documents(held_out, "c"), length) == expected
  assert expected


@pytest.mark.parametrize("length", [1, 20, 80])
def test_equal_runs_have_equal_hashes_and_others_do_not(length):
  tokens = np.arange(5000) % 1700
  hashed = overlap.hashes(tokens, length)
  assert len(hashed) == 5000 - length + 1
  assert len(np.unique(hashed)) == 1700
  np.testing.assert_array_equal(hashed[:1000], hashed[1700:2700])
  moved = tokens[:length].copy()
  for place in range(length):
    moved[place] += 1
    assert overlap.hashes(moved, length)[0] != hashed[0]
    moved[place] -= 1


def test_a_run_says_it(corpus, tmp_path):
  """Half of the held-out texts are in the training text: the header counts them."""
  from configs import pretrain_gpt
  from llm import config as config_lib
  from llm.training import experiment

  texts = sorted(corpus.read_text().split("\n\n"), key=len)
  held_out = tmp_path / "held_out.txt"
  fresh = ["Nothing of this was ever seen by anybody at all. " * 3 for _ in range(4)]
  held_out.write_text("\n\n".join([*texts[-4:], *fresh]))
  config = pretrain_gpt.get_config("tiny")
  config.tokenizer.name = "bytes"
  config.training.update(steps=1, epochs=0.0)
  config.data.update(train=f"text:{corpus}", eval=f"text:{held_out}", cache=str(tmp_path / "c"))
  training = experiment.prepare(config_lib.freeze(config), say=lambda *_: None)
  with pytest.warns(core.InputWarning, match="4 of the 8 documents.*share runs of 80 tokens"):
    training.warn_of_shared_data()
