"""Next-token prediction (GPT) on packed documents."""

import dataclasses

import numpy as np

from llm.data import documents as documents_lib
from llm.data import packing
from llm.models import heads
from llm.objectives import base


@dataclasses.dataclass(frozen=True)
class PackedRows(packing.PlannedRows):
  """Rows of a packing plan, as dicts of T ids, segments and positions; targets look one further.

  A document is followed by the end token, as a target only: after it comes another document,
  which must not see it. A document longer than a row goes on in another one, and its last target
  there is the next piece's first token, so no token is dropped.
  """

  length: int
  end: int
  pad: int

  def __post_init__(self):
    bounds = self.documents.bounds()
    object.__setattr__(self, "_ends", set(bounds[1:].tolist()))

  def __getitem__(self, i: int) -> dict[str, np.ndarray]:
    row = {"tokens": np.full(self.length, self.pad, np.int32)}
    row |= {k: np.zeros(self.length, np.int32) for k in ("segments", "positions", "targets")}
    at = 0
    for number, (start, size) in enumerate(self.plan.row(i), 1):
      here, stop = slice(at, at + size), start + size
      row["tokens"][here] = self.documents.tokens_N[start:stop]
      row["segments"][here] = number
      row["positions"][here] = np.arange(size)
      row["targets"][at : at + size - 1] = row["tokens"][at + 1 : at + size]
      row["targets"][at + size - 1] = (
        self.end if stop in self._ends else self.documents.tokens_N[stop]
      )
      at += size
    return row


@dataclasses.dataclass(frozen=True)
class Objective(base.Objective):
  """Mean cross-entropy of every next token, in nats (Radford et al. 2018, equation 1)."""

  def rows(self, source, tokenizer, data, model, length):
    tokenizer.require("eos")
    documents = documents_lib.load(source, tokenizer, "none")
    plan = packing.plan(documents, length, np.arange(length + 1), source.cache)
    return PackedRows(documents, plan, length, tokenizer.eos, max(tokenizer.pad, 0))

  def example(self, row, rng):
    return {**row, "weights": (row["segments"] > 0).astype(np.float32)}

  def head(self, model):
    return heads.CausalLMHead(model)

  def totals(self, batch):
    return {"tokens": batch["weights"].sum()}

  def loss(self, outputs, batch, totals):
    weights = batch["weights"]
    loss = base.weighted_mean(outputs["losses"], weights, totals["tokens"])
    weight = weights.sum()
    return loss, {
      "loss": ((outputs["losses"] * weights).sum(), weight),
      "accuracy": ((outputs["correct"] * weights).sum(), weight),
    }

  def predict(self, outputs, batch):
    return {
      name: base.row_sums(outputs[key], batch["weights"])
      for name, key in (("loss", "losses"), ("accuracy", "correct"))
    }

  def outcomes(self, predictions, rows):
    return predictions

  def summary(self, outcomes):
    return base.mean_of_sums(outcomes)
