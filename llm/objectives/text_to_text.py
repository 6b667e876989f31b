"""Any task as text to text (T5): from an input the model writes a target.

A task with few possible targets is scored by the likelihood of each of them, too.
"""

import dataclasses
import re
import string
from typing import Sequence

import jax.numpy as jnp
import numpy as np

from llm.config import key
from llm.core import UserError
from llm.data import answers, packing, pairs
from llm.data.sources import Source
from llm.data.tokenizer import Tokenizer
from llm.objectives import base, causal_lm

LEAST = 16  # a pair takes at least so many tokens of a row


Targets = list[tuple[str, bool]]  # (text, whether it is right) of a record


@dataclasses.dataclass(frozen=True)
class Pair:
  """The ids of an input and of a target. record: its number. gold: whether the target is right."""

  record: int
  gold: bool
  input: np.ndarray
  target: np.ndarray


@dataclasses.dataclass(frozen=True)
class PairRows:
  """Pairs packed into rows, at most `slots` in one.

  packed: the numbers of the pairs of each row. truncated: how many inputs were cut. inputs: the
  input of each record, as text. gold: the right targets of each record.
  """

  pairs: list[Pair]
  packed: list[np.ndarray]
  input_length: int
  target_length: int
  slots: int
  pad: int
  truncated: int
  inputs: list[str]
  gold: list[tuple[str, ...]]

  @property
  def tokens(self) -> int:
    return sum(len(pair.input) + len(pair.target) for pair in self.pairs)

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
    pairs_of_row = [self.pairs[number] for number in self.packed[i]]
    texts = [(pair.input, pair.target) for pair in pairs_of_row]
    row = pairs.row(texts, self.input_length, self.target_length, self.pad)
    # Wrong targets are scored but not learned. Segment 0 is padding.
    weights = np.array([0.0, *(pair.gold for pair in pairs_of_row)], np.float32)
    return {**row, "weights": weights[row["decoder_segments"]]}


@dataclasses.dataclass(frozen=True)
class Objective(causal_lm.Objective, base.Writes):
  """Cross-entropy of the target given the input, in nats (Raffel et al. 2020, section 2.4).

  template: the input, with the fields of a record in braces. targets: "label=text", the target of
  each label; evaluations compare their likelihoods. () takes the field `target` of a record, or
  else its first answer. target_length: the tokens of a row's targets.
  """

  template: str = "{text}"
  targets: tuple = ()
  target_length: int = key(64, at_least=2)

  kinds = ("encoder_decoder",)

  def __post_init__(self):
    super().__post_init__()
    for target in self.targets:
      if not re.fullmatch(r"[^=]+=.+", target):
        raise UserError(f"config.objective.targets: {target!r} is not of the form 'label=text'")
    try:
      self.template.format_map(dict.fromkeys(self._fields(), ""))
    except (ValueError, KeyError, IndexError) as error:
      raise UserError(f"config.objective.template={self.template!r} is no template: {error}")

  def _fields(self) -> list[str]:
    """The fields of a record that the template names."""
    return [name for _, name, _, _ in string.Formatter().parse(self.template) if name is not None]

  def rows(self, source, tokenizer, data, model, length):
    return self._rows(source, tokenizer, length, choices=False)

  def eval_rows(self, source, tokenizer, data, model, length):
    return self._rows(source, tokenizer, length, choices=True)

  def batch_spec(self, model, length):
    return pairs.row_spec(length, self.target_length)

  def _rows(self, source: Source, tokenizer: Tokenizer, length: int, choices: bool) -> PairRows:
    """The rows of a source. choices: with a pair for each of `targets`, right or wrong."""
    tokenizer.require("pad", "eos")
    records = list(source.records())
    inputs = [self._input(record, source) for record in records]
    targets = [self._targets(record, source, choices) for record in records]
    where = [record.get("_where", source.spec) for record in records]
    encoded, truncated = self._encoded(inputs, targets, where, tokenizer, length)
    sizes = pairs.sizes(
      np.array([len(pair.input) for pair in encoded]),
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
      [self._gold(record, of_record) for record, of_record in zip(records, targets)],
    )

  def _encoded(
    self,
    inputs: Sequence[str],
    targets: Sequence[Targets],
    where: Sequence[str],
    tokenizer: Tokenizer,
    length: int,
  ) -> tuple[list[Pair], int]:
    """(a pair for each target of each record, how many inputs were cut).

    where: the place of each record, for errors.
    """
    target_texts = [text for of_record in targets for text, _ in of_record]
    target_ids = iter(tokenizer.encode(target_texts))
    encoded = []
    truncated = 0
    for number, input_ids in enumerate(tokenizer.encode(inputs)):
      truncated += len(input_ids) >= length
      encoder_input = np.array([*input_ids[: length - 1], tokenizer.eos], np.int32)
      for _, gold in targets[number]:
        target = np.array([*next(target_ids), tokenizer.eos], np.int32)
        if len(target) > self.target_length:
          raise UserError(
            f"{where[number]}: the target has {len(target)} tokens, more than "
            f"config.objective.target_length={self.target_length}"
          )
        encoded.append(Pair(number, gold, encoder_input, target))
    return encoded, truncated

  def _gold(self, record: dict, targets: Targets) -> tuple[str, ...]:
    """The texts that are right for a record: all of its answers, or its target."""
    if record.get("answers") and not self.targets:
      return tuple(text for text, _ in answers.given(record))
    return tuple(text for text, is_gold in targets if is_gold)

  def _input(self, record: dict, source: Source) -> str:
    """The text of a record by the template. Raises UserError if it lacks a field."""
    where = record.get("_where", source.spec)
    if missing := [name for name in self._fields() if name not in record]:
      raise UserError(f"{where}: no field {missing[0]!r}, which config.objective.template asks for")
    return self.template.format_map(record)

  def _targets(self, record: dict, source: Source, choices: bool) -> Targets:
    """The right target of a record, or with `choices` all of `targets`. Raises UserError."""
    where = record.get("_where", source.spec)
    if self.targets:
      text_of_label = dict(target.split("=", 1) for target in self.targets)
      label = str(record.get("label"))
      if label not in text_of_label:
        raise UserError(
          f"{where}: unknown label {label!r}; config.objective.targets knows "
          f"{', '.join(text_of_label)}"
        )
      if not choices:
        return [(text_of_label[label], True)]
      return [(text, name == label) for name, text in text_of_label.items()]
    target = record.get("target")
    if target is None and (given := answers.given(record)):
      target = given[0][0]
    if not isinstance(target, str) or not target.strip():
      raise UserError(
        f"{where}: the target is missing or empty; records need a field 'target' "
        "(config.data.fields='target=THEIR_NAME' renames it)"
      )
    return [(target, True)]

  def predict(self, outputs, batch):
    """(log-likelihood in nats, 1 if greedy decoding writes it exactly) of each target: BxKx2."""
    slots = packing.slots(batch["tokens"].shape[1], LEAST)
    of_pair_BxKxT = batch["decoder_segments"][:, None] == 1 + jnp.arange(slots)[:, None]
    likelihood_BxK = -(outputs["losses"][:, None] * of_pair_BxKxT).sum(-1)
    # Greedy decoding writes the target if each of its tokens is the likeliest after those before.
    is_written_BxK = jnp.where(of_pair_BxKxT, outputs["correct"][:, None] > 0, True).all(-1)
    return {"pairs": jnp.stack([likelihood_BxK, is_written_BxK], -1)}

  def outcomes(self, predictions, rows: PairRows):
    likeliest = {}  # record -> (log-likelihood, whether it is right) of its likeliest target
    is_written = {}  # record -> whether greedy decoding writes its right target
    losses = {}  # record -> (loss, tokens) of its right target
    for row, numbers in enumerate(rows.packed[: len(predictions["pairs"])]):
      for slot, number in enumerate(numbers):
        likelihood, exact = predictions["pairs"][row, slot]
        pair = rows.pairs[number]
        scored = (likelihood, pair.gold)
        likeliest[pair.record] = max(likeliest.get(pair.record, (-np.inf, False)), scored)
        if pair.gold:
          is_written[pair.record] = exact
          losses[pair.record] = (-likelihood, len(pair.target))
    records = sorted(is_written)
    outcomes = {
      "exact_match": np.array([is_written[record] for record in records]),
      "loss": np.array([losses[record] for record in records]),
    }
    if self.targets:
      outcomes["choice_accuracy"] = np.array([likeliest[record][1] for record in records], float)
    return outcomes

  def written(self, write, rows: PairRows):
    """Exact match and F1 of the texts that the model writes, as SQuAD defines them.

    Where several texts are right, the best score counts. The texts have at most target_length
    tokens.
    """
    texts = write(rows.inputs, self.target_length)
    outcomes = {}
    for name, score in (("exact_match", answers.exact_match), ("f1", answers.f1)):
      scores = [score(text, gold) for text, gold in zip(texts, rows.gold)]
      outcomes[f"written_{name}"] = np.array(scores)
    return outcomes

  def summary(self, outcomes):
    figures = {}
    for name, values in outcomes.items():
      if name == "loss":  # a mean over tokens
        figures[name] = float(values[:, 0].sum() / values[:, 1].sum())
      else:
        figures[name] = float(values.mean())
    return figures
