"""Label text, or answer questions on it, with a fine-tuned checkpoint.

python -m llm.predict --checkpoint=DIR --text="..." [--text_pair="..."]
python -m llm.predict --checkpoint=DIR --question="..." --context="..."
python -m llm.predict --checkpoint=DIR --input=SOURCE [--output=FILE.jsonl]
python -m llm.predict --checkpoint=DIR --input=squad:FILE.json --output=FILE.json

A source is KIND:NAME (docs/data.md), or a file of JSON lines. Without --output its results are
printed. The last one writes the answers as the official scorer of SQuAD reads them.
"""

import json
import os
import pathlib
import sys
from typing import Iterable, Iterator, Sequence

from absl import flags

from llm import command
from llm.checkpoints import locate
from llm.config import DataConfig
from llm.core import UserError
from llm.data import sources
from llm.inference.labeller import Labeller
from llm.objectives import base

_CHECKPOINT = flags.DEFINE_string(
  "checkpoint", None, "A workdir, its checkpoints folder or one step."
)
_TEXT = flags.DEFINE_string("text", None, "One text to label.")
_TEXT_PAIR = flags.DEFINE_string("text_pair", None, "The second text, for tasks on pairs.")
_QUESTION = flags.DEFINE_string("question", None, "A question on --context.")
_CONTEXT = flags.DEFINE_string("context", None, "The text that holds the answer.")
_INPUT = flags.DEFINE_string(
  "input",
  None,
  "A source with a field text (and text_pair, or question), e.g. csv:FILE; or a JSONL file.",
)
_OUTPUT = flags.DEFINE_string("output", None, "The file to write the results of --input to.")
_FIELDS = flags.DEFINE_string("config.data.fields", "", "Renames fields: text=THEIRS,..")
_CACHE = flags.DEFINE_string("config.data.cache", "", "The folder of the cache.")

_SQUAD = "squad:"


def _is_squad_file(name: str | None) -> bool:
  return name is not None and name.startswith(_SQUAD)


def _records() -> list[dict]:
  """The records to label. Raises UserError if the flags contradict one another."""
  if _INPUT.value is not None:
    if _is_squad_file(_INPUT.value) and not _OUTPUT.value:
      raise UserError("--input=squad:FILE needs --output, the file to write")
    if any(flag.value is not None for flag in (_TEXT, _TEXT_PAIR, _QUESTION, _CONTEXT)):
      raise UserError("--input holds the records: give no --text, --question or --context with it")
    is_source = _INPUT.value.partition(":")[0] in sources.KINDS
    source = _INPUT.value if is_source else f"jsonl:{_INPUT.value}"
    data = DataConfig(fields=_FIELDS.value, cache=_CACHE.value)
    return list(sources.parse_one(source, data).records())
  if (_QUESTION.value is None) != (_CONTEXT.value is None):
    raise UserError("--question needs --context, the text that holds the answer, and the reverse")
  if (_TEXT.value is None) == (_QUESTION.value is None):
    raise UserError("give either --text, or --question with --context, or --input with --output")
  if _QUESTION.value is not None:
    return [{"question": _QUESTION.value, "text": _CONTEXT.value}]
  if _TEXT_PAIR.value is not None:
    return [{"text": _TEXT.value, "text_pair": _TEXT_PAIR.value}]
  return [{"text": _TEXT.value}]


def _lines(records: Sequence[dict], results: Sequence[dict]) -> Iterator[str]:
  """A line of JSON for each record, with its result."""
  for record, result in zip(records, results):
    fields = {name: value for name, value in record.items() if name != "_where"}
    # A column of Parquet may hold dates or bytes, which JSON has not.
    yield json.dumps({**fields, **result}, ensure_ascii=False, default=str) + "\n"


def _write_labels(lines: Iterable[str], output: pathlib.Path):
  """Writes the lines. A file appears only when it is complete; a device or a pipe is written to."""
  if output.exists() and not output.is_file():
    with open(output, "w", encoding="utf-8") as file:
      file.writelines(lines)
    return
  target = output.resolve()  # what a link leads to is replaced, not the link
  unfinished = target.with_name(target.name + ".tmp")
  unfinished.write_text("".join(lines), encoding="utf-8")
  os.replace(unfinished, target)


def _write_answers(
  labeller: Labeller, predictions: base.Predictions, rows: base.Rows, output: pathlib.Path
):
  """Writes the answers to the questions of a SQuAD file."""
  if not isinstance(labeller.objective, base.Answers):
    raise UserError(f"--input=squad:FILE holds questions, which {labeller.name} does not answer")
  labeller.objective.write(predictions, rows, output)


def main():
  """Labels the records and prints the result, or writes the results to a file."""
  if not _CHECKPOINT.value:
    raise UserError(
      "--checkpoint is missing: a workdir of llm.train, its checkpoints folder or one step"
    )
  records = _records()
  step = locate.find(_CHECKPOINT.value)
  command.start_cpu()
  labeller = Labeller(step)
  for record in records:
    labeller.check(record)
  predictions, rows = labeller.label(records)
  results = labeller.objective.results(predictions, rows)
  if not _OUTPUT.value:
    # The text of a flag is not printed again.
    shown = records if _INPUT.value is not None else [{}]
    sys.stdout.writelines(_lines(shown, results))
    return
  output = pathlib.Path(_OUTPUT.value)
  if _is_squad_file(_INPUT.value):
    _write_answers(labeller, predictions, rows, output)
  else:
    _write_labels(_lines(records, results), output)
  print(f"{len(results)} records labelled in {output}", file=sys.stderr)


if __name__ == "__main__":
  command.run(main)
