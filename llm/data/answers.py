"""Answers to questions: as a record gives them, and how SQuAD scores them (Rajpurkar et al. 2016, section 6.1)."""

import collections
import json
import pathlib
import re
import string
from typing import Sequence

import numpy as np

from llm.core import UserError
from llm.data.sources import Source


def given(record: dict) -> list[tuple[str, int]]:
  """(text, first character) of each answer of a record, checked against its text.

  Answers are a list of {"text", "answer_start"} (SQuAD's files) or a dict of lists of them (tfds:squad).
  """
  where, answers = record.get("_where", "a record"), record.get("answers", [])
  if isinstance(answers, dict):
    try:
      answers = [dict(zip(answers, values)) for values in zip(*answers.values())]
    except TypeError:
      raise UserError(f"{where}: answers must be a list of objects with text and answer_start")
  out = []
  for answer in answers:
    try:
      text, start = answer["text"], int(answer["answer_start"])
      text = text.decode("utf-8") if isinstance(text, bytes) else text
    except (KeyError, TypeError, ValueError):
      raise UserError(f"{where}: an answer must have text and answer_start, not {answer!r}")
    if not isinstance(text, str) or not text.strip():
      raise UserError(f"{where}: an answer is empty; a question without answer has an empty list")
    if record["text"][max(start, 0) : start + len(text)] != text or start < 0:
      elsewhere = record["text"].find(text)
      raise UserError(
        f"{where}: the answer {text!r} does not stand at character {start} of its context"
        + (f", but at {elsewhere}" if elsewhere >= 0 else " nor anywhere in it")
      )
    out.append((text, start))
  return out


def normalized(answer: str) -> str:
  """Lower case without punctuation, articles and extra spaces."""
  bare = "".join(c for c in answer.lower() if c not in string.punctuation)
  return " ".join(re.sub(r"\b(a|an|the)\b", " ", bare).split())


def exact_match(answer: str, gold: Sequence[str]) -> float:
  """1 if the answer is one of `gold` after normalisation; no gold answers: 1 if it is empty."""
  return float(normalized(answer) in {normalized(g) for g in gold or ("",)})


def f1(answer: str, gold: Sequence[str]) -> float:
  """The best overlap of words with a gold answer: the harmonic mean of precision and recall.

  Where either has no words, 1 if both have none.
  """
  return max(_f1(normalized(answer).split(), normalized(g).split()) for g in gold or ("",))


def _f1(found: list[str], wanted: list[str]) -> float:
  if not found or not wanted:
    return float(found == wanted)
  shared = sum((collections.Counter(found) & collections.Counter(wanted)).values())
  return 2 * shared / (len(found) + len(wanted))


def best_threshold(
  margins: np.ndarray, answered: np.ndarray, unanswered: np.ndarray
) -> tuple[float, float]:
  """(threshold, mean score) so that saying nothing where margin > threshold scores best.

  margins: how much better no answer looks than the best one. answered, unanswered: the score of each question
  either way (Rajpurkar et al. 2018, section 4.3, as the official script sweeps it).
  """
  order = np.argsort(margins, kind="stable")
  gains = np.cumsum(np.r_[0.0, (answered - unanswered)[order]])
  ranked = margins[order]
  # A threshold lies between two different margins: the questions up to it are answered.
  possible = np.r_[True, ranked[1:] > ranked[:-1], True] if len(ranked) else np.array([True])
  best = int(np.argmax(np.where(possible, gains, -np.inf)))
  threshold = -np.inf if best == 0 else float(ranked[best - 1])
  return threshold, float((unanswered.sum() + gains[best]) / max(len(margins), 1))


def of_file(path: pathlib.Path, source: Source) -> dict[str, np.ndarray]:
  """Exact match and F1 of each question of a source, by the answers of a file {id: text}; "" where it has none."""
  try:
    said = json.loads(path.read_text(encoding="utf-8"))
  except (OSError, ValueError) as error:
    raise UserError(f"--predictions={path} cannot be read as JSON: {error}")
  if not isinstance(said, dict) or not all(isinstance(text, str) for text in said.values()):
    raise UserError(f"--predictions={path} must hold an object of id: text")
  gold = {
    str(record.get("id", n)): [text for text, _ in given(record)]
    for n, record in enumerate(source.records())
  }
  if strange := [name for name in said if name not in gold]:
    raise UserError(
      f"--predictions={path} answers {len(strange)} questions that {source.spec} does not ask, e.g. "
      f"{strange[0]!r}"
    )
  return {
    name: np.array([score(said.get(i, ""), wanted) for i, wanted in gold.items()])
    for name, score in (("exact_match", exact_match), ("f1", f1))
  }
