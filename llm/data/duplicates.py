"""Records that a run is both trained and evaluated on."""

import json
from typing import Sequence

from llm.data.embedded import words_of
from llm.data.sources import Source

# The fields of a record that a model is given. The others are what it should answer.
GIVEN = ("text", "text_pair", "question", "instruction", "input", "prompt", "messages")
# Duplicates that are named.
NAMED = 3


def given_words(record: dict) -> str:
  """The words of what a model is given of a record."""
  values = [record[name] for name in GIVEN if name in record]
  return words_of(" ".join(v if isinstance(v, str) else json.dumps(v) for v in values))


def between(train: Sequence[Source], held_out: Source) -> tuple[list[dict], int]:
  """(the held-out records whose words a training record has too, the number of held-out records).

  Labels are not compared.
  """
  held_out_records = list(held_out.records())
  wanted = {given_words(record) for record in held_out_records}
  seen = set()
  for source in train:
    seen.update(wanted.intersection(map(given_words, source.records())))
  return [r for r in held_out_records if given_words(r) in seen], len(held_out_records)


def remarks(train: Sequence[Source], held_out: Source) -> list[str]:
  """A warning that counts and names the records which are in both; none where there are none."""
  both, count = between(train, held_out)
  if not both:
    return []
  names = [_name(record) for record in both[:NAMED]] + [".."] * (len(both) > NAMED)
  return [
    f"warning: {len(both):,} of the {count:,} records of {held_out.spec} are in the training data "
    f"too, so figures flatter: {'; '.join(names)}"
  ]


def _name(record: dict) -> str:
  """Where a record stands, and how it begins."""
  words = given_words(record)
  beginning = words if len(words) <= 40 else f"{words[:40]} .."
  return " ".join(filter(None, (record.get("_where"), repr(beginning))))
