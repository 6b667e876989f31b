"""What is surely a mistake in records that can be read is said, once for each source or file."""

import math
import re
from typing import Any, Callable, Iterable, Iterator, Mapping, Sequence

from llm import core
from llm.core import UserError

# The fields of a record that a model reads or writes, beside the messages of a conversation.
TEXTS = (
  *("text", "text_pair", "question", "target"),
  *("instruction", "input", "output", "prompt", "chosen", "rejected"),
)
# Tabs, line ends and form feeds stand in many texts; the other control characters do not.
_CONTROL = re.compile(r"[\x00-\x08\x0e-\x1f\x7f]")


def said(records: Iterable[dict], spec: str) -> Iterator[dict]:
  """The records of a source, with a warning at the first that holds a control character.

  Raises UserError at the end where all texts were empty.
  """
  empty = True
  warned = False
  for number, record in enumerate(records, 1):
    texts = texts_of(record)
    empty = empty and bool(texts) and not any(map(str.strip, texts))
    if not warned and (control := next(filter(None, map(_CONTROL.search, texts)), None)):
      where = record.get("_where", f"{spec}: record {number}")
      core.warn(f"{where} has the control character {control[0]!r}: is it text?")
      warned = True
    yield record
  if empty:
    raise UserError(f"{spec}: all of its texts are empty")


def texts_of(record: dict) -> list[str]:
  """All texts of a record that a model reads or writes."""
  values = []
  for name in (*TEXTS, "messages"):
    value = record.get(name)
    turns = value if isinstance(value, list) else []
    values += [value, *(turn.get("content") for turn in turns if isinstance(turn, dict))]
  return [value for value in values if isinstance(value, str)]


class KeysTwice:
  """A warning at the first object of a JSON file that has a key twice."""

  def __init__(self):
    self._warned = False

  def at(self, where: str) -> Callable[[Sequence[tuple[str, Any]]], dict[str, Any]]:
    """A function for `json.loads`, from the pairs of an object that stands at `where`."""

    def as_dict(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
      value = dict(pairs)
      if len(value) < len(pairs) and not self._warned:
        self._warned = True
        warn_of_twice([key for key, _ in pairs], f"{where}: the key")
      return value

    return as_dict


def warn_of_twice(names: Sequence[str], what: str) -> None:
  """Warns where a name occurs twice. what: of what kind the names are, and where."""
  seen = set()
  for name in names:
    if name in seen:
      core.warn(f"{what} {name!r} is there twice: the last one counts")
      return
    seen.add(name)


def warn_of_numbers(places: Mapping[str, str]) -> None:
  """Warns where the name of a class is NaN or has a fraction, as a score has.

  places: name -> where it stands first.
  """
  for name, where in places.items():
    try:
      value = float(name)
    except ValueError:
      continue
    if math.isnan(value):
      core.warn(f"{where}: the label is NaN, which counts as a class of its own")
    elif math.isfinite(value) and value != int(value):
      core.warn(
        f"{where}: the label {name} has a fraction, and counts as the name of a class; "
        "config.objective.num_classes=1 predicts scores"
      )
      return
