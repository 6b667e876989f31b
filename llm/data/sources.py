"""Sources of text: a string names one source or a weighted mixture.

  embedded:reviews[test]   tfds:glue/mrpc[validation]   hf:ORG/NAME:CONFIG[split]
  text:PATH   jsonl:PATH   csv:PATH   tsv:PATH   squad:PATH   parquet:PATH
  shards:DIR   (the token shards of llm.prepare)
  text:a.txt@0.7,embedded:wikipedia@0.3

A PATH is a file, a pattern or a folder. A folder stands for its files that have an ending of the
source's kind. Hidden files and subfolders are left out. Files may be compressed (.gz, .bz2, .zst),
except for those of Parquet. `KINDS`, at the end of the file, lists all kinds.

A source yields records. A record is a dict with `text` and the fields of the task:

  classification and pairs: `text_pair`, `label`, `target`
  a question on the text: `question`, `id`, `answers` (each with text and answer_start)
  a conversation: `messages`, or `instruction`, `input` and `output`, instead of `text`
  a preference: `messages` or `prompt`, with `chosen` and `rejected`, instead of `text`

In a text file, blank lines separate the documents. Each document is a record.
"""

import bz2
import csv
import dataclasses
import functools
import glob
import gzip
import io
import itertools
import os
import pathlib
import re
import zlib
from typing import Any, BinaryIO, Callable, Iterable, Iterator, cast

from llm import cache, reading
from llm.config import DataConfig
from llm.core import UserError, first_line
from llm.data import embedded, made, squad, suspicions

# Of a line, a field or a part of a document that is in memory at once.
MOST_CHARACTERS = 2**24

COMPRESSIONS = (".gz", ".bz2", ".zst")

# The fields that config.data.fields may rename.
FIELDS = (
  "text",
  "text_pair",
  "label",
  "target",
  "question",
  "answers",
  "id",
  "messages",
  "instruction",
  "input",
  "output",
  "prompt",
  "chosen",
  "rejected",
)


@dataclasses.dataclass(frozen=True)
class Source:
  """One parsed source.

  weight: its share of the rows of a mixture, not yet normalised.
  fields: pairs of a field's name here and its name in the source.
  cache: the folder of the cache.
  """

  kind: str
  name: str
  split: str
  weight: float
  fields: tuple[tuple[str, str], ...]
  cache: pathlib.Path

  @property
  def spec(self) -> str:
    """The source as the config names it, without its weight."""
    return f"{self.kind}:{self.name}" + (f"[{self.split}]" if self.split else "")

  def files(self) -> list[pathlib.Path]:
    """The files that the path names, each once. Raises UserError if there are none."""
    paths = [pathlib.Path(p) for p in sorted(glob.glob(self.name, recursive=True))]
    if not paths and pathlib.Path(self.name).exists():
      paths = [pathlib.Path(self.name)]
    if not paths:
      raise UserError(f"{self.spec}: no such file, and no file matches it as a pattern")
    files = {}  # a dict, because a pattern may match both a folder and its files
    for path in paths:
      files |= dict.fromkeys(self.files_in(path) if path.is_dir() else [path])
    if not files:
      raise UserError(
        f"{self.spec}: no file in the folder {paths[0]} ends in "
        f"{' or '.join(KINDS[self.kind].endings)}; name the files, e.g. {paths[0]}/*"
      )
    return list(files)

  def files_in(self, folder: pathlib.Path) -> list[pathlib.Path]:
    """The sorted files of a folder that have an ending of this kind and are not hidden.

    Raises UserError if the folder cannot be read.
    """
    endings = KINDS[self.kind].endings
    try:
      return sorted(
        path
        for path in folder.iterdir()
        if path.name.removesuffix(compression(path)).lower().endswith(endings)
        and not path.name.startswith(".")
        and path.is_file()
      )
    except OSError as error:
      raise UserError(f"{folder}: {error.strerror}")

  def digest(self) -> str:
    """A hash of the content: what was built from the source is valid while it stays the same."""
    return cache.digest(self.kind, repr(self.fields), *KINDS[self.kind].content(self))

  def records(self) -> Iterator[dict]:
    """The records, with fields renamed.

    Raises UserError with file and line of a broken record, or if there is no record.
    """
    records = iter(KINDS[self.kind].records(self))
    first = next(records, None)
    if first is None:
      raise UserError(f"{self.spec}: there is nothing in it")
    renamed = map(self._renamed, itertools.chain([first], records))
    yield from suspicions.said(renamed, self.spec)

  def _renamed(self, record: dict) -> dict:
    for ours, theirs in self.fields:
      if theirs not in record:
        raise UserError(
          f"{record.get('_where', self.spec)}: no field {theirs!r}, which config.data.fields "
          f"names; the fields are {_field_names(record)}"
        )
      record = {**record, ours: record[theirs]}
    is_conversation = bool({"messages", "instruction", "prompt"} & record.keys())
    if not is_conversation and not isinstance(record.get("text"), str):
      raise UserError(
        f"{record.get('_where', self.spec)}: the field 'text' must be a string; the fields are "
        f"{_field_names(record)}; rename with config.data.fields='text=THEIR_NAME'"
      )
    return record


@dataclasses.dataclass(frozen=True)
class InMemory(Source):
  """A source that is read once: its records stay in memory."""

  @functools.cached_property
  def _records(self) -> list[dict]:
    return list(super().records())

  def records(self) -> Iterator[dict]:
    return iter(self._records)


def in_memory(source: Source) -> InMemory:
  """The same source, read once."""
  return InMemory(**vars(source))


def _field_names(record: dict) -> str:
  return ", ".join(sorted(k for k in record if k != "_where")) or "none"


def parse(spec: str, config: DataConfig) -> tuple[Source, ...]:
  """The sources of a string such as "A@0.7,B@0.3".

  Raises UserError on what is not a source.
  """
  fields = _parse_fields(config.fields)
  items = re.split(rf",(?=(?:{'|'.join(KINDS)}):)", spec)
  return tuple(_parse_source(item, fields, config) for item in items)


def _parse_fields(text: str) -> tuple[tuple[str, str], ...]:
  """Pairs of names: "text=body,label=class" -> (("text", "body"), ("label", "class"))."""
  fields = []
  for item in filter(None, text.split(",")):
    ours, _, theirs = item.partition("=")
    if ours.strip() not in FIELDS or not theirs.strip():
      raise UserError(
        f"config.data.fields: {item!r} is not of the form OURS=THEIRS with OURS one of "
        f"{', '.join(FIELDS)}"
      )
    fields.append((ours.strip(), theirs.strip()))
  return tuple(fields)


def _parse_source(item: str, fields: tuple[tuple[str, str], ...], config: DataConfig) -> Source:
  """The source of one item of a mixture, e.g. "embedded:reviews[test]@0.3"."""
  kind, colon, name = item.partition(":")
  if not colon or kind not in KINDS:
    raise UserError(
      f"{item!r} is not a source: expected KIND:NAME with KIND one of "
      f"{', '.join(KINDS)}, e.g. text:corpus.txt"
    )
  weight = 1.0
  if match := re.fullmatch(r"(.*)@([0-9.]+)", name):
    name = match[1]
    try:
      weight = float(match[2])
    except ValueError:
      weight = 0.0
    if weight <= 0:
      raise UserError(f"{item!r}: the weight after @ must be a positive number")
  split = ""
  if KINDS[kind].takes_split and (match := re.fullmatch(r"(.*)\[(.*)\]", name)):
    name, split = match.groups()
  if not name:
    raise UserError(f"{item!r}: a name is missing after {kind}:")
  if KINDS[kind].endings:  # it is a path
    name = os.path.expanduser(name)
  return Source(kind, name, split, weight, fields, cache.cache_dir(config.cache))


def parse_one(spec: str, config: DataConfig) -> Source:
  """The source of a string. Raises UserError on a mixture or what is not a source."""
  source, *others = parse(spec, config)
  if others:
    raise UserError(f"{spec!r} must be one source, not a mixture")
  return source


def compression(path: pathlib.PurePath) -> str:
  """The ending of a compressed file; "" for any other file."""
  return path.suffix if path.suffix in COMPRESSIONS else ""


def open_decompressed(path: pathlib.Path) -> BinaryIO:
  """Opens a file for reading bytes, decompressed by its ending."""
  return decompressed(open(path, "rb"), path)


def decompressed(stored: BinaryIO, path: pathlib.PurePath) -> BinaryIO:
  """The decompressed bytes of an open file, by the ending of its path."""
  if compression(path) == ".gz":
    return cast(BinaryIO, gzip.GzipFile(fileobj=stored))
  if compression(path) == ".bz2":
    return cast(BinaryIO, bz2.BZ2File(stored))
  if compression(path) == ".zst":
    import pyarrow

    return pyarrow.CompressedInputStream(pyarrow.PythonFile(stored), "zstd")
  return stored


def _lines(path: pathlib.Path) -> Iterator[tuple[int, str]]:
  """Numbers, from 1, and lines of a text file. A line of more than MOST_CHARACTERS comes in parts.

  Raises UserError on a file that is no regular one, not UTF-8, damaged or not readable.
  """
  reading.check_file(path)
  number = 0
  try:
    with open_decompressed(path) as file:
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
    if compression(path) and not getattr(error, "errno", None):
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


def _text_records(path: pathlib.Path) -> Iterator[dict]:
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


def _jsonl_records(path: pathlib.Path) -> Iterator[dict]:
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


def _csv_records(path: pathlib.Path, delimiter: str = ",") -> Iterator[dict]:
  """A record for every row; the first row names the fields."""
  csv.field_size_limit(MOST_CHARACTERS)
  lines = (line for _, line in _whole_lines(path))
  reader = csv.DictReader(lines, strict=True, delimiter=delimiter)
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


def _squad_records(path: pathlib.Path) -> Iterator[dict]:
  """A record for every question of a file in the layout of SQuAD."""
  return squad.records("".join(line for _, line in _lines(path)), path)


def _parquet_records(path: pathlib.Path) -> Iterator[dict]:
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


def _tfds_builder(source: Source) -> Any:
  """The data set's builder (`Any`: its annotations lack keywords)."""
  import tensorflow_datasets as tfds

  try:
    return tfds.builder(source.name, file_format="array_record")
  except Exception as error:  # an unknown name, no network, a folder that cannot be read, ..
    raise UserError(f"{source.spec}: {first_line(error)}")


def _tfds_records(source: Source) -> Iterator[dict]:
  """The records of a data set of TFDS, classes by their names; None for a missing class."""
  import tensorflow_datasets as tfds

  builder = _tfds_builder(source)
  try:
    builder.download_and_prepare(file_format="array_record")
    data = builder.as_data_source(split=source.split or "train")
  except Exception as error:
    raise UserError(f"{source.spec}: {first_line(error)}")
  classes = {
    key: feature
    for key, feature in builder.info.features.items()
    if isinstance(feature, tfds.features.ClassLabel)
  }
  for number in range(len(data)):
    record = {key: _tfds_value(value, classes.get(key)) for key, value in data[number].items()}
    yield {**record, "_where": f"{source.spec} record {number}"}


def _tfds_value(value: Any, label: Any) -> Any:
  """A value of TFDS as Python's own type. label: the feature of a class, None for other values."""
  if isinstance(value, bytes):
    return value.decode("utf-8")
  if label is not None:
    return label.int2str(int(value)) if value >= 0 else None
  if hasattr(value, "item") and value.ndim == 0:
    return value.item()
  return value


def _hf_dataset(source: Source) -> Any:
  try:
    import datasets  # pyright: ignore[reportMissingImports] (part of the extra hf)
  except ImportError:
    raise UserError(f"{source.spec} needs the extra hf: pip install -e '.[hf]'")
  name, _, config = source.name.partition(":")
  try:
    return datasets.load_dataset(name, config or None, split=source.split or "train")
  except Exception as error:
    raise UserError(f"{source.spec}: {first_line(error)}")


def _hf_records(source: Source) -> Iterator[dict]:
  """The records of a data set of the hub, classes by their names; None for a missing class."""
  data = _hf_dataset(source)
  class_names = {
    key: feature.names for key, feature in data.features.items() if hasattr(feature, "names")
  }
  for number, record in enumerate(data):
    for key, names in class_names.items():
      if isinstance(record[key], int):
        record[key] = names[record[key]] if record[key] >= 0 else None
    yield {**record, "_where": f"{source.spec} record {number}"}


def _embedded_records(source: Source) -> list[dict]:
  return embedded.records(source.name, source.split or "train", source.cache)


def _embedded_content(source: Source) -> list[str]:
  return [embedded.ARCHIVES.get(source.name, ("", "", ""))[1], source.split]


def _made_records(source: Source) -> Iterable[dict]:
  return made.records(source.name, source.split or "train")


def _made_content(source: Source) -> list[str]:
  return [source.name, source.split, str(made.TRAIN), str(made.LETTERS)]


def _shards_records(source: Source) -> Iterable[dict]:
  from llm.data import shards  # it reads through a tokenizer, which knows sources

  return shards.records(source)


def _shards_content(source: Source) -> list[str]:
  from llm.data import shards

  return shards.content(shards.facts(source))


def _tfds_content(source: Source) -> list[str]:
  return [_tfds_builder(source).info.full_name, source.split]


def _hf_content(source: Source) -> list[str]:
  return [_hf_dataset(source)._fingerprint]


def _file_digests(source: Source) -> list[str]:
  digests = []
  for path in source.files():
    reading.check_file(path)
    try:
      digests.append(cache.file_digest(path))
    except OSError as error:
      raise UserError(f"{path}: {error.strerror}")
  return digests


@dataclasses.dataclass(frozen=True)
class Kind:
  """How to read the sources of one kind.

  records: the records, before fields are renamed.
  content: strings that change when the records change.
  takes_split: whether a split in brackets may follow the name.
  endings: of the files that a folder stands for.
  """

  records: Callable[[Source], Iterable[dict]]
  content: Callable[[Source], list[str]]
  takes_split: bool = False
  endings: tuple[str, ...] = ()


def _of_files(read: Callable[[pathlib.Path], Iterator[dict]], *endings: str) -> Kind:
  """A kind of source that consists of files. read: yields the records of one file."""

  def records(source: Source) -> Iterator[dict]:
    for path in source.files():
      yield from read(path)

  return Kind(records, _file_digests, endings=endings)


KINDS: dict[str, Kind] = {
  "embedded": Kind(_embedded_records, _embedded_content, takes_split=True),
  "made": Kind(_made_records, _made_content, takes_split=True),
  "text": _of_files(_text_records, ".txt", ".text"),
  "jsonl": _of_files(_jsonl_records, ".jsonl", ".ndjson"),
  "csv": _of_files(_csv_records, ".csv"),
  "tsv": _of_files(functools.partial(_csv_records, delimiter="\t"), ".tsv"),
  "squad": _of_files(_squad_records, ".json"),
  "parquet": _of_files(_parquet_records, ".parquet"),
  "shards": Kind(_shards_records, _shards_content),
  "tfds": Kind(_tfds_records, _tfds_content, takes_split=True),
  "hf": Kind(_hf_records, _hf_content, takes_split=True),
}
