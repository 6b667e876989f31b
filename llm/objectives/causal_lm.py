"""Next-token prediction (GPT) on packed documents."""

import dataclasses
import functools
import math

import numpy as np

from llm.data import documents as documents_lib
from llm.data import packing
from llm.models import heads
from llm.objectives import base


@dataclasses.dataclass(frozen=True)
class PackedRows(packing.PlannedRows):
  """Rows of packed documents. The target of each token is the token after it.

  The target of a document's last token is the end token, which is never an input. A document that
  is longer than a row is cut into pieces in several rows. The last target of a piece is the first
  token of the next, so no target is lost.
  """

  end: int
  pad: int

  @functools.cached_property
  def _bounds(self) -> np.ndarray:
    return self.documents.bounds()

  def example(self, i, rng):
    examples = [
      {"tokens": piece, "targets": np.r_[piece[1:], self.next_token(start + size)]}
      for piece, (start, size) in zip(self.pieces(i), self.plan.row(i))
    ]
    row, _ = packing.lay_out(examples, self.length, self.pad)
    return {**row, "weights": (row["segments"] > 0).astype(np.float32)}

  def next_token(self, stop: int) -> int:
    """The token after a piece that ends before token `stop` of the source."""
    is_end = self._bounds[np.searchsorted(self._bounds, stop)] == stop
    return self.end if is_end else int(self.documents.tokens_N[stop])


@dataclasses.dataclass(frozen=True)
class Objective(base.Objective):
  """Mean cross-entropy of every next token, in nats (Radford et al. 2018, equation 1)."""

  kinds = ("decoder",)
  text_loss = "loss"

  def rows(self, source, tokenizer, data, model, length):
    tokenizer.require("eos")
    documents = documents_lib.load(source, tokenizer, "none")
    plan = packing.plan(documents, length, np.arange(length + 1), source.cache)
    return PackedRows(documents, plan, length, tokenizer.eos, max(tokenizer.pad, 0))

  def text_of(self, rows):
    return None if self.labelled else rows.documents

  def batch_spec(self, model, length):
    return {**base.row_spec(length, "targets"), "weights": base.float_spec(length)}

  def head(self, config):
    return heads.CausalLMHead(config)

  def totals(self, batch):
    return {"tokens": batch["weights"].sum()}

  def loss(self, outputs, batch, totals):
    weights = batch["weights"]
    weight = weights.sum()
    metrics = {
      "loss": ((outputs["losses"] * weights).sum(), weight),
      "accuracy": ((outputs["correct"] * weights).sum(), weight),
    }
    return base.weighted_mean(outputs["losses"], weights, totals["tokens"]), metrics

  def predict(self, outputs, batch):
    return {
      "loss": base.row_sums(outputs["losses"], batch["weights"]),
      "accuracy": base.row_sums(outputs["correct"], batch["weights"]),
    }

  def outcomes(self, predictions, rows):
    return predictions

  def derived(self, means):
    return {"perplexity": math.exp(min(means["loss"], 700.0))}  # larger ones overflow

  def summary(self, outcomes):
    means = base.mean_of_sums(outcomes)
    return {**means, **self.derived(means)}
