"""Records that a run is both trained and evaluated on."""

from typing import Sequence

from llm import core
from llm.data.embedded import words_of
from llm.data.sources import Source

# The fields of a record that a model is given. The others are what it should answer.
GIVEN = ("text", "text_pair", "question", "instruction", "input", "prompt", "messages")
# Duplicates that are named.
NAMED = 3


def given_words(record: dict) -> str:
  """The words of what a model is given of a record; "" where it has none."""
  values = []
  for name in GIVEN:
    value = record.get(name) or ""
    if isinstance(value, list | tuple):  # of messages
      value = " ".join(str(m.get("content")) for m in value if m.get("role") != "assistant")
    values.append(str(value))
  return words_of(" ".join(values))


def between(train: Sequence[Source], held_out: Source) -> tuple[list[dict], int]:
  """(the held-out records whose words a training record has too, the number of held-out records).

  Labels are not compared. Records without words are left out.
  """
  asked = [(given_words(record), record) for record in held_out.records()]
  wanted = {words for words, _ in asked if words}
  seen = set()
  for source in train:
    seen.update(wanted.intersection(map(given_words, source.records())))
  return [record for words, record in asked if words in seen], len(asked)


def warn(train: Sequence[Source], held_out: Source) -> None:
  """Counts and names the records which are in both, where there are any."""
  both, count = between(train, held_out)
  if not both:
    return
  names = [_name(record) for record in both[:NAMED]] + [".."] * (len(both) > NAMED)
  core.warn(
    f"{len(both):,} of the {count:,} records of {held_out.spec} are in the training data too, "
    f"which makes its figures too good: {'; '.join(names)}"
  )


def _name(record: dict) -> str:
  """Where a record stands, and how it begins."""
  words = given_words(record)
  beginning = words if len(words) <= 40 else f"{words[:40]} .."
  return " ".join(filter(None, (record.get("_where"), repr(beginning))))
