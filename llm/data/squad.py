"""Files in the layout of SQuAD 1.1 and 2.0 (Rajpurkar et al. 2016, 2018)."""

import dataclasses
import pathlib
from typing import Annotated, Iterator

import msgspec

from llm import reading


@dataclasses.dataclass(frozen=True)
class Answer:
  """An answer. answer_start: characters of the context before it."""

  text: str
  answer_start: Annotated[int, msgspec.Meta(ge=0)]


@dataclasses.dataclass(frozen=True)
class Question:
  """A question with its answers; none of them where the context does not answer it."""

  question: str
  id: str | int
  answers: list[Answer] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(frozen=True)
class Paragraph:
  """A context and the questions on it."""

  context: str
  qas: list[Question]


@dataclasses.dataclass(frozen=True)
class Article:
  """The paragraphs of one article."""

  paragraphs: list[Paragraph]


@dataclasses.dataclass(frozen=True)
class File:
  """A whole file."""

  data: list[Article]


def records(text: str, path: pathlib.Path) -> Iterator[dict]:
  """A record for every question of a file's text. Raises UserError on another layout."""
  value = reading.json_value(text, str(path))
  where = f"{path}: not in SQuAD's layout (data, paragraphs, context, qas, question, id)"
  for article in reading.shaped(value, File, where).data:
    for paragraph in article.paragraphs:
      for question in paragraph.qas:
        yield {
          "text": paragraph.context,
          "question": question.question,
          "id": str(question.id),
          "answers": [dataclasses.asdict(answer) for answer in question.answers],
          "_where": f"{path}: question {question.id}",
        }
