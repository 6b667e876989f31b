"""Classification of texts and pairs of texts, and regression on a score (num_classes=1)."""

import dataclasses
import math
from typing import NamedTuple, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import scipy.stats
import sklearn.metrics

from llm import models
from llm.config import key
from llm.core import UserError
from llm.data import packing
from llm.data.sources import Source
from llm.data.tokenizer import Tokenizer
from llm.models import heads
from llm.models.architecture import Facts
from llm.objectives import base

LEAST = 8  # tokens of a row that a text takes at least


class Labelled(NamedTuple):
  """One record: its ids, their types, and its label (0 where it is not known)."""

  tokens: list[int]
  types: list[int]
  label: float


@dataclasses.dataclass(frozen=True)
class LabelledRows:
  """Encoded records packed into rows, at most `slots` in one."""

  encoded: list[Labelled]
  packed: list[np.ndarray]  # row -> numbers of records
  length: int
  slots: int
  pad: int
  truncated: int
  label_type: type

  @property
  def tokens(self) -> int:
    return sum(len(record.tokens) for record in self.encoded)

  @property
  def examples(self) -> int:
    return len(self.encoded)

  @property
  def labels(self) -> np.ndarray:
    return np.array([record.label for record in self.encoded])

  @property
  def note(self) -> str:
    return (
      f"{self.examples} examples in {len(self)} rows, "
      f"{self.tokens / (len(self) * self.length):.1%} full; {self.truncated} were cut at "
      f"config.training.sequence_length={self.length}"
    )

  def apart(self) -> "LabelledRows":
    """The same records, one a row, in order."""
    return dataclasses.replace(self, packed=list(np.arange(self.examples)[:, None]), slots=1)

  def __len__(self) -> int:
    return len(self.packed)

  def example(self, i, rng):
    records = [self.encoded[number] for number in self.packed[i]]
    examples = [{"tokens": record.tokens, "types": record.types} for record in records]
    row, firsts = packing.lay_out(examples, self.length, self.pad)
    labels = [record.label for record in records]
    return {
      **row,
      "firsts": packing.in_slots(firsts, self.slots, np.int32),
      "labels": packing.in_slots(labels, self.slots, self.label_type),
      "label_weights": packing.slots_in_use(len(labels), self.slots),
    }


@dataclasses.dataclass(frozen=True)
class Objective(base.Labels):
  """Cross-entropy over classes, or squared error where num_classes is 1 (BERT, section 4.1).

  num_classes: 0 counts them in the training data; 1 is regression. classes: their names, in order;
  empty takes them from the data. pooling: see heads.ClassificationHead; auto is first for encoders
  and last for decoders.
  """

  num_classes: int = key(0, at_least=0)
  classes: tuple = ()
  pooling: str = key("auto", choices=("auto", "first", "last", "mean"))

  kinds = ("encoder", "decoder")
  optional = ("text_pair",)

  def __post_init__(self):
    super().__post_init__()
    if self.classes and self.num_classes not in (0, len(self.classes)):
      raise UserError(
        f"config.objective.num_classes={self.num_classes} does not fit the classes "
        f"{', '.join(self.classes)}"
      )

  @property
  def regression(self) -> bool:
    return self.num_classes == 1

  @property
  def label_type(self) -> type:
    return np.float32 if self.regression else np.int32

  def fit(self, sources, tokenizer):
    if self.regression or self.classes:
      return self
    if not sources:  # two classes are assumed where nobody says how many
      return dataclasses.replace(self, num_classes=self.num_classes or 2)
    labels = {_label(record, source) for source in sources for record in source.records()}
    try:
      classes = tuple(sorted(labels, key=int))
    except ValueError:
      classes = tuple(sorted(labels))
    if len(classes) < 2:
      raise UserError(
        f"{sources[0].spec}: only the label {classes[0]!r} occurs; classification needs "
        "two (for a score to predict, set config.objective.num_classes=1)"
      )
    return dataclasses.replace(self, classes=classes, num_classes=self.num_classes or len(classes))

  def rows(self, source, tokenizer, data, model, length):
    records = list(source.records())
    labels = [self._target(record, source) for record in records]
    return self.encode(records, tokenizer, model, length, labels)

  def encode(self, records, tokenizer, model, length, labels: Sequence[float] = ()) -> LabelledRows:
    facts = models.facts(model)
    tokenizer.require(*filter(None, (facts.begin, facts.end)))
    for record in records:
      if not isinstance(record.get("text_pair", ""), str):
        raise UserError(f"{_where(record)}: the field 'text_pair' must be a string")
    first = tokenizer.encode([record["text"] for record in records])
    second = [None] * len(first)
    if any("text_pair" in record for record in records):
      second = tokenizer.encode([record.get("text_pair", "") for record in records])
    encoded, truncated = [], 0
    for a, b, label in zip(first, second, labels or [0.0] * len(records)):
      tokens, types, cut = _assemble(a, b, tokenizer, facts, length)
      encoded.append(Labelled(tokens, types, label))
      truncated += cut
    sizes = np.array([len(record.tokens) for record in encoded])
    return LabelledRows(
      encoded,
      packing.into_rows(sizes, length, LEAST),
      length,
      packing.slots(length, LEAST),
      max(tokenizer.pad, 0),
      truncated,
      self.label_type,
    )

  def batch_spec(self, model, length):
    slots = packing.slots(length, LEAST)
    return {
      **base.row_spec(length, "types"),
      "firsts": base.int_spec(slots),
      "labels": jax.ShapeDtypeStruct((slots,), self.label_type),
      "label_weights": base.float_spec(slots),
    }

  def label_name(self, label):
    return self.classes[int(label)] if self.classes else str(float(label))

  def _target(self, record: dict, source: Source) -> float:
    label = _label(record, source)
    if self.regression:
      try:
        value = float(label)
      except ValueError:
        value = math.nan
      if not math.isfinite(value):
        raise UserError(
          f"{_where(record, source)}: the label {label!r} is no number, which regression "
          "(num_classes=1) needs"
        )
      return value
    if label not in self.classes:
      raise UserError(
        f"{_where(record, source)}: unknown label {label!r}; the classes are "
        f"{', '.join(self.classes)}"
      )
    return float(self.classes.index(label))

  def head(self, config):
    pooling = self.pooling
    if pooling == "auto":
      pooling = "first" if models.facts(config).kind == "encoder" else "last"
    return heads.ClassificationHead(config, self.num_classes, pooling)

  def totals(self, batch):
    return {"examples": batch["label_weights"].sum()}

  def loss(self, outputs, batch, totals):
    logits_BxNxC, labels_BxN = outputs["logits"], batch["labels"]
    weights_BxN, weight = batch["label_weights"], batch["label_weights"].sum()
    if self.regression:
      losses_BxN = jnp.square(logits_BxNxC[..., 0] - labels_BxN)
      return (
        base.weighted_mean(losses_BxN, weights_BxN, totals["examples"]),
        {"loss": ((losses_BxN * weights_BxN).sum(), weight)},
      )
    losses_BxN = base.cross_entropy(logits_BxNxC, labels_BxN)
    correct_BxN = logits_BxNxC.argmax(-1) == labels_BxN
    return (
      base.weighted_mean(losses_BxN, weights_BxN, totals["examples"]),
      {
        "loss": ((losses_BxN * weights_BxN).sum(), weight),
        "accuracy": ((correct_BxN * weights_BxN).sum(), weight),
      },
    )

  def predict(self, outputs, batch):
    if self.regression:
      return {"score": outputs["logits"][..., 0]}
    return {"probabilities": jax.nn.softmax(outputs["logits"])}

  def results(self, predictions, rows: LabelledRows):
    if self.regression:
      return [{"score": float(s)} for s in packing.by_example(rows.packed, predictions["score"])[1]]
    return [
      {
        "label": self.classes[int(p.argmax())],
        "probabilities": {c: round(float(x), 6) for c, x in zip(self.classes, p)},
      }
      for p in packing.by_example(rows.packed, predictions["probabilities"])[1]
    ]

  def outcomes(self, predictions, rows: LabelledRows):
    found_RxN = predictions["score"] if self.regression else predictions["probabilities"].argmax(-1)
    numbers, found = packing.by_example(rows.packed, found_RxN)
    return {"labels": rows.labels[numbers], "found": found}

  def summary(self, outcomes):
    labels, guesses = outcomes["labels"], outcomes["found"]
    if self.regression:
      scores = guesses
      return {
        "pearson": float(scipy.stats.pearsonr(scores, labels)[0]) if len(labels) > 1 else math.nan,
        "spearman": float(scipy.stats.spearmanr(scores, labels)[0])
        if len(labels) > 1
        else math.nan,
      }
    figures = {
      "accuracy": sklearn.metrics.accuracy_score(labels, guesses),
      "macro_f1": sklearn.metrics.f1_score(labels, guesses, average="macro", zero_division=0),
      "mcc": sklearn.metrics.matthews_corrcoef(labels, guesses),
    }
    if len(self.classes) == 2:  # GLUE's F1 is that of the second class
      figures["f1"] = sklearn.metrics.f1_score(labels, guesses, zero_division=0)
    return {name: float(value) for name, value in figures.items()}


def _where(record: dict, source: Source | None = None) -> str:
  return record.get("_where") or (source.spec if source else "a record")


def _label(record: dict, source: Source) -> str:
  if record.get("label") is None:
    raise UserError(
      f"{_where(record, source)}: no label; the field 'label' is needed "
      "(config.data.fields='label=THEIR_NAME' renames it)"
    )
  return str(record["label"])


def _assemble(
  a: list[int], b: list[int] | None, tokenizer: Tokenizer, facts: Facts, length: int
) -> tuple[list[int], list[int], bool]:
  """Token ids and types of one text or pair, the longer part cut first, and whether it was cut.

  Of BERT: [CLS] a [SEP] b [SEP]. Of a decoder: a end b end.
  """
  start = [tokenizer.id_of(facts.begin)] if facts.begin else []
  end = tokenizer.id_of(facts.end)
  room = length - len(start) - (1 if b is None else 2)
  if room < (1 if b is None else 2):
    raise UserError(f"config.training.sequence_length={length} leaves no room for text")
  cut = len(a) + len(b or ()) > room
  while len(a) + len(b or ()) > room:  # as BERT: the longer of the two loses its end
    if b and len(b) > len(a):
      b = b[: max(len(a), room - len(a))]
      b = b[:-1] if len(a) + len(b) > room else b
    else:
      a = a[: max(len(b or ()), room - len(b or ()))]
      a = a[:-1] if len(a) + len(b or ()) > room else a
  tokens = [*start, *a, end]
  types = [0] * len(tokens)
  if b is not None:
    tokens += [*b, end]
    types += [1] * (len(b) + 1)
  return tokens, types, cut
