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

import dataclasses
import functools
import glob
import itertools
import os
import pathlib
import re
from typing import Callable, Iterable, Iterator

from llm import cache, reading
from llm.config import DataConfig
from llm.core import UserError
from llm.data import compressed, embedded, hubs, made, record_files, suspicions

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
        if path.name.removesuffix(compressed.ending(path)).lower().endswith(endings)
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
    return Record(record, self.spec)


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


class Record(dict):
  """The fields of a record. Raises UserError where a field is asked for that it lacks."""

  def __init__(self, fields: dict, spec: str):
    super().__init__(fields)
    self.spec = spec

  def __missing__(self, name: str):
    raise UserError(
      f"{self.get('_where', self.spec)}: no field {name!r}, which is needed here; the fields "
      f"are {_field_names(self)}"
    )


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
  name, weight = _parse_weight(name, item)
  split = ""
  if KINDS[kind].takes_split and (match := re.fullmatch(r"(.*)\[(.*)\]", name)):
    name, split = match.groups()
  if not name:
    raise UserError(f"{item!r}: a name is missing after {kind}:")
  if KINDS[kind].endings:  # it is a path
    name = os.path.expanduser(name)
  return Source(kind, name, split, weight, fields, cache.cache_dir(config.cache))


def _parse_weight(name: str, item: str) -> tuple[str, float]:
  """(the name, its weight), for example ("reviews", 0.3) of "reviews@0.3"; the weight may lack."""
  match = re.fullmatch(r"(.*)@([0-9.]+)", name)
  if not match:
    return name, 1.0
  try:
    weight = float(match[2])
  except ValueError:
    weight = 0.0
  if weight <= 0:
    raise UserError(f"{item!r}: the weight after @ must be a positive number")
  return match[1], weight


def parse_one(spec: str, config: DataConfig) -> Source:
  """The source of a string. Raises UserError on a mixture or what is not a source."""
  source, *others = parse(spec, config)
  if others:
    raise UserError(f"{spec!r} must be one source, not a mixture")
  return source


def _embedded_records(source: Source) -> list[dict]:
  return embedded.records(source.name, source.split or "train", source.cache)


def _embedded_content(source: Source) -> list[str]:
  # Several names share an archive.
  return [source.name, embedded.ARCHIVES.get(source.name, ("", "", ""))[1], source.split]


def _made_records(source: Source) -> Iterable[dict]:
  return made.records(source.name, source.split or "train")


def _made_content(source: Source) -> list[str]:
  return [source.name, source.split, str(made.TRAIN), str(made.LETTERS)]


def _shards_records(source: Source) -> Iterable[dict]:
  from llm.data import shards  # which imports Source from here

  return shards.records(source)


def _shards_content(source: Source) -> list[str]:
  from llm.data import shards

  return shards.content(shards.facts(source))


def _tfds_records(source: Source) -> Iterable[dict]:
  return hubs.tfds_records(source.name, source.split or "train", source.spec)


def _tfds_content(source: Source) -> list[str]:
  return [hubs.tfds_version(source.name, source.spec), source.split]


def _hf_records(source: Source) -> Iterable[dict]:
  return hubs.hf_records(source.name, source.split or "train", source.spec)


def _hf_content(source: Source) -> list[str]:
  return [hubs.hf_fingerprint(source.name, source.split or "train", source.spec)]


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
  "text": _of_files(record_files.text_records, ".txt", ".text"),
  "jsonl": _of_files(record_files.jsonl_records, ".jsonl", ".ndjson"),
  "csv": _of_files(record_files.csv_records, ".csv"),
  "tsv": _of_files(functools.partial(record_files.csv_records, tabs=True), ".tsv"),
  "squad": _of_files(record_files.squad_records, ".json"),
  "parquet": _of_files(record_files.parquet_records, ".parquet"),
  "shards": Kind(_shards_records, _shards_content),
  "tfds": Kind(_tfds_records, _tfds_content, takes_split=True),
  "hf": Kind(_hf_records, _hf_content, takes_split=True),
}
