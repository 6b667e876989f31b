"""An objective from outside the package: read some words, write them in reverse.

  python -m llm.train --config=examples/reverse_words.py --workdir=runs/reverse \\
      --config.data.train='text:corpus/*.txt' --config.data.eval=text:held_out.txt

docs/adding.md explains it line by line.
"""

import dataclasses

import jax
import numpy as np

from llm import config as config_lib
from llm.config import key
from llm.core import UserError
from llm.models import gpt, heads
from llm.objectives import base


@dataclasses.dataclass(frozen=True)
class ReversedRows:
  """A row for each text: its first words, a sign, the words in reverse, the end token."""

  pairs: list[tuple[list[int], list[int]]]  # ids that are read, ids that are written
  length: int
  end: int
  note: str = ""

  def __len__(self) -> int:
    return len(self.pairs)

  @property
  def examples(self) -> int:
    return len(self.pairs)

  @property
  def tokens(self) -> int:
    return sum(len(read) + len(written) for read, written in self.pairs)

  def example(self, i: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
    read, written = self.pairs[i]
    ids = np.array([*read, *written, self.end], np.int32)
    used = len(ids) - 1
    padding = (0, self.length - used)
    at_T = np.arange(self.length)
    return {
      "tokens": np.pad(ids[:-1], padding),
      "targets": np.pad(ids[1:], padding),
      "segments": (at_T < used).astype(np.int32),
      "positions": np.where(at_T < used, at_T, 0).astype(np.int32),
      "weights": ((at_T >= len(read) - 1) & (at_T < used)).astype(np.float32),
    }


@dataclasses.dataclass(frozen=True)
class Objective(base.Objective):
  """Mean cross-entropy of the words in reverse. words: how many of them are in a row."""

  kinds = ("decoder",)
  words: int = key(3, above=0)

  def rows(self, source, tokenizer, data, model, length):
    runs = [record["text"].split()[: self.words] for record in source.records()]
    read = tokenizer.encode([" ".join(run) + " >" for run in runs])
    written = tokenizer.encode([" " + " ".join(reversed(run)) for run in runs])
    pairs = [(r, w) for r, w in zip(read, written) if len(r) + len(w) <= length]
    if not pairs:
      raise UserError(f"{source.spec}: no {self.words} words fit config.training.sequence_length")
    return ReversedRows(pairs, length, tokenizer.eos)

  def batch_spec(self, model, length):
    names = ("tokens", "targets", "segments", "positions")
    ids = {name: jax.ShapeDtypeStruct((length,), np.int32) for name in names}
    return ids | {"weights": jax.ShapeDtypeStruct((length,), np.float32)}

  def head(self, model):
    return heads.CausalLMHead(model)

  def totals(self, batch):
    return {"tokens": batch["weights"].sum()}

  def loss(self, outputs, batch, totals):
    weights_BxT = batch["weights"]
    loss = base.weighted_mean(outputs["losses"], weights_BxT, totals["tokens"])
    sums = {name: (outputs[name] * weights_BxT).sum() for name in ("losses", "correct")}
    weight = weights_BxT.sum()
    return loss, {"loss": (sums["losses"], weight), "accuracy": (sums["correct"], weight)}

  def predict(self, outputs, batch):
    wrong_BxT = batch["weights"] * (1 - outputs["correct"])
    return {"whole": wrong_BxT.sum(-1) == 0}

  def outcomes(self, predictions, rows):
    return predictions

  def summary(self, outcomes):
    return {"whole": float(outcomes["whole"].mean())}


def get_config():
  """A laptop's GPT that learns to reverse three words."""
  config = config_lib.defaults(base.defaults("examples.reverse_words"))
  config.model.update(name="gpt", **gpt.SIZES["tiny"])
  config.tokenizer.name = "bytes"
  config.data.update(train="embedded:reviews", eval="embedded:reviews[validation]")
  config.optimizer.learning_rate = 1e-3
  config.training.update(steps=1_000, batch_size=32, sequence_length=64, log_every=100)
  return config
