"""Extractive question answering: the answer is a span of the context (BERT on SQuAD)."""

import dataclasses
import json
import pathlib
from typing import Callable, NamedTuple, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from llm.config import key
from llm.core import Batch, UserError
from llm.data import answers as answers_lib
from llm.data import packing, suspicions
from llm.data.tokenizer import Tokenizer
from llm.models import heads
from llm.objectives import base

# A window takes at least so many tokens of a row. The loss has an array of slots x T, so few slots
# are cheaper.
LEAST = 32
IMPOSSIBLE = -1e30  # the score of a start, an end or an answer that cannot be
SCORES = {"exact_match": answers_lib.exact_match, "f1": answers_lib.f1}


@dataclasses.dataclass(frozen=True)
class Question:
  """A question as scoring needs it. text: the context. gold: the right answers; () for none."""

  id: str
  text: str
  gold: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Window:
  """[CLS] question [SEP] part of the context [SEP]. The part has N tokens."""

  question: int  # its number
  tokens: np.ndarray
  offset: int  # where the part begins in `tokens`
  # The first character of each token of the part in the context, and the one after its last.
  spans_Nx2: np.ndarray
  best_context_N: np.ndarray  # whether no other window gives the token more context
  # The first and last token of the answer in `tokens`; 0, the [CLS], if the part does not hold it.
  start: int
  end: int

  def arrays(self) -> dict[str, np.ndarray]:
    """The arrays of a row: ids, types, and whether an answer may end, and may start, at each."""
    places = np.arange(len(self.tokens))
    may_end = (places >= self.offset) & (places < self.offset + len(self.best_context_N))
    may_start = np.zeros(len(self.tokens), np.int32)
    may_start[may_end] = self.best_context_N
    return {
      "tokens": self.tokens,
      "types": places >= self.offset,  # 0 for the question, 1 for the part and its [SEP]
      "may_end": may_end,
      "may_start": may_start,
    }


@dataclasses.dataclass(frozen=True)
class QuestionRows:
  """Windows packed into rows of `length` tokens, at most `slots` in one.

  packed: the numbers of the windows of each row.
  """

  questions: list[Question]
  windows: list[Window]
  packed: list[np.ndarray]
  length: int
  slots: int
  pad: int

  @property
  def tokens(self) -> int:
    return sum(len(window.tokens) for window in self.windows)

  @property
  def examples(self) -> int:
    return len(self.windows)

  @property
  def note(self) -> str:
    windows_of_each = np.bincount([window.question for window in self.windows])
    fill = self.tokens / (len(self) * self.length)
    return (
      f"{len(self.questions)} questions, {len(self.windows)} windows in {len(self)} rows, "
      f"{fill:.1%} full; {(windows_of_each > 1).sum()} contexts are longer than a row"
    )

  def __len__(self) -> int:
    return len(self.packed)

  def example(self, i, rng):
    windows = [self.windows[number] for number in self.packed[i]]
    examples = [window.arrays() for window in windows]
    row, firsts = packing.lay_out(examples, self.length, self.pad)
    starts = firsts + [window.start for window in windows]
    ends = firsts + [window.end for window in windows]
    return {
      **row,
      "firsts": packing.in_slots(firsts, self.slots, np.int32),
      "starts": packing.in_slots(starts, self.slots, np.int32),
      "ends": packing.in_slots(ends, self.slots, np.int32),
      "window_weights": packing.slots_in_use(len(windows), self.slots),
    }


class Candidates(NamedTuple):
  """The best answers to a question, as (text, score), and the score of having none."""

  best: list[tuple[str, float]]
  none: float

  @property
  def text(self) -> str:
    """The best answer; "" where no window has any."""
    return self.best[0][0] if self.best else ""

  @property
  def margin(self) -> float:
    """How much better no answer scores than the best one."""
    return self.none - (self.best[0][1] if self.best else IMPOSSIBLE)


@dataclasses.dataclass(frozen=True)
class Objective(base.Answers):
  """Start and end of the answer, each a softmax over a window (Devlin et al. 2019, section 4.2).

  stride: tokens from one window of a long context to the next. longest: the most tokens of an
  answer. no_answer: questions may have none (SQuAD 2.0, section 4.3). threshold: none is given
  where [CLS] scores higher than the best span by more than this. candidates: how many starts and
  how many ends of a window are considered.
  """

  stride: int = key(128, above=0)
  longest: int = key(30, above=0)
  no_answer: bool = False
  threshold: float = 0.0
  candidates: int = key(20, above=0)

  kinds = ("encoder",)
  fields = ("question", "text")

  @property
  def goal(self) -> str:
    return "max:best_f1" if self.no_answer else "max:f1"

  def rows(self, source, tokenizer, data, model, length):
    records = list(source.records())
    for record in records:
      where = record.get("_where", source.spec)
      question = record.get("question")
      if not isinstance(question, str) or not question.strip():
        raise UserError(
          f"{where}: the field 'question' must be a text; questions come from squad:FILE, or from "
          "records with text (the context), question and answers"
        )
      if not self.no_answer and not answers_lib.given(record):
        raise UserError(
          f"{where}: the question has no answer; set config.objective.no_answer=True if questions "
          "may have none (SQuAD 2.0)"
        )
    ids = [str(record["id"]) for record in records if record.get("id") is not None]
    suspicions.warn_of_twice(ids, f"{source.spec}: the id of a question,")
    return self.encode(records, tokenizer, model, length)

  def encode(self, records, tokenizer, model, length) -> QuestionRows:
    """The windows of the records, packed. Raises UserError if an answer is not in its context."""
    tokenizer.require("cls", "sep")
    question_ids = tokenizer.encode([record["question"] for record in records])
    texts = list(dict.fromkeys(record["text"] for record in records))  # questions share contexts
    contexts = dict(zip(texts, tokenizer.encode_spans(texts)))
    questions = []
    windows = []
    for number, (record, ids) in enumerate(zip(records, question_ids)):
      answers = answers_lib.given(record)
      gold = tuple(text for text, _ in answers)
      questions.append(Question(answers_lib.id_of(record, number), record["text"], gold))
      room = length - len(ids) - 3
      if room < 8:
        raise UserError(
          f"{record.get('_where', 'a record')}: the question has {len(ids)} tokens and leaves "
          f"{room} of config.training.sequence_length={length} for its context"
        )
      context_ids, spans_Nx2 = contexts[record["text"]]
      answer = _tokens_of(answers[0], spans_Nx2) if answers else None
      windows += self._windows(number, ids, context_ids, spans_Nx2, answer, room, tokenizer)
    sizes = np.array([len(window.tokens) for window in windows])
    packed = packing.into_rows(sizes, length, LEAST)
    slots = packing.slots(length, LEAST)
    return QuestionRows(questions, windows, packed, length, slots, max(tokenizer.pad, 0))

  def _windows(
    self,
    number: int,
    question_ids: list[int],
    context_ids: list[int],
    spans_Nx2: np.ndarray,
    answer: tuple[int, int] | None,
    room: int,
    tokenizer: Tokenizer,
  ) -> list[Window]:
    """The windows of question `number`, in order.

    answer: its first and last token in the context. room: the most tokens of a part.
    """
    step = min(self.stride, room)
    starts = [0]
    while starts[-1] + room < len(context_ids):
      starts.append(starts[-1] + step)
    owner_N = _owners(starts, len(context_ids), room)
    offset = len(question_ids) + 2
    windows = []
    for index, start in enumerate(starts):
      part = slice(start, min(start + room, len(context_ids)))
      first = last = 0
      if answer is not None and part.start <= answer[0] and answer[1] < part.stop:
        first = offset + answer[0] - start
        last = offset + answer[1] - start
      ids = [tokenizer.cls, *question_ids, tokenizer.sep, *context_ids[part], tokenizer.sep]
      tokens = np.array(ids, np.int32)
      best_context_N = owner_N[part] == index
      windows.append(Window(number, tokens, offset, spans_Nx2[part], best_context_N, first, last))
    return windows

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
    weights_BxK = batch["window_weights"]
    weight = weights_BxK.sum()
    # An answer starts and ends in the context, or at the [CLS] of its window if there is none.
    possible_BxKxT = _of_window(batch) & ((batch["may_end"] > 0) | _first(batch))[:, None]
    starts_BxKxT = jnp.where(possible_BxKxT, outputs["starts"][:, None], IMPOSSIBLE)
    ends_BxKxT = jnp.where(possible_BxKxT, outputs["ends"][:, None], IMPOSSIBLE)
    start_losses_BxK = base.cross_entropy(starts_BxKxT, batch["starts"])
    end_losses_BxK = base.cross_entropy(ends_BxKxT, batch["ends"])
    losses_BxK = 0.5 * start_losses_BxK + 0.5 * end_losses_BxK
    start_correct_BxK = starts_BxKxT.argmax(-1) == batch["starts"]
    end_correct_BxK = ends_BxKxT.argmax(-1) == batch["ends"]
    correct_BxK = start_correct_BxK & end_correct_BxK
    metrics = {
      "loss": ((losses_BxK * weights_BxK).sum(), weight),
      "span_accuracy": ((correct_BxK * weights_BxK).sum(), weight),
    }
    return base.weighted_mean(losses_BxK, weights_BxK, totals["windows"]), metrics

  def predict(self, outputs, batch):
    """The best starts and ends of each window, N of both, and its score of no answer.

    {starts,ends}_places: BxKxN tokens of the window. {starts,ends}_scores: BxKxN. none: BxK.
    """
    firsts_BxK = batch["firsts"]
    of_window_BxKxT = _of_window(batch)
    count = min(self.candidates, batch["tokens"].shape[1])
    predictions = {}
    for side, mask in (("starts", "may_start"), ("ends", "may_end")):
      possible_BxKxT = of_window_BxKxT & (batch[mask] > 0)[:, None]
      scores_BxKxT = jnp.where(possible_BxKxT, outputs[side][:, None], IMPOSSIBLE)
      scores_BxKxN, places_BxKxN = jax.lax.top_k(scores_BxKxT, count)
      predictions[f"{side}_scores"] = scores_BxKxN
      predictions[f"{side}_places"] = places_BxKxN - firsts_BxK[..., None]
    cls_start_BxK = jnp.take_along_axis(outputs["starts"], firsts_BxK, axis=1)
    cls_end_BxK = jnp.take_along_axis(outputs["ends"], firsts_BxK, axis=1)
    return {**predictions, "none": cls_start_BxK + cls_end_BxK}

  def answers(self, predictions: base.Predictions, rows: QuestionRows) -> dict[int, Candidates]:
    """Question number -> its best answers over all of its windows."""
    spans: dict[int, list[tuple[str, float]]] = {}
    none: dict[int, float] = {}
    for row, numbers in enumerate(rows.packed[: len(predictions["none"])]):
      for slot, number in enumerate(numbers):
        window = rows.windows[number]
        question = window.question
        of_window = {name: values[row, slot] for name, values in predictions.items()}
        text = rows.questions[question].text
        spans.setdefault(question, []).extend(self._spans_of(window, of_window, text))
        none[question] = min(none.get(question, np.inf), float(of_window["none"]))
    return {question: self._candidates(spans[question], none[question]) for question in spans}

  def _spans_of(
    self, window: Window, predictions: base.Predictions, text: str
  ) -> list[tuple[str, float]]:
    """(answer, score) of each possible pair of a start and an end of a window."""
    starts_N, ends_N = predictions["starts_places"], predictions["ends_places"]
    scores_NxN = predictions["starts_scores"][:, None] + predictions["ends_scores"]
    lengths_NxN = ends_N - starts_N[:, None]
    is_span_NxN = (lengths_NxN >= 0) & (lengths_NxN < self.longest)
    is_possible_NxN = scores_NxN > IMPOSSIBLE / 10
    spans = []
    for i, j in np.argwhere(is_span_NxN & is_possible_NxN):
      first_character, _ = window.spans_Nx2[starts_N[i] - window.offset]
      _, stop_character = window.spans_Nx2[ends_N[j] - window.offset]
      if answer := text[first_character:stop_character].strip():
        spans.append((answer, float(scores_NxN[i, j])))
    return spans

  def _candidates(self, spans: list[tuple[str, float]], none: float) -> Candidates:
    """The best different answers of all windows of a question, with the best score of each."""
    best: dict[str, float] = {}
    for text, score in sorted(spans, key=lambda span: -span[1]):
      best.setdefault(text, score)
    return Candidates(list(best.items())[: self.candidates], none)

  def chosen(self, candidates: Candidates) -> str:
    """The answer to a question; "" for none."""
    if not candidates.best or (self.no_answer and candidates.margin > self.threshold):
      return ""
    return candidates.text

  def outcomes(self, predictions, rows: QuestionRows):
    candidates = self.answers(predictions, rows)
    gold = [rows.questions[number].gold for number in candidates]
    answers = [self.chosen(of_question) for of_question in candidates.values()]
    outcomes = {name: _scores(score, answers, gold) for name, score in SCORES.items()}
    if self.no_answer:
      best = [of_question.text for of_question in candidates.values()]
      outcomes["margins"] = [of_question.margin for of_question in candidates.values()]
      for name, score in SCORES.items():
        outcomes[f"{name}_answered"] = _scores(score, best, gold)
        outcomes[f"{name}_unanswered"] = _scores(score, [""] * len(gold), gold)
    return {name: np.array(values) for name, values in outcomes.items()}

  def summary(self, outcomes):
    figures = {name: float(outcomes[name].mean()) for name in SCORES}
    if self.no_answer:
      for name in SCORES:
        threshold, best = answers_lib.best_threshold(
          outcomes["margins"], outcomes[f"{name}_answered"], outcomes[f"{name}_unanswered"]
        )
        figures |= {f"best_{name}": best, f"best_{name}_threshold": threshold}
    return figures

  def results(self, predictions, rows: QuestionRows):
    candidates = self.answers(predictions, rows)
    results = []
    for number in range(len(rows.questions)):
      of_question = candidates[number]
      alternatives = [{"text": text, "score": score} for text, score in of_question.best[:5]]
      results.append({"answer": self.chosen(of_question), "alternatives": alternatives})
    return results

  def write(self, predictions, rows: QuestionRows, path: pathlib.Path):
    """Writes {id: answer} as the official scorer reads it.

    Beside it, .nbest.json has the best answers with their scores. With no_answer, .null_odds.json
    has how much better no answer scores than the best one.
    """
    answers = {}
    n_best = {}
    null_odds = {}
    for number, candidates in self.answers(predictions, rows).items():
      question_id = rows.questions[number].id
      answers[question_id] = self.chosen(candidates)
      n_best[question_id] = [{"text": text, "score": score} for text, score in candidates.best]
      null_odds[question_id] = candidates.margin if candidates.best else candidates.none
    files = {path: answers, path.with_suffix(".nbest.json"): n_best}
    if self.no_answer:
      files[path.with_suffix(".null_odds.json")] = null_odds
    for file, content in files.items():
      file.write_text(json.dumps(content, indent=1, ensure_ascii=False), encoding="utf-8")


def _scores(
  score: Callable[[str, Sequence[str]], float], answers: list[str], gold: list[tuple[str, ...]]
) -> list[float]:
  return [score(answer, of_question) for answer, of_question in zip(answers, gold)]


def _tokens_of(answer: tuple[str, int], spans_Nx2: np.ndarray) -> tuple[int, int] | None:
  """The first and last token of an answer; None if the tokenizer dropped all of its characters.

  answer: its text and its first character in the context.
  """
  text, first_character = answer
  start = first_character + len(text) - len(text.lstrip())
  stop = first_character + len(text.rstrip())
  touched = np.flatnonzero((spans_Nx2[:, 1] > start) & (spans_Nx2[:, 0] < stop))
  return (int(touched[0]), int(touched[-1])) if len(touched) else None


def _owners(starts: list[int], length: int, room: int) -> np.ndarray:
  """For each of `length` tokens of a context, the window that gives it the most context.

  That is the window in which the shorter of the token's two sides is longest. starts: the first
  token of each window, which holds `room` tokens at most.
  """
  if not length:
    return np.zeros(0, int)
  starts_W = np.array(starts)
  lengths_W = np.minimum(room, length - starts_W)
  left_NxW = np.arange(length)[:, None] - starts_W
  right_NxW = lengths_W - 1 - left_NxW
  return np.minimum(left_NxW, right_NxW).argmax(1)


def _of_window(batch: Batch) -> jax.Array:
  """Whether token t belongs to window k of its row: BxKxT."""
  numbers_K = 1 + jnp.arange(batch["firsts"].shape[1])
  return batch["segments"][:, None] == numbers_K[:, None]


def _first(batch: Batch) -> jax.Array:
  """Whether token t is the [CLS] of a window: BxT."""
  return (batch["positions"] == 0) & (batch["segments"] > 0)
