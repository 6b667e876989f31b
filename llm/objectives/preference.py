"""Preferences: a decoder learns to prefer the chosen to the rejected reply to a prompt."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llm import cache
from llm.config import key
from llm.core import Batch, UserError
from llm.data import packing
from llm.objectives import base, chat

LEAST = 64  # the two conversations of a pair take at least so many tokens of a row


def talks(record: dict) -> list[list[dict]]:
  """The conversation with the chosen and that with the rejected reply. Only replies are learned.

  A record has `messages` (or `prompt`), `chosen` and `rejected`: texts, or messages with role and
  content. Raises UserError if it has not, or both replies are the same.
  """
  where = record.get("_where", "a record")
  prompt = record.get("messages", record.get("prompt"))
  if isinstance(prompt, str):
    prompt = [{"role": "user", "content": prompt}]
  if not isinstance(prompt, list) or not prompt:
    raise UserError(
      f"{where}: expected `messages` or `prompt`, a text or a list of messages, beside `chosen` "
      "and `rejected`"
    )
  conversations = []
  for name in ("chosen", "rejected"):
    reply = _reply_text(record.get(name))
    if not isinstance(reply, str) or not reply.strip():
      raise UserError(f"{where}: {name} must be a text, or one message of the assistant")
    messages = [*prompt, {"role": "assistant", "content": reply}]
    *earlier, answer = chat.conversation({"messages": messages, "_where": where})
    conversations.append([*({**turn, "weight": 0} for turn in earlier), answer])
  if conversations[0] == conversations[1]:
    raise UserError(f"{where}: chosen and rejected are the same text: there is nothing to prefer")
  return conversations


def _reply_text(reply: Any) -> Any:
  """The content of a reply that is a message of the assistant, alone or in a list; else itself."""
  if isinstance(reply, list) and len(reply) == 1:
    reply = reply[0]
  if isinstance(reply, dict) and reply.get("role") == "assistant":
    return reply.get("content")
  return reply


@dataclasses.dataclass(frozen=True)
class PairRows(chat.ChatRows):
  """Rows of pairs: conversation 2n is the chosen and 2n + 1 the rejected one of pair n.

  The two stand beside each other in a row. slots: the most pairs of a row. reference: the
  log-likelihood of each conversation's reply under the reference, in nats.
  """

  slots: int
  reference: np.ndarray

  @property
  def note(self) -> str:
    fill = self.tokens / (len(self) * self.length)
    return f"{len(self.encoded) // 2} pairs in {len(self)} rows, {fill:.1%} full; {self.others}"

  def example(self, i, rng):
    reference = packing.in_slots(self.reference[self.packed[i]], 2 * self.slots, np.float32)
    return {**super().example(i, rng), "reference": reference}

  def digest(self) -> str:
    """A digest of the conversations and their order."""
    return cache.digest(
      *(part.tobytes() for conversation in self.encoded for part in conversation),
      repr([row.tolist() for row in self.packed]),
    )

  def of_conversations(self, values_RxN: np.ndarray) -> np.ndarray:
    """The value of each conversation. values_RxN: by row and place in the row."""
    values = np.zeros(len(self.encoded), np.float32)
    for numbers, of_row in zip(self.packed, values_RxN):
      values[numbers] = of_row[: len(numbers)]
    return values


@dataclasses.dataclass(frozen=True)
class Objective(chat.Objective):
  """Direct preference optimisation (Rafailov et al. 2023, equation 7), without a reward model.

  The reference is the checkpoint that the run starts from. beta: the weight of the penalty for
  leaving the reference.
  """

  beta: float = key(0.1, above=0)

  def rows(self, source, tokenizer, data, model, length):
    encoded, others = self.encoded(source, tokenizer, length, talks)
    if not encoded:
      raise UserError(
        f"{source.spec}: no prompt with both its replies fits "
        f"config.training.sequence_length={length}"
      )
    sizes = np.array([conversation.size for conversation in encoded]).reshape(-1, 2).sum(-1)
    packed = [
      np.stack([2 * row, 2 * row + 1], -1).ravel()
      for row in packing.into_rows(sizes, length, LEAST)
    ]
    slots = packing.slots(length, LEAST)
    no_reference = np.zeros(len(encoded), np.float32)
    return PairRows(encoded, packed, length, max(tokenizer.pad, 0), others, slots, no_reference)

  def with_reference(self, rows: PairRows, predict) -> PairRows:
    return dataclasses.replace(rows, reference=rows.of_conversations(predict(rows)["likelihoods"]))

  def batch_spec(self, model, length):
    reference = base.float_spec(2 * packing.slots(length, LEAST))
    return {**super().batch_spec(model, length), "reference": reference}

  def totals(self, batch):
    return {"pairs": _pairs_BxN(batch).sum()}

  def loss(self, outputs, batch, totals):
    weights_BxN = _pairs_BxN(batch)
    likelihoods_BxM = _likelihoods_BxM(outputs, batch)
    margin_BxN = self.beta * _margin_BxN(likelihoods_BxM, batch["reference"])
    losses_BxN = jax.nn.softplus(-margin_BxN)
    weight = weights_BxN.sum()
    metrics = {
      "loss": ((losses_BxN * weights_BxN).sum(), weight),
      "margin": ((margin_BxN * weights_BxN).sum(), weight),
      "accuracy": (((margin_BxN > 0) * weights_BxN).sum(), weight),
    }
    return base.weighted_mean(losses_BxN, weights_BxN, totals["pairs"]), metrics

  def predict(self, outputs, batch):
    return {"likelihoods": _likelihoods_BxM(outputs, batch)}

  def outcomes(self, predictions, rows):
    # An evaluation of training.eval_batches may have read only the first rows.
    evaluated = np.sort(np.concatenate(rows.packed[: len(predictions["likelihoods"])]))
    likelihoods = rows.of_conversations(predictions["likelihoods"])
    margins_1xN = _margin_BxN(likelihoods[None, evaluated], rows.reference[None, evaluated])
    margin = self.beta * margins_1xN[0]
    return {
      "loss": np.logaddexp(0, -margin),
      "margin": margin,
      "accuracy": (margin > 0).astype(float),
    }

  def derived(self, means):
    return {}  # its loss is not that of next tokens

  def summary(self, outcomes):
    return {name: float(values.mean()) for name, values in outcomes.items()}


def _margin_BxN(likelihoods_BxM: Any, reference_BxM: Any) -> Any:
  """How much more than the reference the model prefers the chosen reply of each pair, in nats.

  Both are arrays of NumPy or of JAX, with the conversations of a row, chosen and rejected in turn.
  """
  gained_BxM = likelihoods_BxM - reference_BxM
  return gained_BxM[:, 0::2] - gained_BxM[:, 1::2]


def _pairs_BxN(batch: Batch) -> jax.Array:
  """1 for each slot that holds a pair, else 0."""
  firsts_N = jnp.arange(1, batch["reference"].shape[1], 2)
  used_BxN = firsts_N < batch["segments"].max(-1, keepdims=True)
  return used_BxN.astype(jnp.float32)


def _likelihoods_BxM(outputs: base.Outputs, batch: Batch) -> jax.Array:
  """The log-likelihood of the reply of each conversation of a row, in nats."""
  numbers_M = jnp.arange(1, batch["reference"].shape[1] + 1)
  of_segment_BxMxT = batch["segments"][:, None] == numbers_M[:, None]
  return -(of_segment_BxMxT * (outputs["losses"] * batch["weights"])[:, None]).sum(-1)
