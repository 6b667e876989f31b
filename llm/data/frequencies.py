"""What the frequencies of the pieces reach alone: a model must do better to have learned."""

from typing import Sequence

import numpy as np

from llm.data.documents import Documents

# Tokens of a text that are counted: more do not change the figure.
MOST = 2**24


def unigram_loss(train: Sequence[Documents], held_out: Documents, vocab_size: int) -> float:
  """Nats a token of held-out text, each piece as likely as in the training text.

  Each piece is counted once more than it occurs (Laplace), so that none is impossible.
  """
  counts_V = np.ones(vocab_size)
  for documents in train:
    counts_V += np.bincount(documents.tokens_N[:MOST], minlength=vocab_size)
  held_out_V = np.bincount(held_out.tokens_N[:MOST], minlength=vocab_size)
  return float(held_out_V @ -np.log(counts_V / counts_V.sum()) / held_out_V.sum())
