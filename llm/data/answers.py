"""Answers to questions: reading them from records, and SQuAD's scores.

The scores are those of Rajpurkar et al. 2016, section 6.1.
"""

import collections
import pathlib
import re
import string
from typing import Any, Iterable, Sequence

import numpy as np

from llm import core, reading
from llm.core import UserError
from llm.data import suspicions
from llm.data.sources import Source


def given(record: dict[str, Any]) -> list[tuple[str, int]]:
  """The (text, first character) of each answer of a record.

  `answers` is a list of {"text", "answer_start"} (SQuAD's files) or a dict of such lists
  (tfds:squad). Raises UserError where an answer is malformed, or does not stand in the record's
  text.
  """
  where = record.get("_where", "a record")
  answers = _as_list(record.get("answers", []), where)
  return [_checked(answer, record["text"], where) for answer in answers]


def _as_list(answers: Any, where: str) -> Iterable[Any]:
  """A dict of lists becomes a list of dicts."""
  try:
    if not isinstance(answers, dict):
      return list(answers)
    return [dict(zip(answers, values)) for values in zip(*answers.values())]
  except TypeError:
    raise UserError(f"{where}: answers must be a list of objects with text and answer_start")


def _checked(answer: Any, context: str, where: str) -> tuple[str, int]:
  """(text, first character) of one answer. Raises UserError unless the context has it there."""
  try:
    text, start = answer["text"], int(answer["answer_start"])
    text = text.decode("utf-8") if isinstance(text, bytes) else text
  except (KeyError, TypeError, ValueError):
    raise UserError(f"{where}: an answer must have text and answer_start, not {answer!r}")
  if not isinstance(text, str) or not text.strip():
    raise UserError(f"{where}: an answer is empty; a question without answer has an empty list")
  if start < 0 or context[start : start + len(text)] != text:
    elsewhere = context.find(text)
    place = f", but at {elsewhere}" if elsewhere >= 0 else " nor anywhere in it"
    raise UserError(
      f"{where}: the answer {text!r} does not stand at character {start} of its context{place}"
    )
  return text, start


def id_of(record: dict[str, Any], number: int) -> str:
  """The id of a question, or its number where it has none."""
  return str(number if record.get("id") is None else record["id"])


def normalized(answer: str) -> str:
  """An answer in lower case, without punctuation, articles and repeated spaces."""
  letters = "".join(c for c in answer.lower() if c not in string.punctuation)
  return " ".join(re.sub(r"\b(a|an|the)\b", " ", letters).split())


def exact_match(answer: str, gold: Sequence[str]) -> float:
  """1 if the answer equals a gold answer after normalisation, else 0.

  A question without gold answers expects the empty answer.
  """
  return float(normalized(answer) in {normalized(g) for g in gold or ("",)})


def f1(answer: str, gold: Sequence[str]) -> float:
  """The best F1 with a gold answer: the harmonic mean of the precision and recall of words.

  A question without gold answers expects the empty answer. Where either answer has no words, the F1
  is 1 if neither has any, else 0.
  """
  return max(_word_f1(normalized(answer).split(), normalized(g).split()) for g in gold or ("",))


def _word_f1(words: list[str], gold_words: list[str]) -> float:
  if not words or not gold_words:
    return float(words == gold_words)
  shared = sum((collections.Counter(words) & collections.Counter(gold_words)).values())
  return 2 * shared / (len(words) + len(gold_words))


def best_threshold(
  margins: np.ndarray, answered: np.ndarray, unanswered: np.ndarray
) -> tuple[float, float]:
  """The threshold with the best mean score, and that score (Rajpurkar et al. 2018, section 4.3).

  Questions with margin > threshold get no answer. SQuAD's official script searches in the same way.
  Each argument has one value a question.

  margins: the score of "no answer" minus the score of the best answer.
  answered: the figure of merit of the best answer.
  unanswered: the figure of merit of "no answer".
  """
  order = np.argsort(margins, kind="stable")
  # gains[n]: the gain in score from answering the n questions of smallest margin.
  gains = np.cumsum(np.r_[0.0, (answered - unanswered)[order]])
  ranked = margins[order]
  # A threshold cannot part questions of equal margin.
  if len(ranked):
    possible = np.r_[True, ranked[1:] > ranked[:-1], True]
  else:
    possible = np.array([True])
  best = int(np.argmax(np.where(possible, gains, -np.inf)))
  threshold = -np.inf if best == 0 else float(ranked[best - 1])
  return threshold, float((unanswered.sum() + gains[best]) / max(len(margins), 1))


def of_file(path: pathlib.Path, source: Source) -> dict[str, np.ndarray]:
  """Exact match and F1 of each question of a source, for the answers in a JSON file {id: text}.

  A question that the file lacks counts as answered by "". Raises UserError where the file is no
  such object, or answers a question that the source does not ask.
  """
  predictions = _read_predictions(path)
  asked = [
    (id_of(record, number), [text for text, _ in given(record)])
    for number, record in enumerate(source.records())
  ]
  suspicions.warn_of_twice([name for name, _ in asked], f"{source.spec}: the id of a question,")
  gold = dict(asked)
  if unknown := [name for name in predictions if name not in gold]:
    raise UserError(
      f"--predictions={path} answers {len(unknown)} questions that {source.spec} does not ask, "
      f"e.g. {unknown[0]!r}"
    )
  _check_answered(predictions, gold, f"--predictions={path}")
  return {
    name: np.array([score(predictions.get(i, ""), answers) for i, answers in gold.items()])
    for name, score in (("exact_match", exact_match), ("f1", f1))
  }


def _check_answered(predictions: dict[str, str], gold: dict[str, list[str]], where: str) -> None:
  """Raises UserError where no question is answered; warns where some are not."""
  lacking = [name for name in gold if name not in predictions]
  message = f"{where} lacks {len(lacking):,} of the {len(gold):,} questions, e.g."
  if len(lacking) == len(gold):
    raise UserError(f"{message} {lacking[0]!r}: it answers none")
  if lacking:
    core.warn(f"{message} {lacking[0]!r}: these count as answered by nothing")


def _read_predictions(path: pathlib.Path) -> dict[str, str]:
  try:
    return reading.read_json(path, dict[str, str])
  except UserError as error:
    raise UserError(f"--predictions must be an object of texts by id; {error}")
