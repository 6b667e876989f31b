"""Extractive question answering: the answer is a span of the context (BERT on SQuAD)."""

import dataclasses
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np

from llm.config import key
from llm.core import UserError
from llm.data import answers as answers_lib
from llm.data import packing
from llm.models import heads
from llm.objectives import base

LEAST = 32  # tokens of a row that a window takes at least; the loss has an array of slots x T


@dataclasses.dataclass(frozen=True)
class Question:
  """A question with what scoring needs: the untouched text and the gold answers, () where there is none."""

  id: str
  text: str
  gold: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Window:
  """[CLS] question [SEP] part of the context [SEP].

  spans_Nx2: characters of each token of the part. own_N: whether this window gives the token the most context.
  start, end: first and last token of the answer, in the window; 0, [CLS], where it has none.
  """

  question: int
  tokens: np.ndarray
  offset: int  # where the part begins in `tokens`
  spans_Nx2: np.ndarray
  own_N: np.ndarray
  start: int
  end: int

  def arrays(self) -> dict[str, np.ndarray]:
    """What goes with each token: its type, and whether an answer may end, and start, there."""
    places = np.arange(len(self.tokens))
    may_end = (places >= self.offset) & (places < self.offset + len(self.own_N))
    may_start = np.zeros(len(self.tokens), np.int32)
    may_start[may_end] = self.own_N
    return {
      "tokens": self.tokens,
      "types": places >= self.offset,  # 0 of the question, 1 of the part and what ends it
      "may_end": may_end,
      "may_start": may_start,
    }


@dataclasses.dataclass(frozen=True)
class QuestionRows:
  """Windows packed into rows, at most `slots` in one; short contexts share a row."""

  questions: list[Question]
  windows: list[Window]
  packed: list[np.ndarray]  # row -> numbers of windows
  length: int
  slots: int
  pad: int

  @property
  def tokens(self) -> int:
    return sum(len(w.tokens) for w in self.windows)

  @property
  def examples(self) -> int:
    return len(self.windows)

  @property
  def note(self) -> str:
    cut = (np.bincount([w.question for w in self.windows]) > 1).sum()
    return (
      f"{len(self.questions)} questions, {len(self.windows)} windows in {len(self)} rows, "
      f"{self.tokens / (len(self) * self.length):.1%} full; {cut} contexts are longer than a "
      "row"
    )

  def __len__(self) -> int:
    return len(self.packed)

  def example(self, i, rng):
    windows = [self.windows[number] for number in self.packed[i]]
    examples = [window.arrays() for window in windows]
    row, firsts = packing.lay_out(examples, self.length, self.pad)
    slots = {
      "firsts": firsts,
      "starts": firsts + [window.start for window in windows],
      "ends": firsts + [window.end for window in windows],
    }
    row |= {name: packing.in_slots(values, self.slots, np.int32) for name, values in slots.items()}
    return {**row, "window_weights": packing.slots_in_use(len(windows), self.slots)}


@dataclasses.dataclass(frozen=True)
class Objective(base.Answers):
  """Start and end of the answer, each a softmax over a window (Devlin et al. 2019, section 4.2).

  stride: tokens from one window of a long context to the next. longest: tokens of an answer.
  no_answer: questions may have none (SQuAD 2.0, section 4.3); none is given where [CLS] beats the best
  span by more than `threshold`. candidates: starts and ends of a window that are looked at.
  """

  stride: int = key(128, above=0)
  longest: int = key(30, above=0)
  no_answer: bool = False
  threshold: float = 0.0
  candidates: int = key(20, above=0)

  kinds = ("encoder",)
  fields = ("question", "text")

  def rows(self, source, tokenizer, data, model, length):
    records = list(source.records())
    for record in records:
      if not isinstance(record.get("question"), str) or not record["question"].strip():
        raise UserError(
          f"{record.get('_where', source.spec)}: the field 'question' must be a text; questions come from "
          "squad:FILE, or from records with text (the context), question and answers"
        )
      if not self.no_answer and not record.get("answers"):
        raise UserError(
          f"{record.get('_where', source.spec)}: the question has no answer; set config.objective.no_answer=True "
          "if questions may have none (SQuAD 2.0)"
        )
    return self.encode(records, tokenizer, model, length)

  def encode(self, records, tokenizer, model, length) -> QuestionRows:
    """Records -> packed windows. Raises UserError on an answer that is not where it is said to be."""
    tokenizer.require("cls", "sep")
    asked = tokenizer.encode([r["question"] for r in records])
    texts = list(dict.fromkeys(r["text"] for r in records))  # a context has many questions
    encoded = dict(zip(texts, tokenizer.encode_spans(texts)))
    questions, windows = [], []
    for number, (record, question) in enumerate(zip(records, asked)):
      found = answers_lib.given(record)
      questions.append(
        Question(str(record.get("id", number)), record["text"], tuple(text for text, _ in found))
      )
      room = length - len(question) - 3
      if room < 8:
        raise UserError(
          f"{record.get('_where', 'a record')}: the question has {len(question)} tokens and leaves {room} of "
          f"config.training.sequence_length={length} for its context"
        )
      windows += self._windows(number, question, *encoded[record["text"]], found, room, tokenizer)
    packed = packing.into_rows(np.array([len(w.tokens) for w in windows]), length, LEAST)
    slots = packing.slots(length, LEAST)
    return QuestionRows(questions, windows, packed, length, slots, max(tokenizer.pad, 0))

  def _windows(self, number, question, ids, spans, found, room, tokenizer) -> list[Window]:
    """The windows of one context, in order."""
    step = min(self.stride, room)
    starts = [0]
    while starts[-1] + room < len(ids):
      starts.append(starts[-1] + step)
    answer = _tokens_of(found[0], spans) if found else None
    # A token is answered with in the window where the lesser of its two sides is longest.
    places = np.arange(len(ids))[:, None] - np.array(starts)
    sides = np.minimum(places, np.minimum(room, len(ids) - np.array(starts)) - 1 - places)
    owner = sides.argmax(1) if len(ids) else np.zeros(0, int)
    out = []
    for at, start in enumerate(starts):
      part = slice(start, min(start + room, len(ids)))
      offset = len(question) + 2
      inside = answer and part.start <= answer[0] and answer[1] < part.stop
      first, last = (offset + a - start for a in answer) if inside else (0, 0)
      tokens = np.array(
        [tokenizer.cls, *question, tokenizer.sep, *ids[part], tokenizer.sep], np.int32
      )
      out.append(Window(number, tokens, offset, spans[part], owner[part] == at, first, last))
    return out

  def batch_spec(self, model, length):
    slots = packing.slots(length, LEAST)
    return {
      **base.row_spec(length, "types", "may_end", "may_start"),
      "firsts": base.int_spec(slots),
      "starts": base.int_spec(slots),
      "ends": base.int_spec(slots),
      "window_weights": base.float_spec(slots),
    }

  def head(self, model):
    return heads.SpanHead(model)

  def totals(self, batch):
    return {"windows": batch["window_weights"].sum()}

  def loss(self, outputs, batch, totals):
    weights_BxK, weight = batch["window_weights"], batch["window_weights"].sum()
    seen_BxKxT = _of_window(batch) & ((batch["may_end"] > 0) | _first(batch))[:, None]
    losses, right = 0.0, 1.0
    for side in ("starts", "ends"):
      logits_BxKxT = jnp.where(seen_BxKxT, outputs[side][:, None], -1e30)
      log_probs_BxKxT = jax.nn.log_softmax(logits_BxKxT)
      losses -= 0.5 * jnp.take_along_axis(log_probs_BxKxT, batch[side][..., None], -1)[..., 0]
      right *= logits_BxKxT.argmax(-1) == batch[side]
    return (
      base.weighted_mean(losses, weights_BxK, totals["windows"]),
      {
        "loss": ((losses * weights_BxK).sum(), weight),
        "span_accuracy": ((right * weights_BxK).sum(), weight),
      },
    )

  def predict(self, outputs, batch):
    """The best starts and ends of every window (B x K x N places and scores), and the score of no answer."""
    found = {}
    for side, may in (("starts", "may_start"), ("ends", "may_end")):
      possible_BxKxT = _of_window(batch) & (batch[may] > 0)[:, None]
      count = min(self.candidates, batch["tokens"].shape[1])
      scores, places = jax.lax.top_k(
        jnp.where(possible_BxKxT, outputs[side][:, None], -1e30), count
      )
      found |= {f"{side}_scores": scores, f"{side}_places": places - batch["firsts"][..., None]}
    at_first = lambda side: jnp.take_along_axis(outputs[side], batch["firsts"], axis=1)
    return {**found, "none": at_first("starts") + at_first("ends")}

  def answers(self, predictions, rows: QuestionRows) -> dict[int, dict]:
    """Question number -> {"best": [(text, score), ..] over all of its windows, "none": the score of no answer}."""
    out = {}
    for row, numbers in enumerate(rows.packed[: len(predictions["none"])]):
      for slot, number in enumerate(numbers):
        window = rows.windows[number]
        mine = out.setdefault(window.question, {"best": [], "none": np.inf})
        mine["none"] = min(mine["none"], float(predictions["none"][row, slot]))
        one = {k: v[row, slot] for k, v in predictions.items()}
        mine["best"] += self._spans_of(window, one, rows.questions[window.question].text)
    for mine in out.values():
      best = {}
      for text, score in sorted(mine["best"], key=lambda found: -found[1]):
        best.setdefault(text, score)
      mine["best"] = list(best.items())[: self.candidates]
    return out

  def _spans_of(self, window, one, text):
    """(answer, score) of the possible pairs of starts and ends of a window."""
    sums = one["starts_scores"][:, None] + one["ends_scores"]
    starts, ends = one["starts_places"][:, None], one["ends_places"]
    good = (starts <= ends) & (ends - starts < self.longest) & (sums > -1e29)
    out = []
    for i, j in np.argwhere(good):
      places = one["starts_places"][i], one["ends_places"][j]
      first, last = (window.spans_Nx2[place - window.offset] for place in places)
      if answer := text[first[0] : last[1]].strip():
        out.append((answer, float(sums[i, j])))
    return out

  def chosen(self, found: dict) -> str:
    """The answer to one question of `answers`; "" for none."""
    if not found["best"] or self.no_answer and found["none"] - found["best"][0][1] > self.threshold:
      return ""
    return found["best"][0][0]

  def outcomes(self, predictions, rows: QuestionRows):
    found = self.answers(predictions, rows)
    asked = [rows.questions[n] for n in found]
    said = [self.chosen(one) for one in found.values()]
    out = {
      "exact_match": [answers_lib.exact_match(a, q.gold) for a, q in zip(said, asked)],
      "f1": [answers_lib.f1(a, q.gold) for a, q in zip(said, asked)],
    }
    if self.no_answer:
      best = [one["best"][0][0] if one["best"] else "" for one in found.values()]
      out["margins"] = [
        one["none"] - (one["best"][0][1] if one["best"] else -1e30) for one in found.values()
      ]
      for name, score in (("exact_match", answers_lib.exact_match), ("f1", answers_lib.f1)):
        out[f"{name}_answered"] = [score(a, q.gold) for a, q in zip(best, asked)]
        out[f"{name}_unanswered"] = [score("", q.gold) for q in asked]
    return {name: np.array(values) for name, values in out.items()}

  def summary(self, outcomes):
    figures = {name: float(outcomes[name].mean()) for name in ("exact_match", "f1")}
    if self.no_answer:
      for name in ("exact_match", "f1"):
        threshold, best = answers_lib.best_threshold(
          outcomes["margins"], outcomes[f"{name}_answered"], outcomes[f"{name}_unanswered"]
        )
        figures |= {f"best_{name}": best, f"best_{name}_threshold": threshold}
    return figures

  def results(self, predictions, rows: QuestionRows):
    found = self.answers(predictions, rows)
    return [
      {
        "answer": self.chosen(found[n]),
        "alternatives": [{"text": t, "score": s} for t, s in found[n]["best"][:5]],
      }
      for n in range(len(rows.questions))
    ]

  def write(self, predictions, rows: QuestionRows, path: pathlib.Path):
    """id -> answer as the official scorer reads it; beside it the n best and, with no_answer, the odds of none."""
    found = self.answers(predictions, rows)
    asked = {n: rows.questions[n].id for n in found}
    best = {asked[n]: [{"text": t, "score": s} for t, s in one["best"]] for n, one in found.items()}
    files = {
      path: {asked[n]: self.chosen(one) for n, one in found.items()},
      path.with_suffix(".nbest.json"): best,
    }
    if self.no_answer:
      files[path.with_suffix(".null_odds.json")] = {
        asked[n]: one["none"] - (one["best"][0][1] if one["best"] else 0.0)
        for n, one in found.items()
      }
    for file, content in files.items():
      file.write_text(json.dumps(content, indent=1, ensure_ascii=False), encoding="utf-8")


def _tokens_of(answer: tuple[str, int], spans_Nx2: np.ndarray) -> tuple[int, int] | None:
  """First and last token that the answer touches; None where the tokenizer dropped all of it."""
  text, start = answer
  start, stop = start + len(text) - len(text.lstrip()), start + len(text.rstrip())
  touched = np.flatnonzero((spans_Nx2[:, 1] > start) & (spans_Nx2[:, 0] < stop))
  return (int(touched[0]), int(touched[-1])) if len(touched) else None


def _of_window(batch):
  """BxKxT: which tokens belong to window k of a row."""
  numbers_K = 1 + jnp.arange(batch["firsts"].shape[1])
  return batch["segments"][:, None] == numbers_K[:, None]


def _first(batch):
  """BxT: the [CLS] of every window."""
  return (batch["positions"] == 0) & (batch["segments"] > 0)
