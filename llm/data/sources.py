"""Where text comes from: one string names a source or a weighted mixture of them.

  embedded:reviews[test]   tfds:glue/mrpc[validation]   hf:ORG/NAME:CONFIG[split]
  text:PATH   jsonl:PATH   csv:PATH   squad:PATH   parquet:PATH
  text:a.txt@0.7,embedded:wikipedia@0.3

A PATH is a file, a pattern or a folder. A folder stands for the files in it, not in its subfolders,
that have an ending of the source's kind and are not hidden. Files but those of Parquet may be
compressed: .gz, .bz2, .zst. `KINDS`, at the end, has all kinds of sources.

A source gives records: dicts with `text`, and what the task has besides: `text_pair`, `label`, `target`, or
`question`, `answers` (text and answer_start) and `id` of a question on the text. A conversation has `messages`, or
`instruction`, `input` and `output`, in place of `text`; a preference `messages` or `prompt`, `chosen` and `rejected`.
In text files a blank line parts the documents, and each is a record.
"""

import bz2
import csv
import dataclasses
import glob
import gzip
import io
import json
import pathlib
import re
import zlib
from typing import BinaryIO, Callable, Iterator

from llm.config import DataConfig
from llm.core import UserError, first_line
from llm.data import cache, embedded

FIELDS = ("text", "text_pair", "label", "target", "question", "answers", "id")


@dataclasses.dataclass(frozen=True)
class Source:
  """One source, parsed. `weight` is its share of the rows of a mixture (not yet normalised)."""

  kind: str
  name: str
  split: str
  weight: float
  fields: tuple[tuple[str, str], ...]  # (our name, theirs)
  cache: pathlib.Path

  @property
  def spec(self) -> str:
    return f"{self.kind}:{self.name}" + (f"[{self.split}]" if self.split else "")

  def files(self) -> list[pathlib.Path]:
    """The files of a source that is made of files. Raises UserError if there are none."""
    paths = [pathlib.Path(p) for p in sorted(glob.glob(self.name, recursive=True))]
    if not paths and pathlib.Path(self.name).exists():
      paths = [pathlib.Path(self.name)]
    if not paths:
      raise UserError(f"{self.spec}: no such file, and no file matches it as a pattern")
    files = {}  # each once: a pattern may match a folder and what is in it
    for path in paths:
      files |= dict.fromkeys(self.files_in(path) if path.is_dir() else [path])
    if not files:
      raise UserError(
        f"{self.spec}: no file in the folder {paths[0]} ends in "
        f"{' or '.join(KINDS[self.kind].endings)}; name the files, e.g. {paths[0]}/*"
      )
    return list(files)

  def files_in(self, folder: pathlib.Path) -> list[pathlib.Path]:
    """The files of a folder that have an ending of this kind, but for hidden ones, sorted."""
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
    """A name for the content: what was made from it is valid while this stays the same."""
    return cache.digest(self.kind, repr(self.fields), *KINDS[self.kind].content(self))

  def records(self) -> Iterator[dict]:
    """The records, fields renamed. Raises UserError naming file and line of what is broken."""
    empty = True
    for record in KINDS[self.kind].records(self):
      empty = False
      yield self._renamed(record)
    if empty:
      raise UserError(f"{self.spec}: there is nothing in it")

  def _renamed(self, record: dict) -> dict:
    for ours, theirs in self.fields:
      if theirs not in record:
        raise UserError(
          f"{record.get('_where', self.spec)}: no field {theirs!r} (config.data.fields "
          f"asks for it); the fields are {_field_names(record)}"
        )
      record = {**record, ours: record[theirs]}
    if (
      not isinstance(record.get("text"), str)
      and not {"messages", "instruction", "prompt"} & record.keys()
    ):
      raise UserError(
        f"{record.get('_where', self.spec)}: the field 'text' must be a string; the fields are "
        f"{_field_names(record)}; rename with config.data.fields='text=THEIR_NAME'"
      )
    return record


def _field_names(record: dict) -> str:
  return ", ".join(sorted(k for k in record if k != "_where")) or "none"


def parse(spec: str, config: DataConfig) -> tuple[Source, ...]:
  """ "A@0.7,B@0.3" -> the sources. Raises UserError on what is not a source."""
  fields = []
  for item in filter(None, config.fields.split(",")):
    ours, _, theirs = item.partition("=")
    if ours.strip() not in FIELDS or not theirs.strip():
      raise UserError(
        f"config.data.fields: {item!r} is not of the form OURS=THEIRS with OURS one of {', '.join(FIELDS)}"
      )
    fields.append((ours.strip(), theirs.strip()))
  sources = []
  for item in re.split(rf",(?=(?:{'|'.join(KINDS)}):)", spec):
    kind, colon, name = item.partition(":")
    if not colon or kind not in KINDS:
      raise UserError(
        f"{item!r} is not a source: expected KIND:NAME with KIND one of "
        f"{', '.join(KINDS)}, e.g. text:corpus.txt"
      )
    weight, split = 1.0, ""
    if match := re.fullmatch(r"(.*)@([0-9.]+)", name):
      name = match[1]
      try:
        weight = float(match[2])
      except ValueError:
        weight = 0.0
      if weight <= 0:
        raise UserError(f"{item!r}: the weight after @ must be a positive number")
    if KINDS[kind].takes_split and (match := re.fullmatch(r"(.*)\[(.*)\]", name)):
      name, split = match.groups()
    if not name:
      raise UserError(f"{item!r}: a name is missing after {kind}:")
    sources.append(Source(kind, name, split, weight, tuple(fields), cache.cache_dir(config.cache)))
  return tuple(sources)


def parse_one(spec: str, config: DataConfig) -> Source:
  """The source of a string that may not be a mixture. Raises UserError."""
  source, *others = parse(spec, config)
  if others:
    raise UserError(f"{spec!r} must be one source, not a mixture")
  return source


def compression(path: pathlib.Path) -> str:
  """The ending of a compressed file; empty for any other."""
  return path.suffix if path.suffix in (".gz", ".bz2", ".zst") else ""


def opened(path: pathlib.Path) -> BinaryIO:
  """The bytes of a file, decompressed where its ending says that it is compressed."""
  if compression(path) == ".gz":
    return gzip.open(path)
  if compression(path) == ".bz2":
    return bz2.open(path)
  if compression(path) == ".zst":
    import pyarrow

    return pyarrow.CompressedInputStream(pyarrow.OSFile(str(path)), "zstd")
  return open(path, "rb")


def _lines(path: pathlib.Path) -> Iterator[tuple[int, str]]:
  number = 0
  try:
    with opened(path) as file:
      for number, line in enumerate(io.TextIOWrapper(file, encoding="utf-8-sig"), 1):
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
        "it again"
      )
    raise UserError(f"{path}: {getattr(error, 'strerror', None) or first_line(error)}")


def _text_records(path) -> Iterator[dict]:
  block = []
  for _, line in _lines(path):
    if line.strip():
      block.append(line.strip())
    elif block:
      yield {"text": "\n".join(block)}
      block = []
  if block:
    yield {"text": "\n".join(block)}


def _jsonl_records(path) -> Iterator[dict]:
  for number, line in _lines(path):
    if not line.strip():
      continue
    try:
      record = json.loads(line)
    except (ValueError, RecursionError) as error:
      raise UserError(f"{path}:{number}: not JSON: {first_line(error)}")
    if not isinstance(record, dict):
      raise UserError(f'{path}:{number}: expected a JSON object, e.g. {{"text": "..."}}')
    yield {**record, "_where": f"{path}:{number}"}


def _csv_records(path) -> Iterator[dict]:
  reader = csv.DictReader((line for _, line in _lines(path)), strict=True)
  try:
    for record in reader:
      if None in record or None in record.values():
        raise UserError(
          f"{path}:{reader.line_num}: expected {len(reader.fieldnames)} columns "
          f"({', '.join(reader.fieldnames)})"
        )
      yield {**record, "_where": f"{path}:{reader.line_num}"}
  except csv.Error as error:
    raise UserError(f"{path}:{reader.line_num}: not CSV: {error}")


def _squad_records(path) -> Iterator[dict]:
  """A record a question of a file in SQuAD's layout (versions 1.1 and 2.0)."""
  try:
    whole = json.loads("".join(line for _, line in _lines(path)))
    for article in whole["data"]:
      for paragraph in article["paragraphs"]:
        for asked in paragraph["qas"]:
          yield {
            "text": paragraph["context"],
            "question": asked["question"],
            "id": str(asked["id"]),
            "answers": asked.get("answers", []),
            "_where": f"{path}: question {asked['id']}",
          }
  except ValueError as error:
    raise UserError(f"{path}: not JSON: {first_line(error)}")
  except (KeyError, TypeError) as error:
    raise UserError(
      f"{path}: not in SQuAD's layout (data, paragraphs, context, qas, id, question): {error!r}"
    )


def _parquet_records(path: pathlib.Path) -> Iterator[dict]:
  """A record a row, its columns the fields; some rows are in memory at a time."""
  import pyarrow
  from pyarrow import parquet

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


def _tfds_builder(source: Source):
  import tensorflow_datasets as tfds

  try:
    return tfds.builder(source.name, file_format="array_record")
  except Exception as error:  # many kinds: unknown name, no network, unreadable folder
    raise UserError(f"{source.spec}: {first_line(error)}")


def _tfds_records(source: Source) -> Iterator[dict]:
  import tensorflow_datasets as tfds

  builder = _tfds_builder(source)
  try:
    builder.download_and_prepare(file_format="array_record")
    data = builder.as_data_source(split=source.split or "train")
  except Exception as error:
    raise UserError(f"{source.spec}: {first_line(error)}")
  names = {
    key: feature
    for key, feature in builder.info.features.items()
    if isinstance(feature, tfds.features.ClassLabel)
  }
  for number in range(len(data)):
    record = {}
    for key, value in data[number].items():
      if isinstance(value, bytes):
        record[key] = value.decode("utf-8")
      elif key in names:
        record[key] = names[key].int2str(int(value)) if value >= 0 else None
      else:
        record[key] = value.item() if hasattr(value, "item") and value.ndim == 0 else value
    yield {**record, "_where": f"{source.spec} record {number}"}


def _hf_dataset(source: Source):
  try:
    import datasets
  except ImportError:
    raise UserError(f"{source.spec} needs the extra hf: pip install -e '.[hf]'")
  name, _, config = source.name.partition(":")
  try:
    return datasets.load_dataset(name, config or None, split=source.split or "train")
  except Exception as error:
    raise UserError(f"{source.spec}: {first_line(error)}")


def _hf_records(source: Source) -> Iterator[dict]:
  data = _hf_dataset(source)
  names = {
    key: feature.names for key, feature in data.features.items() if hasattr(feature, "names")
  }
  for number, record in enumerate(data):
    for key, classes in names.items():
      if isinstance(record[key], int):
        record[key] = classes[record[key]] if record[key] >= 0 else None
    yield {**record, "_where": f"{source.spec} record {number}"}


def _embedded_records(source: Source) -> Iterator[dict]:
  return embedded.records(source.name, source.split or "train", source.cache)


def _embedded_content(source: Source) -> list[str]:
  return [embedded.ARCHIVES.get(source.name, ("", "", ""))[1], source.split]


def _tfds_content(source: Source) -> list[str]:
  return [_tfds_builder(source).info.full_name, source.split]


def _hf_content(source: Source) -> list[str]:
  return [_hf_dataset(source)._fingerprint]


def _file_digests(source: Source) -> list[str]:
  return [cache.file_digest(path) for path in source.files()]


@dataclasses.dataclass(frozen=True)
class Kind:
  """How sources of one kind are read.

  records: what is in it, before fields are renamed. content: strings that change when the records
  do. takes_split: a split may stand in brackets behind the name. endings: of the files of a folder.
  """

  records: Callable[[Source], Iterator[dict]]
  content: Callable[[Source], list[str]]
  takes_split: bool = False
  endings: tuple[str, ...] = ()


def _of_files(read: Callable[[pathlib.Path], Iterator[dict]], *endings: str) -> Kind:
  """A kind of source made of files, with what reads one of them."""

  def records(source: Source) -> Iterator[dict]:
    for path in source.files():
      yield from read(path)

  return Kind(records, _file_digests, endings=endings)


KINDS: dict[str, Kind] = {
  "embedded": Kind(_embedded_records, _embedded_content, takes_split=True),
  "text": _of_files(_text_records, ".txt", ".text"),
  "jsonl": _of_files(_jsonl_records, ".jsonl", ".ndjson"),
  "csv": _of_files(_csv_records, ".csv"),
  "squad": _of_files(_squad_records, ".json"),
  "parquet": _of_files(_parquet_records, ".parquet"),
  "tfds": Kind(_tfds_records, _tfds_content, takes_split=True),
  "hf": Kind(_hf_records, _hf_content, takes_split=True),
}
