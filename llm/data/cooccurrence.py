"""Vectors of pieces from the pieces that stand near them, counted in unlabelled text.

The singular vectors of positive pointwise mutual information (Levy, Goldberg and Dagan 2015): what
word2vec learns by gradient steps, in seconds. A network whose embeddings start from them knows
before its first step which pieces occur in the same places.
"""

import pathlib
from typing import Any, Sequence

import numpy as np
import scipy.sparse

from llm import cache
from llm.data.documents import Documents

# Pieces on each side of a piece that are counted. Wide windows tell subject and tone, narrow ones
# syntax (Levy and Goldberg 2014, section 4).
WINDOW = 20
# The power of the counts of the neighbours, which makes rare ones count less (section 3.2).
SMOOTHING = 0.75
# What is counted of longer texts: the first tokens of each source, an equal share.
MOST_TOKENS = 20_000_000
# Tokens counted at a time.
CHUNK = 500_000


def vectors(
  documents: Sequence[Documents], vocab_size: int, width: int, folder: pathlib.Path
) -> np.ndarray:
  """VxD float32: mean 0 and standard deviation 1 in all; 0 for pieces that do not occur.

  folder: the cache, which keeps them.
  """
  constants = str((vocab_size, width, WINDOW, SMOOTHING, MOST_TOKENS))
  key = cache.digest("cooccurrence 1", *(d.digest for d in documents), constants)

  def write(scratch: pathlib.Path) -> None:
    np.save(scratch / "vectors.npy", _vectors(_counts(documents, vocab_size), width))

  return np.load(cache.kept(folder / "vectors" / key[:32], write) / "vectors.npy")


def _counts(documents: Sequence[Documents], vocab_size: int) -> scipy.sparse.csr_matrix:
  """VxV: how often two pieces stand at most WINDOW apart in a document."""
  counts = scipy.sparse.csr_matrix((vocab_size, vocab_size), dtype=np.float64)
  for of_source in documents:
    total = min(len(of_source.tokens_N), MOST_TOKENS // len(documents))
    bounds = of_source.bounds()
    for start in range(0, total, CHUNK):
      stop = min(start + CHUNK, total)
      document_N = np.searchsorted(bounds, np.arange(start, stop), side="right")
      counts += _counts_of(of_source.tokens_N[start:stop], document_N, vocab_size)
  return scipy.sparse.csr_matrix(counts + counts.T)


def _counts_of(
  tokens_N: np.ndarray, document_N: np.ndarray, vocab_size: int
) -> scipy.sparse.csr_matrix:
  """Pairs of a piece and one that follows it in the same document."""
  counts = scipy.sparse.csr_matrix((vocab_size, vocab_size), dtype=np.float64)
  for distance in range(1, WINDOW + 1):
    together = document_N[:-distance] == document_N[distance:]
    pairs = tokens_N[:-distance][together], tokens_N[distance:][together]
    ones = np.ones(len(pairs[0]))
    counts += scipy.sparse.coo_matrix((ones, pairs), shape=counts.shape).tocsr()
  return counts


def _vectors(counts: scipy.sparse.csr_matrix, width: int) -> np.ndarray:
  """The left singular vectors of the positive information, all of one length.

  The information of two pieces is log(P(a, b) / (P(a) P(b))). Each vector is weighted by the root
  of its singular value. The lengths of the rows follow the frequency of the pieces; with them, a
  network learns more slowly than from random embeddings, and without them faster.
  """
  totals_V = np.asarray(counts.sum(1)).ravel()
  smoothed_V = totals_V**SMOOTHING
  smoothed_V /= max(smoothed_V.sum(), 1e-9)
  pairs = counts.tocoo()
  information = np.log(pairs.data / (totals_V[pairs.row] * smoothed_V[pairs.col]))
  positive = information > 0
  if not positive.any():
    return np.zeros((len(totals_V), width), np.float32)
  from sklearn.utils.extmath import randomized_svd  # takes a second, which other commands save

  matrix = scipy.sparse.csr_matrix(
    (information[positive], (pairs.row[positive], pairs.col[positive])), shape=counts.shape
  )
  decompose: Any = randomized_svd  # its types are guessed from its defaults
  left_VxK, values_K, _ = decompose(matrix, min(width, len(totals_V)), random_state=0)
  vectors_VxK = left_VxK * values_K**0.5
  lengths_V = np.linalg.norm(vectors_VxK, axis=1)
  occurs_V = lengths_V > 1e-6
  seen_SxK = vectors_VxK[occurs_V] / lengths_V[occurs_V, None]
  seen_SxK -= seen_SxK.mean(0)
  vectors_VxD = np.zeros((len(totals_V), width), np.float32)
  vectors_VxD[occurs_V, : len(values_K)] = seen_SxK / max(float(seen_SxK.std()), 1e-9)
  return vectors_VxD
