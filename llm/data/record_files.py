"""The records of one file, for each kind of file: text, JSON lines, CSV, SQuAD and Parquet.

The fields are as they stand in the file. `_where` says where a record came from. What is broken
raises UserError with file and line.
"""

import csv
import io
import itertools
import pathlib
import zlib
from typing import Any, Iterator

from llm import reading
from llm.core import UserError, first_line
from llm.data import compressed, squad, suspicions

# Of a line, a field or a part of a document that is in memory at once.
MOST_CHARACTERS = 2**24


def _lines(path: pathlib.Path) -> Iterator[tuple[int, str]]:
  """Numbers, from 1, and lines of a text file. A line of more than MOST_CHARACTERS comes in parts.

  Raises UserError on a file that is no regular one, not UTF-8, damaged or not readable.
  """
  reading.check_file(path)
  number = 0
  try:
    with compressed.open_decompressed(path) as file:
      text = io.TextIOWrapper(file, encoding="utf-8-sig")
      ended = True
      while line := text.readline(MOST_CHARACTERS):
        number += ended
        ended = line.endswith("\n")
        yield number, line
  except UnicodeDecodeError as error:
    raise UserError(
      f"{path}: not UTF-8 after line {number} ({error.reason}); "
      "convert it, e.g. with iconv -t utf-8"
    )
  except (EOFError, OSError, zlib.error) as error:
    if compressed.ending(path) and not getattr(error, "errno", None):
      raise UserError(
        f"{path}: cut off or damaged after line {number} ({first_line(error)}); compress or copy "
        "the file again"
      )
    raise UserError(f"{path}: {getattr(error, 'strerror', None) or first_line(error)}")


def _whole_lines(path: pathlib.Path) -> Iterator[tuple[int, str]]:
  """The same. Raises UserError on a line of more than MOST_CHARACTERS, which is one record."""
  for number, line in _lines(path):
    _check_length(line, f"{path}:{number}")
    yield number, line


def _check_length(line: str, where: str) -> None:
  if len(line) >= MOST_CHARACTERS:
    raise UserError(
      f"{where}: a line of more than {MOST_CHARACTERS:,} characters: is it what its source says, "
      "with a record a line?"
    )


def text_records(path: pathlib.Path) -> Iterator[dict]:
  """A record for every document; blank lines separate them.

  A document of more than MOST_CHARACTERS comes in parts, so that no more of it is in memory.
  """
  block: list[str] = []
  size = 0
  for _, line in _lines(path):
    line = line.strip()
    if line:
      block.append(line)
      size += len(line)
    if block and (not line or size >= MOST_CHARACTERS):
      yield {"text": "\n".join(block)}
      block = []
      size = 0
  if block:
    yield {"text": "\n".join(block)}


def jsonl_records(path: pathlib.Path) -> Iterator[dict]:
  """A record for every line that is not blank, or for every object of one JSON array."""
  twice = suspicions.KeysTwice()
  lines = _lines(path)
  for number, line in lines:
    where = f"{path}:{number}"
    if line.lstrip().startswith("["):
      text = "".join(itertools.chain([line], (line for _, line in lines)))
      for place, record in enumerate(reading.json_value(text, where, twice.at(where)), 1):
        yield _as_record(record, f"{path}: object {place}")
    elif line.strip():
      _check_length(line, where)
      yield _as_record(reading.json_value(line, where, twice.at(where)), where)


def _as_record(value: Any, where: str) -> dict:
  """A JSON object as a record. Raises UserError on any other value."""
  if not isinstance(value, dict):
    raise UserError(f'{where}: expected a JSON object, e.g. {{"text": "..."}}')
  return {**value, "_where": where}


def csv_records(path: pathlib.Path, tabs: bool = False) -> Iterator[dict]:
  """A record for every row; the first row names the fields.

  tabs: they part the fields, and a quote is a character like any other, as in GLUE's files.
  """
  csv.field_size_limit(MOST_CHARACTERS)
  lines = (line for _, line in _whole_lines(path))
  form = {"delimiter": "\t", "quoting": csv.QUOTE_NONE} if tabs else {}
  reader = csv.DictReader(lines, strict=True, **form)
  try:
    suspicions.warn_of_twice(reader.fieldnames or (), f"{path}: the column")
    for record in reader:
      if None in record or None in record.values():
        columns = reader.fieldnames or ()
        raise UserError(
          f"{path}:{reader.line_num}: expected {len(columns)} columns ({', '.join(columns)})"
        )
      yield {**record, "_where": f"{path}:{reader.line_num}"}
  except csv.Error as error:
    raise UserError(f"{path}:{reader.line_num}: not CSV: {error}")


def squad_records(path: pathlib.Path) -> Iterator[dict]:
  """A record for every question of a file in the layout of SQuAD."""
  return squad.records("".join(line for _, line in _lines(path)), path)


def parquet_records(path: pathlib.Path) -> Iterator[dict]:
  """A record for every row; the columns are the fields. Reads 1,024 rows at a time."""
  import pyarrow
  from pyarrow import parquet

  reading.check_file(path)
  number = 0
  try:
    with parquet.ParquetFile(path) as table:
      for batch in table.iter_batches(batch_size=1024):
        for record in batch.to_pylist():
          number += 1
          yield {**record, "_where": f"{path} row {number}"}
  except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
    raise UserError(
      f"{path}: not a whole Parquet file after row {number} ({first_line(error)}); copy it again"
    )
