"""Classification of texts and pairs of texts, and regression on a score (num_classes=1)."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import scipy.stats
import sklearn.metrics

from llm.core import UserError
from llm.data import packing
from llm.models import heads
from llm.objectives import base

LEAST = 8  # tokens of a row that a text takes at least


@dataclasses.dataclass(frozen=True)
class LabelledRows:
  """Encoded records, (tokens, types, label) each, packed into rows, at most `slots` in one."""

  encoded: list[tuple[list[int], list[int], float]]
  packed: list[np.ndarray]  # row -> numbers of records
  length: int
  slots: int
  pad: int
  truncated: int

  @property
  def tokens(self) -> int:
    return sum(len(tokens) for tokens, _, _ in self.encoded)

  @property
  def examples(self) -> int:
    return len(self.encoded)

  @property
  def labels(self) -> np.ndarray:
    return np.array([label for _, _, label in self.encoded])

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

  def __getitem__(self, i: int):
    return self, [self.encoded[n] for n in self.packed[i]]


@dataclasses.dataclass(frozen=True)
class Objective(base.Objective):
  """Cross-entropy over classes, or squared error where num_classes is 1 (BERT, section 4.1).

  num_classes: 0 counts them in the training data; 1 is regression. classes: their names, in order;
  found in the data where empty. pooling: see heads.ClassificationHead; auto is first for encoders
  and last for decoders.
  """

  num_classes: int = 0
  classes: tuple = ()
  pooling: str = "auto"

  def __post_init__(self):
    if self.pooling not in ("auto", "first", "last", "mean"):
      raise UserError(
        f"config.objective.pooling must be auto, first, last or mean, not {self.pooling!r}"
      )
    if self.num_classes < 0 or self.classes and self.num_classes not in (0, len(self.classes)):
      raise UserError(
        f"config.objective.num_classes={self.num_classes} does not fit the classes "
        f"{', '.join(self.classes)}"
      )

  @property
  def regression(self) -> bool:
    return self.num_classes == 1

  def fit(self, sources, tokenizer):
    if self.regression or self.classes:
      return self
    found = {_label(record, source) for source in sources for record in source.records()}
    try:
      classes = tuple(sorted(found, key=int))
    except ValueError:
      classes = tuple(sorted(found))
    if len(classes) < 2:
      raise UserError(
        f"{sources[0].spec}: only the label {classes[0]!r} occurs; classification needs "
        "two (for a score to predict, set config.objective.num_classes=1)"
      )
    return dataclasses.replace(self, classes=classes, num_classes=self.num_classes or len(classes))

  def rows(self, source, tokenizer, data, model, length):
    return self.encode(list(source.records()), tokenizer, model, length, source)

  def encode(self, records, tokenizer, model, length, source=None) -> LabelledRows:
    """Records -> rows. Without a source the labels are not looked at: for prediction."""
    tokenizer.require("cls", "sep") if model.name == "bert" else tokenizer.require("eos")
    labels = [self._target(r, source) if source else 0.0 for r in records]
    for record in records:
      if not isinstance(record.get("text_pair", ""), str):
        raise UserError(f"{_where(record, source)}: the field 'text_pair' must be a string")
    paired = any("text_pair" in r for r in records)
    first = tokenizer.encode([r["text"] for r in records])
    second = (
      tokenizer.encode([r.get("text_pair", "") for r in records]) if paired else [None] * len(first)
    )
    encoded, truncated = [], 0
    for a, b, label in zip(first, second, labels):
      tokens, types, cut = _assemble(a, b, tokenizer, model.name == "bert", length)
      encoded.append((tokens, types, label))
      truncated += cut
    packed = packing.into_rows(np.array([len(tokens) for tokens, _, _ in encoded]), length, LEAST)
    slots = packing.slots(length, LEAST)
    return LabelledRows(encoded, packed, length, slots, max(tokenizer.pad, 0), truncated)

  def _target(self, record, source) -> float:
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

  def example(self, row, rng):
    rows, records = row
    examples = [(tokens, types) for tokens, types, _ in records]
    out, firsts = packing.lay_out(examples, rows.length, rows.pad)
    labels = [label for _, _, label in records]
    kind = np.float32 if self.regression else np.int32
    return {
      **out,
      "firsts": packing.in_slots(firsts, rows.slots, np.int32),
      "labels": packing.in_slots(labels, rows.slots, kind),
      "label_weights": packing.in_slots(np.ones(len(labels)), rows.slots, np.float32),
    }

  def head(self, model):
    pooling = self.pooling
    if pooling == "auto":
      pooling = "first" if model.name == "bert" else "last"
    return heads.ClassificationHead(model, self.num_classes, pooling)

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

  def results(self, predictions, rows):
    if self.regression:
      return [{"score": float(s)} for s in packing.by_example(rows.packed, predictions["score"])[1]]
    return [
      {
        "label": self.classes[int(p.argmax())],
        "probabilities": {c: round(float(x), 6) for c, x in zip(self.classes, p)},
      }
      for p in packing.by_example(rows.packed, predictions["probabilities"])[1]
    ]

  def outcomes(self, predictions, rows):
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


def _where(record, source) -> str:
  return record.get("_where") or (source.spec if source else "a record")


def _label(record, source) -> str:
  if record.get("label") is None:
    raise UserError(
      f"{_where(record, source)}: no label; the field 'label' is needed "
      "(config.data.fields='label=THEIR_NAME' renames it)"
    )
  return str(record["label"])


def _assemble(a, b, tokenizer, encoder: bool, length: int) -> tuple[list[int], list[int], bool]:
  """Token ids and types of one text or pair, the longer part cut first, and whether it was cut.

  Encoder: [CLS] a [SEP] b [SEP]. Decoder: a end b end.
  """
  start, end = ([tokenizer.cls], tokenizer.sep) if encoder else ([], tokenizer.eos)
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
