"""Classification of texts and pairs of texts, and regression on a score (num_classes=1)."""

import dataclasses
import math
from typing import Any, Mapping, NamedTuple, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import scipy.stats

from llm import models
from llm.config import key
from llm.core import UserError, warn
from llm.data import hubs, packing, suspicions
from llm.data.sources import Source
from llm.data.tokenizer import Tokenizer
from llm.models import heads
from llm.models.architecture import Facts
from llm.objectives import base

LEAST = 8  # a text takes at least so many tokens of a row
FEW_CUT = 0.01  # the share of cut texts that a run advises
MOST_NAMED = 10  # classes of which a run says how many examples each has


class Labelled(NamedTuple):
  """A record: its ids and their types, and its label, 0 if it is not known.

  size: how many ids it would have, were it not cut.
  """

  size: int
  tokens: list[int]
  types: list[int]
  label: float


@dataclasses.dataclass(frozen=True)
class LabelledRows:
  """Encoded records packed into rows of `length` tokens, at most `slots` in one.

  packed: the numbers of the records of each row. empty: how many records have no text.
  """

  encoded: list[Labelled]
  packed: list[np.ndarray]
  empty: int
  length: int
  slots: int
  pad: int
  label_type: type

  @property
  def tokens(self) -> int:
    return sum(len(record.tokens) for record in self.encoded)

  @property
  def examples(self) -> int:
    return len(self.encoded)

  @property
  def labels(self) -> np.ndarray:
    """The label of each record."""
    return np.array([record.label for record in self.encoded])

  @property
  def note(self) -> str:
    fill = self.tokens / (len(self) * self.length)
    note = f"{self.examples} examples in {len(self)} rows, {fill:.1%} full"
    sizes = np.array([record.size for record in self.encoded])
    cut = int((sizes > self.length).sum())
    note += f"; {self.empty:,} are empty; "
    note += f"{cut:,} were cut at config.training.sequence_length={self.length}"
    needed = math.ceil(np.quantile(sizes, 1 - FEW_CUT))
    if needed > self.length:
      note += f" ({cut / len(sizes):.1%}; {needed} would cut {FEW_CUT:.0%})"
    return note

  def apart(self) -> "LabelledRows":
    """The same records in order, each in a row of its own."""
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
  """Cross-entropy over classes, or squared error on a score (Devlin et al. 2019, section 4.1).

  num_classes: 0 counts the labels of the training data, and 1 is regression. classes: the names in
  order; () takes the labels of the training data, in the order of tfds: and hf:, of whole numbers
  or of the alphabet. baseline: a run also says what models without a network reach. pooling: see
  heads.ClassificationHead; auto is first for encoders and last for decoders.
  """

  num_classes: int = key(0, at_least=0)
  classes: tuple = ()
  baseline: bool = True
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
  def goal(self) -> str:
    return "max:pearson" if self.regression else "max:accuracy"

  @property
  def regression(self) -> bool:
    """Whether a score is predicted, not a class."""
    return self.num_classes == 1

  @property
  def label_type(self) -> type:
    """The NumPy type of a label."""
    return np.float32 if self.regression else np.int32

  def fit(self, sources, tokenizer):
    if self.regression or self.classes:
      return self
    if not sources:
      return dataclasses.replace(self, num_classes=self.num_classes or 2)
    labels: dict[str, Any] = {}  # as records have them
    places: dict[str, str] = {}  # where each stands first
    for source in sources:
      for record in source.records():
        name = _label(record, source)
        labels.setdefault(name, record["label"])
        places.setdefault(name, _where(record, source))
    suspicions.warn_of_numbers(places)
    classes = _in_order(labels)
    if len(classes) < 2:
      raise UserError(
        f"{sources[0].spec}: only the label {classes[0]!r} occurs; classification needs "
        "two (for a score to predict, set config.objective.num_classes=1)"
      )
    num_classes = self.num_classes or len(classes)
    return dataclasses.replace(self, classes=tuple(classes), num_classes=num_classes)

  def rows(self, source, tokenizer, data, model, length):
    records = list(source.records())
    labels = [self._target(record, source) for record in records]
    return self.encode(records, tokenizer, model, length, labels)

  def eval_rows(self, source, tokenizer, data, model, length):
    rows = self.rows(source, tokenizer, data, model, length)
    if rows.examples > 1 and len(set(rows.labels)) == 1:
      label = self.label_name(rows.labels[0])
      warn(f"{source.spec}: all of its labels are {label}, so its figures say little")
    return rows

  def encode(self, records, tokenizer, model, length, labels: Sequence[float] = ()) -> LabelledRows:
    """The rows of records. labels: of each record; () is for labels that are not known."""
    facts = models.facts(model)
    tokenizer.require(*filter(None, (facts.begin, facts.end)))
    for record in records:
      if not isinstance(record.get("text_pair", ""), str):
        raise UserError(f"{_where(record)}: the field 'text_pair' must be a string")
    texts = tokenizer.encode([record["text"] for record in records])
    text_pairs = [None] * len(texts)
    if any("text_pair" in record for record in records):
      text_pairs = tokenizer.encode([record.get("text_pair", "") for record in records])
    encoded = []
    labels = labels or [0.0] * len(records)
    for text, text_pair, label in zip(texts, text_pairs, labels):
      tokens, types, cut = _assemble(text, text_pair, tokenizer, facts, length)
      encoded.append(Labelled(len(tokens) + cut, tokens, types, label))
    sizes = np.array([len(record.tokens) for record in encoded])
    return LabelledRows(
      encoded,
      packing.into_rows(sizes, length, LEAST),
      sum(not text and not text_pair for text, text_pair in zip(texts, text_pairs)),
      length,
      packing.slots(length, LEAST),
      max(tokenizer.pad, 0),
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

  def remarks(self, rows):
    if self.regression:
      return []
    labels = np.concatenate([r.labels for r in rows]).astype(int)
    counts = np.bincount(labels, minlength=len(self.classes))
    if len(counts) > MOST_NAMED:
      return [f"{len(counts)} classes of {counts.min():,} to {counts.max():,} examples"]
    named = [f"{name} {count:,}" for name, count in zip(self.classes, counts)]
    return [f"{len(counts)} classes: {', '.join(named)}"]

  def baselines(self, train, held_out):
    """The accuracy of the commonest class, and of logistic regression on TF-IDF."""
    if self.regression or not self.baseline:
      return {}
    # Imported here: labelling a text needs no such model.
    from llm.models import classical

    learned = self._texts_and_labels(train)
    asked = self._texts_and_labels([held_out])
    commonest = np.bincount(learned[1]).argmax()
    accuracies = {"majority_accuracy": float((asked[1] == commonest).mean())}
    if (accuracy := classical.baseline_accuracy(learned, asked)) is not None:
      accuracies["tfidf_accuracy"] = accuracy
    return accuracies

  def _texts_and_labels(self, sources: Sequence[Source]) -> tuple[list[str], np.ndarray]:
    texts = []
    labels = []
    for source in sources:
      for record in source.records():
        texts.append(" ".join(filter(None, (record["text"], record.get("text_pair")))))
        labels.append(int(self._target(record, source)))
    return texts, np.array(labels)

  def label_name(self, label):
    return self.classes[int(label)] if self.classes else str(float(label))

  def _target(self, record: dict, source: Source) -> float:
    """The score of a record, or the number of its class. Raises UserError."""
    label = _label(record, source)
    if self.regression:
      try:
        score = float(label)
      except ValueError:
        score = math.nan
      if not math.isfinite(score):
        raise UserError(
          f"{_where(record, source)}: the label {label!r} is no number, which regression "
          "(num_classes=1) needs"
        )
      return score
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
    logits_BxNxC = outputs["logits"]
    labels_BxN = batch["labels"]
    weights_BxN = batch["label_weights"]
    weight = weights_BxN.sum()
    if self.regression:
      losses_BxN = jnp.square(logits_BxNxC[..., 0] - labels_BxN)
    else:
      losses_BxN = base.cross_entropy(logits_BxNxC, labels_BxN)
    loss = base.weighted_mean(losses_BxN, weights_BxN, totals["examples"])
    metrics = {"loss": ((losses_BxN * weights_BxN).sum(), weight)}
    if not self.regression:
      correct_BxN = logits_BxNxC.argmax(-1) == labels_BxN
      metrics["accuracy"] = ((correct_BxN * weights_BxN).sum(), weight)
    return loss, metrics

  def predict(self, outputs, batch):
    if self.regression:
      return {"score": outputs["logits"][..., 0]}
    return {"probabilities": jax.nn.softmax(outputs["logits"])}

  def results(self, predictions, rows: LabelledRows):
    if self.regression:
      _, scores = packing.by_example(rows.packed, predictions["score"])
      return [{"score": float(score)} for score in scores]
    _, probabilities_NxC = packing.by_example(rows.packed, predictions["probabilities"])
    results = []
    for probabilities_C in probabilities_NxC:
      label = self.classes[int(probabilities_C.argmax())]
      rounded = [round(float(probability), 6) for probability in probabilities_C]
      results.append({"label": label, "probabilities": dict(zip(self.classes, rounded))})
    return results

  def outcomes(self, predictions, rows: LabelledRows):
    if self.regression:
      predicted_RxN = predictions["score"]
    else:
      predicted_RxN = predictions["probabilities"].argmax(-1)
    numbers, predicted = packing.by_example(rows.packed, predicted_RxN)
    return {"labels": rows.labels[numbers], "predicted": predicted}

  def summary(self, outcomes):
    labels = outcomes["labels"]
    predicted = outcomes["predicted"]
    if self.regression:
      if np.ptp(labels) == 0 or np.ptp(predicted) == 0:  # equal numbers correlate with nothing
        return {"pearson": math.nan, "spearman": math.nan}
      pearson: Any = scipy.stats.pearsonr(predicted, labels)
      spearman: Any = scipy.stats.spearmanr(predicted, labels)
      return {"pearson": float(pearson.statistic), "spearman": float(spearman.statistic)}
    figures = agreement(labels, predicted)
    f1_C = figures.pop("f1")
    if len(self.classes) == 2:  # GLUE's F1 is that of the second class
      figures["f1"] = f1_C[1] if len(f1_C) > 1 else 0.0
    return {name: float(value) for name, value in figures.items()}


def agreement(labels_N: np.ndarray, predicted_N: np.ndarray) -> dict[str, Any]:
  """Accuracy, macro F1 and Matthews' coefficient of whole numbers, and under f1 that of each class.

  They are scikit-learn's, from the counts of pairs: a bootstrap needs them a thousand times. The F1
  of a class that is never right is 0. Classes that are nowhere do not count in the mean.
  """
  count = int(max(labels_N.max(), predicted_N.max())) + 1
  pairs = np.bincount(labels_N.astype(int) * count + predicted_N, minlength=count**2)
  pairs_CxC = pairs.reshape(count, count).astype(np.float64)
  right_C, labels_C, predicted_C = pairs_CxC.diagonal(), pairs_CxC.sum(1), pairs_CxC.sum(0)
  either_C = labels_C + predicted_C
  f1_C = 2 * right_C / np.maximum(either_C, 1)
  total, right = len(labels_N), right_C.sum()
  spread = (total**2 - labels_C @ labels_C) * (total**2 - predicted_C @ predicted_C)
  return {
    "accuracy": right / total,
    "macro_f1": f1_C[either_C > 0].mean(),
    "mcc": (right * total - labels_C @ predicted_C) / spread**0.5 if spread else 0.0,
    "f1": f1_C,
  }


def _where(record: dict, source: Source | None = None) -> str:
  """Where a record stands, for errors."""
  return record.get("_where") or (source.spec if source else "a record")


def _in_order(labels: Mapping[str, Any]) -> list[str]:
  """The names of classes, in the order of their data set, of whole numbers or of the alphabet.

  labels: by name, as records have them.
  """
  if all(isinstance(label, hubs.ClassName) for label in labels.values()):
    return sorted(labels, key=lambda name: labels[name].number)
  try:
    return sorted(labels, key=int)
  except ValueError:
    return sorted(labels)


def _label(record: dict, source: Source) -> str:
  """The label of a record, as text. Raises UserError if it has none."""
  if record.get("label") is None:
    raise UserError(
      f"{_where(record, source)}: no label; the field 'label' is needed "
      "(config.data.fields='label=THEIR_NAME' renames it)"
    )
  if isinstance(record["label"], list | tuple | dict | np.ndarray):
    raise UserError(
      f"{_where(record, source)}: the label {record['label']!r} must be a text or a number"
    )
  return str(record["label"])


def _assemble(
  text: list[int], text_pair: list[int] | None, tokenizer: Tokenizer, facts: Facts, length: int
) -> tuple[list[int], list[int], int]:
  """(ids, types, how many ids were cut) of one text or pair, in at most `length` tokens.

  For BERT: [CLS] text [SEP] text_pair [SEP]. For a decoder: text end text_pair end.
  """
  start = [tokenizer.id_of(facts.begin)] if facts.begin else []
  end = tokenizer.id_of(facts.end)
  parts = 1 if text_pair is None else 2
  room = length - len(start) - parts
  if room < parts:
    raise UserError(f"config.training.sequence_length={length} leaves no room for text")
  ids = len(text) + len(text_pair or [])
  text, second = _cut(text, text_pair or [], room)
  tokens = [*start, *text, end]
  types = [0] * len(tokens)
  if text_pair is not None:
    tokens += [*second, end]
    types += [1] * (len(second) + 1)
  return tokens, types, ids - len(text) - len(second)


def _cut(first: list[int], second: list[int], room: int) -> tuple[list[int], list[int]]:
  """(first, second) in at most `room` tokens together.

  As in BERT's published code, the longer of the two loses its last token until both fit; where they
  are equal, the first does.
  """
  while len(first) + len(second) > room:
    if len(second) > len(first):
      # At once, as long as it stays the longer one.
      second = second[: max(len(first), room - len(first))]
      if len(first) + len(second) > room:
        second = second[:-1]
    else:
      first = first[: max(len(second), room - len(second))]
      if len(first) + len(second) > room:
        first = first[:-1]
  return first, second
