"""Preferences: of two replies to one prompt, a decoder learns to prefer the chosen one to the rejected."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from llm.config import key
from llm.core import UserError
from llm.data import cache, packing
from llm.objectives import base, chat

LEAST = 64  # tokens of a row that the conversations of a pair take at least


def talks(record: dict) -> list[list[dict]]:
  """The conversation with the chosen and with the rejected reply, only that reply learned. Raises UserError.

  A record has `messages` (or `prompt`), `chosen` and `rejected`: texts, or messages with role and content.
  """
  where = record.get("_where", "a record")
  prompt = record.get("messages", record.get("prompt"))
  if isinstance(prompt, str):
    prompt = [{"role": "user", "content": prompt}]
  if not isinstance(prompt, list) or not prompt:
    raise UserError(
      f"{where}: expected `messages` or `prompt`, a text or a list of messages, beside `chosen` and `rejected`"
    )
  made = []
  for name in ("chosen", "rejected"):
    reply = record.get(name)
    reply = reply[0] if isinstance(reply, list) and len(reply) == 1 else reply
    reply = (
      reply.get("content")
      if isinstance(reply, dict) and reply.get("role") == "assistant"
      else reply
    )
    if not isinstance(reply, str) or not reply.strip():
      raise UserError(f"{where}: {name} must be a text, or one message of the assistant")
    turns = chat.conversation(
      {"messages": [*prompt, {"role": "assistant", "content": reply}], "_where": where}
    )
    made.append([{**turn, "weight": 0} for turn in turns[:-1]] + turns[-1:])
  if made[0] == made[1]:
    raise UserError(f"{where}: chosen and rejected are the same text: there is nothing to prefer")
  return made


@dataclasses.dataclass(frozen=True)
class PairRows(chat.ChatRows):
  """Conversations 2n and 2n + 1 are pair n, chosen and rejected, beside each other in a row.

  slots: pairs of a row at most. reference: log-likelihood of the reply of each conversation under the
  reference, in nats.
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
    """A name for the conversations and their order."""
    return cache.digest(
      *(part.tobytes() for conversation in self.encoded for part in conversation),
      repr([row.tolist() for row in self.packed]),
    )

  def of_conversations(self, values_RxN: np.ndarray) -> np.ndarray:
    """The value of each conversation, of an array by row and place in the row."""
    values = np.zeros(len(self.encoded), np.float32)
    for numbers, of_row in zip(self.packed, values_RxN):
      values[numbers] = of_row[: len(numbers)]
    return values


@dataclasses.dataclass(frozen=True)
class Objective(chat.Objective):
  """Direct preference optimisation (Rafailov et al. 2023, equation 7): the policy is the reward model.

  The reference is the checkpoint that the run starts from. beta: weight of the penalty for leaving
  the reference.
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
    real_BxN = _pairs_BxN(batch)
    margin_BxN = self.beta * self._margin_BxN(_likelihoods_BxM(outputs, batch), batch["reference"])
    losses_BxN = jax.nn.softplus(-margin_BxN)
    count = real_BxN.sum()
    return base.weighted_mean(losses_BxN, real_BxN, totals["pairs"]), {
      "loss": ((losses_BxN * real_BxN).sum(), count),
      "margin": ((margin_BxN * real_BxN).sum(), count),
      "accuracy": (((margin_BxN > 0) * real_BxN).sum(), count),
    }

  def _margin_BxN(self, likelihoods_BxM, reference_BxM):
    """How much more than the reference the chosen reply is preferred, in nats."""
    gained_BxM = likelihoods_BxM - reference_BxM
    return gained_BxM[:, 0::2] - gained_BxM[:, 1::2]

  def predict(self, outputs, batch):
    return {"likelihoods": _likelihoods_BxM(outputs, batch)}

  def outcomes(self, predictions, rows):
    seen = np.sort(
      np.concatenate(rows.packed[: len(predictions["likelihoods"])])
    )  # an evaluation may be cut short
    likelihoods = rows.of_conversations(predictions["likelihoods"])
    margin = self.beta * self._margin_BxN(likelihoods[None, seen], rows.reference[None, seen])[0]
    return {
      "loss": np.logaddexp(0, -margin),
      "margin": margin,
      "accuracy": (margin > 0).astype(float),
    }

  def summary(self, outcomes):
    return {name: float(values.mean()) for name, values in outcomes.items()}


def _pairs_BxN(batch):
  """1 where a row has a pair."""
  return (
    jnp.arange(1, batch["reference"].shape[1], 2) < batch["segments"].max(-1, keepdims=True)
  ).astype(jnp.float32)


def _likelihoods_BxM(outputs, batch):
  """Log-likelihood of the reply of each conversation of a row, in nats."""
  of_segment_BxMxT = (
    batch["segments"][:, None] == jnp.arange(1, batch["reference"].shape[1] + 1)[:, None]
  )
  return -(of_segment_BxMxT * (outputs["losses"] * batch["weights"])[:, None]).sum(-1)
