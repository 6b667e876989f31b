"""What a preparation did, from the counts of its tasks: report.json, report.md and a picture."""

import dataclasses
import json
import math
import pathlib
from typing import Any, Sequence

import tabulate
from datatrove.pipeline.base import PipelineStep

from llm.corpus import accounts
from llm.corpus.accounts import Counts, Passing, Timed
from llm.corpus.duplicates import GROUP
from llm.corpus.readers import Reader
from llm.corpus.shards import Tokenize, TrainTokenizer
from llm.corpus.stages import Output, Stage

EXCERPT = 300  # characters of a document in report.md


@dataclasses.dataclass
class Account:
  """What one step did. dropped: reason -> documents. seconds: summed over its tasks."""

  name: str
  documents_in: int
  documents_out: int
  characters_in: int
  characters_out: int
  dropped: dict[str, int]
  seconds: float


class _Books:
  """Goes through the blocks in order, and closes an account at every `Passing`."""

  def __init__(self) -> None:
    self.accounts: list[Account] = []
    self.languages: dict[str, int] = {}
    self.lengths: dict[str, dict[str, int]] = {}
    self.damaged: list[str] = []
    self.read_bytes = 0
    self.tokens = 0
    self._documents = self._characters = 0
    self._dropped: dict[str, int] = {}
    self._seconds = 0.0  # since the last account was closed
    self._waited = 0.0  # of the last `Passing` of the stage

  def enter(self, stage: Stage, counts: Sequence[Counts]) -> None:
    self._waited = 0.0
    for block, count in zip(stage.blocks, counts):
      self._enter(block, count, stage)

  def _enter(self, block: PipelineStep, count: Counts, stage: Stage) -> None:
    self._dropped |= count.starting("dropped_")
    if isinstance(block, Reader):
      self._documents = count.count("documents_in")
      self.read_bytes = count.count("bytes")
      self.damaged = [f"{where} ({n} times)" for where, n in count.starting("damaged ").items()]
    elif isinstance(block, Timed):
      self._seconds += count.count("milliseconds") / 1000
    elif isinstance(block, Tokenize | TrainTokenizer):
      self.tokens += count.count("tokens")
      self.accounts.append(self._last(block.name, count))
    elif isinstance(block, Passing):
      self._close(block, count)
    elif not any(isinstance(b, Passing) for b in stage.blocks):
      self._seconds += count.seconds  # a stage that compares signatures
    if languages := count.starting("language "):
      self.languages = languages

  def _close(self, block: Passing, count: Counts) -> None:
    self.lengths[block.name] = count.starting("length ")
    seconds = self._seconds + count.seconds - self._waited
    self._waited = count.seconds
    self._seconds = 0.0
    documents = count.count("documents")
    characters = count.count("characters")
    if block.name == "kept":
      return
    dropped = self._dropped
    if unnamed := self._documents - documents - sum(dropped.values()):
      dropped = {**dropped, block.name: unnamed}
    first = not self.accounts
    self.accounts.append(
      Account(
        block.name,
        self._documents,
        documents,
        characters if first else self._characters,
        characters,
        dropped,
        seconds,
      )
    )
    self._documents = documents
    self._characters = characters
    self._dropped = {}

  def _last(self, name: str, count: Counts) -> Account:
    """The account of a step after the documents are written."""
    before = self._documents
    self._documents -= count.count("dropped")
    dropped = count.starting("dropped_")
    counts = (before, self._documents, self._characters, self._characters)
    return Account(name, *counts, dropped, count.seconds)


def write(stages: Sequence[Stage], output: Output) -> dict[str, Any]:
  """Writes report.json, report.md and flow.png beside the shards, and returns the figures.

  A corpus in a bucket gets them there.
  """
  books = _Books()
  for stage in stages:
    books.enter(stage, accounts.of_stage(output.logs(stage.name)))
  figures = _figures(books)
  folder = output.whole
  with folder.open("report.json", "wt") as file:
    json.dump(figures, file, indent=1)
  samples = _samples(output)
  with folder.open("report.md", "wt", encoding="utf-8", errors="replace") as file:
    file.write(_in_words(figures, samples))
  with folder.open("flow.png", "wb") as file:
    _draw(figures, file)
  return figures


def _figures(books: _Books) -> dict[str, Any]:
  first, last = books.accounts[0], books.accounts[-1]
  dropped: dict[str, int] = {}
  for account in books.accounts:
    for reason, count in account.dropped.items():
      dropped[reason] = dropped.get(reason, 0) + count
  return {
    "documents_in": first.documents_in,
    "documents_out": last.documents_out,
    "characters_out": last.characters_out,
    "bytes_in": books.read_bytes,
    "tokens": books.tokens,
    "dropped": dict(sorted(dropped.items(), key=lambda item: -item[1])),
    "steps": [dataclasses.asdict(account) for account in books.accounts],
    "languages": books.languages,
    "lengths": books.lengths,
    "damaged": books.damaged,
  }


def _samples(output: Output) -> dict[str, dict[str, list[dict]]]:
  """Step -> reason -> documents to look at. Only of a corpus on this machine."""
  folder = pathlib.Path(output.samples.path)
  names = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
  return {name: accounts.read_samples(folder, name) for name in names}


STEP_HEADERS = (
  "step",
  "documents in",
  "out",
  "characters out",
  "tokens out",
  "seconds",
  "documents/s",
  "MB/s",
)


def _in_words(figures: dict[str, Any], samples: dict[str, dict[str, list[dict]]]) -> str:
  """The content of report.md."""
  tokens_a_character = figures["tokens"] / max(1, figures["characters_out"])
  kept = figures["documents_out"]
  parts = [
    "# What was prepared\n",
    f"{figures['documents_in']:,} documents in, {kept:,} out, "
    f"{figures['documents_in'] - kept:,} dropped; {figures['tokens']:,} tokens.\n",
    "![documents at every step](flow.png)\n",
    _table(STEP_HEADERS, [_row(step, tokens_a_character) for step in figures["steps"]]),
    "Tokens before the last step are estimated from the characters. Seconds are summed over tasks: "
    "the rates are those of one core.\n",
    "## Why documents were dropped\n",
  ]
  if figures["dropped"]:
    rows = [(reason, f"{count:,}") for reason, count in figures["dropped"].items()]
    parts.append(_table(("reason", "documents"), rows))
  else:
    parts.append("None was.\n")
  if figures["damaged"]:
    lines = "\n".join(f"- {where}" for where in figures["damaged"])
    parts += ["## Files that could not be read to their end\n", lines + "\n"]
  if figures["languages"]:
    rows = [(name, f"{count:,}") for name, count in list(figures["languages"].items())[:20]]
    parts += ["## Languages\n", _table(("language", "documents"), rows)]
  parts += ["## Lengths\n", _lengths(figures["lengths"])]
  parts += _near(samples)
  for step, by_reason in samples.items():
    if not step.endswith("-originals"):
      parts += _excerpts(step, by_reason)
  return "\n".join(parts)


def _row(step: dict[str, Any], tokens_a_character: float) -> tuple[str, ...]:
  seconds = step["seconds"]
  rate = step["documents_in"] / seconds if seconds > 1e-3 else math.nan
  megabytes = step["characters_in"] / seconds / 1e6 if seconds > 1e-3 else math.nan
  return (
    step["name"],
    f"{step['documents_in']:,}",
    f"{step['documents_out']:,}",
    f"{step['characters_out']:,}",
    f"{step['characters_out'] * tokens_a_character:,.0f}",
    f"{seconds:,.1f}",
    "" if math.isnan(rate) else f"{rate:,.0f}",
    "" if math.isnan(megabytes) else f"{megabytes:,.1f}",
  )


def _table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
  align = ("left",) + ("right",) * (len(headers) - 1)
  return tabulate.tabulate(rows, headers, "github", colalign=align, disable_numparse=True) + "\n"


def _lengths(lengths: dict[str, dict[str, int]]) -> str:
  """Documents by their number of characters, before the first step and after the last."""
  before, after = lengths.get("read", {}), lengths.get("kept", {})
  bits = sorted({int(bit) for bit in (*before, *after)})
  rows = [
    (f"below {2**bit:,}", f"{before.get(str(bit), 0):,}", f"{after.get(str(bit), 0):,}")
    for bit in bits
  ]
  return _table(("characters", "read", "kept"), rows) if rows else ""


def _near(samples: dict[str, dict[str, list[dict]]]) -> list[str]:
  """What was dropped as a near duplicate, beside what was kept for it."""
  originals = {
    record["metadata"].get(GROUP): record
    for records in samples.get("near_duplicates-originals", {}).values()
    for record in records
  }
  rows = []
  for records in samples.get("near_duplicates", {}).values():
    for record in records:
      if original := originals.get(record["metadata"].get(GROUP)):
        rows.append((_one_line(record, 100), _one_line(original, 100)))
  if not rows:
    return []
  return ["## Near duplicates\n", _table(("dropped", "kept"), rows)]


def _excerpts(step: str, by_reason: dict[str, list[dict]]) -> list[str]:
  parts = []
  for reason, records in sorted(by_reason.items()):
    title = "Kept" if step == "kept" else f"Dropped by {step}: {reason}"
    if step == "line_duplicates":
      title = "Shortened or dropped by line_duplicates"
    lines = "\n".join(f"- `{record['id']}` {_one_line(record, EXCERPT)}" for record in records)
    parts += [f"## {title}\n", lines + "\n"]
  return parts


def _one_line(record: dict, length: int) -> str:
  text = " ".join(record["text"].split())[:length].replace("|", "\\|")
  shared = record.get("metadata", {}).get("shared")
  return f"(shares: {shared}) {text}" if shared else text


def _draw(figures: dict[str, Any], file: Any) -> None:
  """Bars: what each step kept and what it dropped."""
  from matplotlib.figure import Figure

  steps = figures["steps"]
  names = [step["name"] for step in steps]
  kept = [step["documents_out"] for step in steps]
  lost = [step["documents_in"] - step["documents_out"] for step in steps]
  figure = Figure(figsize=(8, 0.4 * len(steps) + 1.2), layout="constrained")
  axes = figure.subplots()
  axes.barh(names, kept, color="#3b6ea5", label="kept")
  axes.barh(names, lost, left=kept, color="#d98c5f", label="dropped")
  for number, step in enumerate(steps):
    reasons = sorted(step["dropped"].items(), key=lambda item: -item[1])[:3]
    text = ", ".join(f"{reason} {count:,}" for reason, count in reasons)
    axes.text(step["documents_in"], number, f" {text}", va="center", fontsize=7)
  axes.invert_yaxis()
  axes.set_xlabel("documents")
  axes.margins(x=0.35)
  axes.legend(loc="lower right")
  figure.savefig(file, format="png", dpi=150)
