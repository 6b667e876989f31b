"""OpenAI's graders, as far as they run here, as a reward of reinforcement fine-tuning.

A grader compares two texts. Its templates name the answer, {{sample.output_text}}, and fields of
the example, {{item.FIELD}}. The example's are filled in when a job is made. So a line of a job's
training file carries a grader that needs the answer alone: each of its texts is a list of parts,
and the answer stands between them.
"""

import collections
import difflib
import re
from typing import Annotated, Any, Callable, Literal

import pydantic

from llm.core import UserError

TEMPLATES = ("input", "reference")
NAMED = re.compile(r"\{\{\s*(?:sample\.output_text|item\.([\w.]+))\s*\}\}")


class StringCheck(pydantic.BaseModel, extra="forbid"):
  """1 where the texts compare as `operation` says, else 0. like: the reference is in the input."""

  type: Literal["string_check"]
  name: str = ""
  input: str
  reference: str
  operation: Literal["eq", "ne", "like", "ilike"]


class TextSimilarity(pydantic.BaseModel, extra="forbid"):
  """How alike the texts are, from 0 to 1."""

  type: Literal["text_similarity"]
  name: str = ""
  input: str
  reference: str
  evaluation_metric: Literal["fuzzy_match", "rouge_1", "rouge_2", "rouge_l"]


Grader = Annotated[StringCheck | TextSimilarity, pydantic.Field(discriminator="type")]

# Why a grader of OpenAI is refused.
REFUSED = {
  "python": "python graders would run your code on this server, which has no sandbox for it",
  "score_model": "score_model graders need a model that judges, which this server does not have",
  "label_model": "label_model graders need a model that judges, which this server does not have",
  "multi": "multi graders are not supported: give one grader",
  "endpoint": "endpoint graders are not supported",
}


def check(grader: dict[str, Any]):
  """Raises UserError where its templates name what cannot be filled in, or no answer."""
  names_answer = False
  for template in (grader[name] for name in TEMPLATES):
    rest = NAMED.sub(" ", template)
    if "{{" in rest or "}}" in rest:
      raise UserError(
        "a grader's templates take {{sample.output_text}} and {{item.FIELD}} alone, where FIELD is "
        "made of letters, digits, _ and points"
      )
    names_answer |= any(match[1] is None for match in NAMED.finditer(template))
  if not names_answer:
    raise UserError("the grader does not look at the answer: name {{sample.output_text}} in it")


def filled(grader: dict[str, Any], item: dict[str, Any], where: str) -> dict[str, Any]:
  """The grader with the fields of an example in it. Raises UserError if one is missing.

  What an example holds is text, never a template.
  """
  return {**grader, **{name: _parts(grader[name], item, where) for name in TEMPLATES}}


def _parts(template: str, item: dict[str, Any], where: str) -> list[str]:
  """The texts before, between and after the answers that a template names."""
  parts = [""]
  done = 0
  for match in NAMED.finditer(template):
    parts[-1] += template[done : match.start()]
    done = match.end()
    if match[1] is None:
      parts.append("")
    else:
      parts[-1] += _field(match[1], item, where)
  parts[-1] += template[done:]
  return parts


def _field(path: str, item: dict[str, Any], where: str) -> str:
  """The field of an example at NAME.NAME. Raises UserError if it is missing."""
  field: Any = item
  for part in path.split("."):
    if not isinstance(field, dict) or part not in field:
      raise UserError(f"{where} has no field {path!r}, which the grader names")
    field = field[part]
  return field if isinstance(field, str) else str(field)


def reward(answer: str, record: dict[str, Any]) -> float:
  """The grade of an answer to a record that `filled` gave a grader (config.objective.reward)."""
  grader = record["grader"]
  text, reference = (answer.join(grader[name]) for name in TEMPLATES)
  if grader["type"] == "string_check":
    return float(OPERATIONS[grader["operation"]](text, reference))
  return SIMILARITIES[grader["evaluation_metric"]](text, reference)


OPERATIONS: dict[str, Callable[[str, str], bool]] = {
  "eq": lambda text, reference: text == reference,
  "ne": lambda text, reference: text != reference,
  "like": lambda text, reference: reference in text,
  "ilike": lambda text, reference: reference.casefold() in text.casefold(),
}


def _rouge(n: int) -> Callable[[str, str], float]:
  """F1 of the word n-grams that two texts share (Lin 2004, section 2)."""

  def score(text: str, reference: str) -> float:
    grams = [_ngrams(part.casefold().split(), n) for part in (text, reference)]
    shared = sum((grams[0] & grams[1]).values())
    return _f1(shared, sum(grams[0].values()), sum(grams[1].values()))

  return score


def _ngrams(words: list[str], n: int) -> collections.Counter:
  return collections.Counter(zip(*(words[start:] for start in range(n))))


def _rouge_l(text: str, reference: str) -> float:
  """F1 of the longest common subsequence of words (Lin 2004, section 3)."""
  words, others = text.casefold().split(), reference.casefold().split()
  lengths = [0] * (len(others) + 1)
  for word in words:
    before = 0
    for place, other in enumerate(others, 1):
      above = lengths[place]
      lengths[place] = before + 1 if word == other else max(above, lengths[place - 1])
      before = above
  return _f1(lengths[-1], len(words), len(others))


def _f1(shared: int, first: int, second: int) -> float:
  return 2 * shared / (first + second) if first + second else 1.0


def _fuzzy(text: str, reference: str) -> float:
  """The share of characters in matching blocks (Ratcliff and Metzener 1988)."""
  return difflib.SequenceMatcher(None, text, reference, autojunk=False).ratio()


SIMILARITIES: dict[str, Callable[[str, str], float]] = {
  "fuzzy_match": _fuzzy,
  "rouge_1": _rouge(1),
  "rouge_2": _rouge(2),
  "rouge_l": _rouge_l,
}
