"""Next-token prediction of a target after its text: the loss of a token, and the exact match."""

import dataclasses

import jax.numpy as jnp
import numpy as np

from llm.core import UserError
from llm.data import packing
from llm.objectives import causal_lm, chat

LEAST = 8  # a text with its target takes at least so many tokens of a row


@dataclasses.dataclass(frozen=True)
class Objective(causal_lm.Objective):
  """Cross-entropy of the tokens of `target` given `text`, in nats. Records have both fields.

  An evaluation reports the loss and the accuracy of a token, and `exact_match`: the share of
  targets of which every token is the likeliest after those before. Greedy decoding writes these.
  """

  labelled = True

  def rows(self, source, tokenizer, data, model, length):
    encoded = []
    records = list(source.records())
    texts = tokenizer.encode([record["text"] for record in records])
    targets = tokenizer.encode([_target(record, source.spec) for record in records])
    for text, target in zip(texts, targets):
      learned = np.arange(len(text) + len(target)) >= len(text)
      encoded.append(chat.Encoded(np.array([*text, *target], np.int32), learned.astype(np.float32)))
    fitting = [one for one in encoded if one.size <= length]
    if not fitting:
      raise UserError(
        f"{source.spec}: no text with its target fits config.training.sequence_length={length}"
      )
    packed = packing.into_rows(np.array([one.size for one in fitting]), length, LEAST)
    left_out = f"{len(encoded) - len(fitting)} left out, too long"
    return chat.ChatRows(fitting, packed, length, max(tokenizer.pad, 0), left_out)

  def predict(self, outputs, batch):
    """(loss, right tokens, tokens) of the target of each text of a row: BxKx3."""
    slots = packing.slots(batch["tokens"].shape[1], LEAST)
    of_text_BxKxT = batch["segments"][:, None] == 1 + jnp.arange(slots)[:, None]
    weights_BxKxT = of_text_BxKxT * batch["weights"][:, None]
    values = (outputs["losses"], outputs["correct"], jnp.ones_like(outputs["losses"]))
    return {"targets": jnp.stack([(weights_BxKxT * v[:, None]).sum(-1) for v in values], -1)}

  def outcomes(self, predictions, rows):
    by_row = zip(predictions["targets"], rows.packed)
    loss, right, tokens = np.concatenate([row[: len(texts)] for row, texts in by_row]).T
    return {
      "loss": np.stack([loss, tokens], -1),
      "accuracy": np.stack([right, tokens], -1),
      "exact_match": np.stack([right == tokens, np.ones_like(tokens)], -1),
    }


def _target(record: dict, source: str) -> str:
  if not isinstance(record.get("target"), str) or not record["target"]:
    raise UserError(
      f"{record.get('_where', source)}: the target is missing or empty; records need a field "
      "'target' (config.data.fields='target=THEIR_NAME' renames it)"
    )
  return record["target"]
