"""Embeddings that start from the neighbours of pieces: as the singular vectors of numpy."""

import json
import math

import numpy as np
import pytest

from llm.checkpoints import manager
from llm.config import DataConfig
from llm.core import UserError
from llm.data import cooccurrence, documents, sources
from llm.training import experiment, loop
from tests.conftest import tiny

WIDTH = 8


def by_definition(texts: list[list[int]], vocab_size: int) -> np.ndarray:
  """Vectors of one length by loops, logarithms and a dense decomposition."""
  counts = np.zeros((vocab_size, vocab_size))
  for text in texts:
    for i, a in enumerate(text):
      for j, b in enumerate(text):
        if i != j and abs(i - j) <= cooccurrence.WINDOW:
          counts[a, b] += 1
  neighbours = counts.sum(1) ** 0.75
  neighbours /= neighbours.sum()
  information = np.zeros_like(counts)
  for a, b in np.argwhere(counts > 0):
    value = math.log(counts[a, b] / (counts[a].sum() * neighbours[b]))
    information[a, b] = max(value, 0.0)
  left, values, _ = np.linalg.svd(information)
  vectors = left[:, :WIDTH] * values[:WIDTH] ** 0.5
  occurs = counts.sum(1) > 0
  vectors = vectors[occurs] / np.linalg.norm(vectors[occurs], axis=1, keepdims=True)
  return vectors - vectors.mean(0)


def test_they_are_those_of_the_definition(tmp_path, byte_tokenizer, corpus):
  text = corpus.read_text().split("\n\n")[:12]
  (tmp_path / "text.txt").write_text("\n\n".join(text))
  source = sources.parse_one(f"text:{tmp_path}/text.txt", DataConfig(cache=str(tmp_path)))
  loaded = documents.load(source, byte_tokenizer, "none")
  ours = cooccurrence.vectors([loaded], byte_tokenizer.vocab_size, WIDTH, tmp_path)
  occurs = np.flatnonzero(ours.any(1))
  theirs = by_definition(byte_tokenizer.encode(text), byte_tokenizer.vocab_size)
  assert len(occurs) == len(theirs) < byte_tokenizer.vocab_size
  assert ours[occurs].std() == pytest.approx(1.0, abs=1e-4)
  # Singular vectors have no sign: their products are compared.
  products = ours[occurs] @ ours[occurs].T
  expected = theirs @ theirs.T / theirs.std() ** 2
  np.testing.assert_allclose(products, expected, atol=0.02 * np.abs(expected).max())


def test_documents_do_not_meet(tmp_path, byte_tokenizer):
  """Pieces that never share a document have nothing to do with each other."""
  (tmp_path / "text.txt").write_text("abab abba baab\n\ncdcd dccd cddc\n\n" * 3)
  source = sources.parse_one(f"text:{tmp_path}/text.txt", DataConfig(cache=str(tmp_path)))
  loaded = documents.load(source, byte_tokenizer, "none")
  counts = cooccurrence._counts([loaded], byte_tokenizer.vocab_size)
  a, b, c = (byte_tokenizer.encode([letter])[0][0] for letter in "abc")
  assert counts[a, b] > 0 and counts[a, c] == 0 and counts[a, b] == counts[b, a]


def test_a_run_starts_from_them(corpus, tmp_path):
  config = tiny(
    "bert",
    f"text:{corpus}",
    model__embedding_start="cooccurrence",
    optimizer__learning_rate=0.0,
    training__steps=1,
  )
  made = experiment.prepare(config)
  loop.train(config, tmp_path)
  table = manager.restore(manager.find(tmp_path), "params")["backbone"]["token"]["embedding"]
  vectors_VxE = made.vectors(print)
  known = vectors_VxE.any(1)
  std = made.config.model.init_std
  rows = np.arange(len(known))
  np.testing.assert_allclose(table[rows[known]], std * vectors_VxE[known], atol=1e-6)
  # Pieces that do not occur, and the padding of the table, start at random.
  assert table[rows[~known]].std() == pytest.approx(std, rel=0.1)
  lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
  assert math.isfinite(lines[-1]["loss"])


def test_labelled_records_have_no_running_text(reviews, corpus, tmp_path):
  config = tiny(
    "classifier",
    f"jsonl:{reviews}/train.jsonl",
    model__name="bert",
    model__num_layers=1,
    model__width=32,
    model__num_heads=2,
    model__mlp_dim=64,
    model__max_length=64,
    model__embedding_start="cooccurrence",
    tokenizer__name="bytes",
    tokenizer__sentinels=20,
  )
  with pytest.raises(UserError, match="embedding_start=cooccurrence is for pretraining"):
    experiment.prepare(config)
