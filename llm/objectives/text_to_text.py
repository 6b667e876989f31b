"""Any task as text to text (T5): an input, a target, and for tasks with few answers the likelihood of each."""

import dataclasses
import re
import string

import jax.numpy as jnp
import numpy as np

from llm.config import key
from llm.core import UserError
from llm.data import answers, packing, pairs
from llm.data.sources import Source
from llm.data.tokenizer import Tokenizer
from llm.objectives import base, causal_lm

LEAST = 16  # tokens of a row that a pair takes at least


@dataclasses.dataclass(frozen=True)
class Pair:
  """Ids of an input and a target of one record. gold: whether the target is the record's own."""

  record: int
  gold: bool
  given: np.ndarray
  target: np.ndarray


@dataclasses.dataclass(frozen=True)
class PairRows:
  """Pairs packed into rows, at most `slots` in one."""

  pairs: list[Pair]
  packed: list[np.ndarray]
  input_length: int
  target_length: int
  slots: int
  pad: int
  truncated: int
  inputs: list[str]  # of each record, as the template has it
  gold: list[tuple[str, ...]]  # what may be written for it

  @property
  def tokens(self) -> int:
    return sum(len(pair.given) + len(pair.target) for pair in self.pairs)

  @property
  def examples(self) -> int:
    return len(self)

  @property
  def note(self) -> str:
    return (
      f"{len(self.pairs)} pairs in {len(self)} rows; {self.truncated} inputs were cut at "
      f"config.training.sequence_length={self.input_length}"
    )

  def __len__(self) -> int:
    return len(self.packed)

  def example(self, i, rng):
    of_row = [self.pairs[number] for number in self.packed[i]]
    texts = [(pair.given, pair.target) for pair in of_row]
    row = pairs.row(texts, self.input_length, self.target_length, self.pad)
    # Targets that are not the record's are scored, not learned.
    gold = np.r_[0.0, [pair.gold for pair in of_row]].astype(np.float32)
    return {**row, "weights": gold[row["decoder_segments"]]}


@dataclasses.dataclass(frozen=True)
class Objective(causal_lm.Objective, base.Writes):
  """Cross-entropy of the target given the input (Raffel et al. 2020, section 2.4).

  template: the input, with the fields of a record in braces. targets: "label=text", what is written
  for each label, and the choices whose likelihoods are compared; without them the target is the
  record's `target`, or its first answer. target_length: tokens of a row's targets.
  """

  template: str = "{text}"
  targets: tuple = ()
  target_length: int = key(64, at_least=2)

  kinds = ("encoder_decoder",)

  def __post_init__(self):
    super().__post_init__()
    if bad := [t for t in self.targets if not re.fullmatch(r"[^=]+=.+", t)]:
      raise UserError(f"config.objective.targets: {bad[0]!r} is not of the form 'label=text'")
    try:
      self.template.format_map(dict.fromkeys(self._fields(), ""))
    except (ValueError, KeyError, IndexError) as error:
      raise UserError(f"config.objective.template={self.template!r} is no template: {error}")

  def _fields(self) -> list[str]:
    return [name for _, name, _, _ in string.Formatter().parse(self.template) if name is not None]

  def rows(self, source, tokenizer, data, model, length):
    return self._rows(source, tokenizer, length, choices=False)

  def eval_rows(self, source, tokenizer, data, model, length):
    return self._rows(source, tokenizer, length, choices=True)

  def batch_spec(self, model, length):
    return pairs.row_spec(length, self.target_length)

  def _rows(self, source: Source, tokenizer: Tokenizer, length: int, choices: bool) -> PairRows:
    tokenizer.require("pad", "eos")
    records = list(source.records())
    inputs = [self._input(record, source) for record in records]
    texts = [self._texts(record, source, choices) for record in records]
    encoded, truncated = self._encoded(inputs, texts, records, source, tokenizer, length)
    sizes = pairs.sizes(
      np.array([len(pair.given) for pair in encoded]),
      np.array([len(pair.target) for pair in encoded]),
      length,
      self.target_length,
    )
    return PairRows(
      encoded,
      packing.into_rows(sizes, length, LEAST),
      length,
      self.target_length,
      packing.slots(length, LEAST),
      tokenizer.pad,
      truncated,
      inputs,
      [self._gold(record, of_record) for record, of_record in zip(records, texts)],
    )

  def _encoded(self, inputs, texts, records, source, tokenizer, length) -> tuple[list[Pair], int]:
    """A pair for each target of each record, and how many inputs were cut."""
    targets = iter(tokenizer.encode([text for of_record in texts for text, _ in of_record]))
    encoded, truncated = [], 0
    for number, (ids, of_record) in enumerate(zip(tokenizer.encode(inputs), texts)):
      truncated += len(ids) >= length
      given = np.array([*ids[: length - 1], tokenizer.eos], np.int32)
      for _, gold in of_record:
        target = np.array([*next(targets), tokenizer.eos], np.int32)
        if len(target) > self.target_length:
          raise UserError(
            f"{records[number].get('_where', source.spec)}: the target has {len(target)} tokens, "
            f"more than config.objective.target_length={self.target_length}"
          )
        encoded.append(Pair(number, gold, given, target))
    return encoded, truncated

  def _gold(self, record: dict, texts: list[tuple[str, bool]]) -> tuple[str, ...]:
    """What may be written for a record."""
    if record.get("answers") and not self.targets:
      return tuple(text for text, _ in answers.given(record))
    return tuple(text for text, right in texts if right)

  def _input(self, record, source) -> str:
    where = record.get("_where", source.spec)
    if missing := [name for name in self._fields() if name not in record]:
      raise UserError(f"{where}: no field {missing[0]!r}, which config.objective.template asks for")
    return self.template.format_map(record)

  def _texts(self, record, source, choices: bool) -> list[tuple[str, bool]]:
    """(target, whether it is the record's): that alone, or each of the choices."""
    where = record.get("_where", source.spec)
    if self.targets:
      known = dict(t.split("=", 1) for t in self.targets)
      label = str(record.get("label"))
      if label not in known:
        raise UserError(
          f"{where}: unknown label {label!r}; config.objective.targets knows {', '.join(known)}"
        )
      return [(text, name == label) for name, text in known.items() if choices or name == label]
    target = record.get("target")
    if target is None and record.get("answers"):
      target = answers.given(record)[0][0]
    if not isinstance(target, str) or not target.strip():
      raise UserError(
        f"{where}: the target is missing or empty; records need a field 'target' "
        "(config.data.fields='target=THEIR_NAME' renames it)"
      )
    return [(target, True)]

  def predict(self, outputs, batch):
    """BxKx2 a target: its log-likelihood in nats, and 1 where greedy decoding writes exactly it."""
    slots = packing.slots(batch["tokens"].shape[1], LEAST)
    of_pair_BxKxT = batch["decoder_segments"][:, None] == 1 + jnp.arange(slots)[:, None]
    likelihood = -(outputs["losses"][:, None] * of_pair_BxKxT).sum(-1)
    # Greedy decoding stays on the target as long as each next token of it is the likeliest.
    written = jnp.where(of_pair_BxKxT, outputs["correct"][:, None] > 0, True).all(-1)
    return {"pairs": jnp.stack([likelihood, written], -1)}

  def outcomes(self, predictions, rows: PairRows):
    scores = {
      n: predictions["pairs"][row, slot]
      for row, numbers in enumerate(rows.packed[: len(predictions["pairs"])])
      for slot, n in enumerate(numbers)
    }
    best, written, length = {}, {}, {}
    for n, (likelihood, exact) in scores.items():
      pair = rows.pairs[n]
      best[pair.record] = max(best.get(pair.record, (-np.inf, False)), (likelihood, pair.gold))
      if pair.gold:
        written[pair.record], length[pair.record] = exact, (-likelihood, len(pair.target))
    records = sorted(written)
    out = {
      "exact_match": np.array([written[r] for r in records]),
      "loss": np.array([length[r] for r in records]),
    }
    if self.targets:
      out["choice_accuracy"] = np.array([best[r][1] for r in records], float)
    return out

  def written(self, write, rows: PairRows):
    """Outcomes of the texts that the model writes itself: exact match and F1 as SQuAD has them, the best of several
    gold targets. write: inputs -> texts, of at most target_length tokens."""
    texts = write(rows.inputs, self.target_length)
    return {
      f"written_{name}": np.array([score(text, gold) for text, gold in zip(texts, rows.gold)])
      for name, score in (("exact_match", answers.exact_match), ("f1", answers.f1))
    }

  def summary(self, outcomes):
    return {
      name: float(values[:, 0].sum() / values[:, 1].sum())
      if name == "loss"
      else float(values.mean())
      for name, values in outcomes.items()
    }
