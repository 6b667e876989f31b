"""Masked language modelling, with or without next-sentence prediction (BERT)."""

import dataclasses

import numpy as np

from llm.config import key
from llm.core import UserError
from llm.data import documents as documents_lib
from llm.data import masking as masking_lib
from llm.data import packing, sentence_pairs
from llm.data.sources import Source
from llm.data.tokenizer import Tokenizer
from llm.models import heads
from llm.objectives import base


@dataclasses.dataclass(frozen=True)
class PackedRows(packing.PlannedRows):
  """Rows without sentence pairs. Each piece is a segment of its own: [CLS] piece [SEP]."""

  masking: masking_lib.Masking

  def example(self, i, rng):
    examples = []
    for piece in self.pieces(i):
      tokens = [self.masking.cls, *piece, self.masking.sep]
      examples.append({"tokens": tokens, "types": np.zeros(len(tokens), np.int32)})
    row, _ = packing.lay_out(examples, self.length, self.masking.pad)
    return self.masking.hide(row, rng)


@dataclasses.dataclass(frozen=True)
class Objective(base.Objective):
  """BERT's pretraining (Devlin et al. 2019, section 3.1 and appendix A.1).

  mask_rate: share of the tokens that are predicted. mask_share of these become [MASK], random_share
  another token, and the others stay. next_sentence: half of the pairs are true, and half have a
  second part from another document; False makes no pairs. short_share: share of the pairs that aim
  at a random shorter length (0.1 in the published code). Rows are packed with pairs and without.
  """

  mask_rate: float = key(0.15, above=0, at_most=1)
  mask_share: float = key(0.8, at_least=0, at_most=1)
  random_share: float = key(0.1, at_least=0, at_most=1)
  whole_word: bool = False
  next_sentence: bool = True
  short_share: float = key(0.1, at_least=0, at_most=1)

  kinds = ("encoder",)
  text_loss = "mlm_loss"

  def __post_init__(self):
    super().__post_init__()
    if self.mask_share + self.random_share > 1:
      raise UserError("config.objective.mask_share + random_share must be at most 1")

  def rows(self, source, tokenizer, data, model, length):
    masking = masking_lib.masking(
      tokenizer, self.mask_rate, self.mask_share, self.random_share, self.whole_word
    )
    if length < 8:
      raise UserError(
        f"config.training.sequence_length={length} is too short for masked_lm: 8 at least"
      )
    if self.next_sentence:
      return self._pair_rows(source, tokenizer, data.sentences, length, masking)
    documents = documents_lib.load(source, tokenizer, "none")
    sizes = np.arange(length - 1) + 2  # a piece takes two tokens more: [CLS] and [SEP]
    plan = packing.plan(documents, length, sizes, source.cache)
    return PackedRows(documents, plan, length, masking)

  def _pair_rows(
    self,
    source: Source,
    tokenizer: Tokenizer,
    sentences: str,
    length: int,
    masking: masking_lib.Masking,
  ) -> sentence_pairs.PairRows:
    """Rows of sentence pairs. sentences: config.data.sentences."""
    documents = documents_lib.load(source, tokenizer, sentences)
    if len(documents) < 2:
      raise UserError(
        f"{source.spec}: next-sentence prediction needs two documents at least (a blank "
        "line parts them); or set config.objective.next_sentence=False"
      )
    plan = sentence_pairs.plan_pairs(documents, length, self.short_share, source.cache)
    if not len(plan.anchors):
      raise UserError(f"{source.spec}: no document has two tokens, which a pair needs")
    return sentence_pairs.PairRows(documents, plan, length, masking)

  def text_of(self, rows):
    return rows.documents

  def batch_spec(self, model, length):
    masked = masking_lib.masked_slots(self.mask_rate, length)
    spec = {
      **base.row_spec(length, "types"),
      "masked_positions": base.int_spec(masked),
      "masked_targets": base.int_spec(masked),
      "masked_weights": base.float_spec(masked),
    }
    if self.next_sentence:
      slots = packing.slots(length, sentence_pairs.LEAST)
      spec |= {
        "firsts": base.int_spec(slots),
        "next_sentence": base.int_spec(slots),
        "pair_weights": base.float_spec(slots),
      }
    return spec

  def head(self, config):
    return heads.MaskedLMHead(config, self.next_sentence)

  def totals(self, batch):
    totals = {"masked": batch["masked_weights"].sum()}
    if self.next_sentence:
      totals["pairs"] = batch["pair_weights"].sum()
    return totals

  def loss(self, outputs, batch, totals):
    weights = batch["masked_weights"]
    weight = weights.sum()
    loss = base.weighted_mean(outputs["losses"], weights, totals["masked"])
    metrics = {
      "mlm_loss": ((outputs["losses"] * weights).sum(), weight),
      "mlm_accuracy": ((outputs["correct"] * weights).sum(), weight),
    }
    if self.next_sentence:
      losses_BxN = base.cross_entropy(outputs["pair_logits"], batch["next_sentence"])
      correct_BxN = outputs["pair_logits"].argmax(-1) == batch["next_sentence"]
      weights_BxN = batch["pair_weights"]
      pairs = weights_BxN.sum()
      loss += base.weighted_mean(losses_BxN, weights_BxN, totals["pairs"])
      metrics |= {
        "nsp_loss": ((losses_BxN * weights_BxN).sum(), pairs),
        "nsp_accuracy": ((correct_BxN * weights_BxN).sum(), pairs),
      }
    return loss, metrics

  def predict(self, outputs, batch):
    weights = batch["masked_weights"]
    sums = {
      "mlm_loss": base.row_sums(outputs["losses"], weights),
      "mlm_accuracy": base.row_sums(outputs["correct"], weights),
    }
    if self.next_sentence:
      correct_BxN = outputs["pair_logits"].argmax(-1) == batch["next_sentence"]
      sums["nsp_accuracy"] = base.row_sums(correct_BxN, batch["pair_weights"])
    return sums

  def outcomes(self, predictions, rows):
    return predictions

  def summary(self, outcomes):
    return base.mean_of_sums(outcomes)
