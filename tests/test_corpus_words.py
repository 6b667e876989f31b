"""Words and sentences of a corpus are those that datatrove gets from spaCy."""

import copy
import pickle
import random

import pytest

pytest.importorskip("datatrove", reason="the extra corpus is not installed")

from datatrove.utils.typeshelper import Languages
from datatrove.utils.word_tokenizers import load_word_tokenizer

from llm.corpus import words

PIECES = """the cat a I'm don't can't've o'clock Mr. Dr. e.g. U.S. etc. p.m. 10km $3.50 1,000.25 x-y
(see [1] "so" he said." it! why?! ... end. naïve C++ 50% #7 @me http://a.org/b?c=d one.Two 。 – —
well-known 'em rock'n'roll a/b {x} x= ☃ 日本語。日本 né.""".split()
SPACES = [" ", " ", " ", " ", "\n", "  ", "\u00a0", "\t", ""]


def made_texts(count, spaces=SPACES):
  rng = random.Random(0)
  for _ in range(count):
    yield "".join(rng.choice(PIECES) + rng.choice(spaces) for _ in range(40))


@pytest.fixture(scope="module")
def theirs():
  return load_word_tokenizer(Languages.english)


def test_words_are_those_of_datatrove(theirs, monkeypatch):
  """Also when few runs are kept, and when they are met again."""
  texts = ["", " ", "x" * 1000, *made_texts(100)]
  expected = [theirs.word_tokenize(text) for text in texts]
  for most in (5, words.MOST_RUNS):
    monkeypatch.setattr(words, "MOST_RUNS", most)
    ours = words.Words()
    for _ in range(2):
      assert [ours.word_tokenize(text) for text in texts] == expected


def test_sentences_are_those_of_datatrove(theirs):
  texts = ["", " ", ".", "One. two", *made_texts(60), *made_texts(60, [" "])]
  for text in texts:
    for line in (text, text.strip()):
      assert words.ENGLISH.span_tokenize(line) == theirs.span_tokenize(line), line


def test_a_name_of_spacy_ends_nothing():
  """spaCy fails at the second IS_ALPHA; datatrove then leaves it out: it has no place."""
  for run in ("IS_ALPHA", "a-IS_ALPHA-b", "b-IS_ALPHA-a"):
    assert len(words.ENGLISH.span_tokenize(f"see {run} here. Then it")) == 2


def test_a_process_has_one(theirs):
  """Blocks are copied for every task: what they keep must not pile up."""
  assert copy.deepcopy({"language": words.ENGLISH})["language"] is words.ENGLISH
  assert pickle.loads(pickle.dumps(words.ENGLISH)) is words.ENGLISH
