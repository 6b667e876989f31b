"""An encoder turns texts into vectors."""

from typing import Sequence

import jax
import numpy as np

from llm.core import UserError, next_power_of_two
from llm.data import batches
from llm.data.tokenizer import MOST_CHARACTERS
from llm.models import build_backbone, resolve
from llm.training.experiment import Bundle

ROWS = 16  # texts at a time


class Embedder:
  """Vectors of texts: the mean of the last hidden states of their tokens, of length 1.

  It is the mean pooling of Sentence-BERT (Reimers and Gurevych 2019, section 3), special tokens
  included.
  """

  def __init__(self, bundle: Bundle):
    self.tokenizer = bundle.tokenizer
    self.tokenizer.require("cls", "sep")
    self.config = resolve.resolved(bundle.config.model, 0, jax.default_backend(), trains=False)
    self.pad = max(self.tokenizer.pad, 0)
    self.params = bundle.params["backbone"]
    self._embed = jax.jit(self._means)

  def embed(self, texts: Sequence[str]) -> tuple[np.ndarray, int]:
    """(NxD float32, the tokens that were read). Raises UserError where a text is too long."""
    most = self.config.max_length
    characters = max(map(len, texts))
    if characters > most * MOST_CHARACTERS:
      raise UserError(f"a text has {characters} characters; the model has {most} positions")
    cls, sep = self.tokenizer.cls, self.tokenizer.sep
    ids = [[cls, *encoded, sep] for encoded in self.tokenizer.encode(texts)]
    longest = max(map(len, ids))
    if longest > most:
      raise UserError(f"a text has {longest} tokens, more than the model's {most} positions")
    vectors = [
      np.asarray(self._embed(self.params, self._batch(ids[first : first + ROWS])))
      for first in range(0, len(ids), ROWS)
    ]
    return np.concatenate(vectors)[: len(ids)], sum(map(len, ids))

  def _batch(self, ids: list[list[int]]) -> dict[str, np.ndarray]:
    """ROWS rows, as long as a power of two, so that few programs are compiled."""
    length = max(16, next_power_of_two(max(map(len, ids))))
    length = min(length, self.config.max_length)
    batch = batches.pad_rows(batches.of_texts(ids, length, self.pad), ROWS)
    return {**batch, "types": np.zeros((ROWS, length), np.int32)}

  def _means(self, params: dict, batch: dict) -> jax.Array:
    """BxD."""
    backbone = build_backbone(self.config)
    hidden_BxTxD = backbone.apply({"params": params}, batch, train=False)[0]
    weights_BxTx1 = batch["segments"][..., None].astype(np.float32)
    sums_BxD = (hidden_BxTxD.astype(np.float32) * weights_BxTx1).sum(1)
    means_BxD = sums_BxD / jax.numpy.maximum(weights_BxTx1.sum(1), 1)
    lengths_Bx1 = jax.numpy.linalg.norm(means_BxD, axis=-1, keepdims=True)
    return means_BxD / jax.numpy.maximum(lengths_Bx1, 1e-12)
