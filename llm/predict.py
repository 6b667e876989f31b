"""Label text, or answer questions on it, with a fine-tuned checkpoint.

python -m llm.predict --checkpoint=DIR --text="..." [--text_pair="..."]
python -m llm.predict --checkpoint=DIR --question="..." --context="..."
python -m llm.predict --checkpoint=DIR --input=FILE.jsonl --output=FILE.jsonl
python -m llm.predict --checkpoint=DIR --input=squad:FILE.json --output=FILE.json

The last one writes the answers as the official scorer of SQuAD reads them.
"""

import json
import os
import pathlib
from typing import Sequence

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
  "input", None, "JSONL with a field text (and text_pair, or question); or squad:FILE."
)
_OUTPUT = flags.DEFINE_string("output", None, "The file to write the results of --input to.")

_SQUAD = "squad:"


def _is_squad_file(name: str | None) -> bool:
  return name is not None and name.startswith(_SQUAD)


def _records() -> list[dict]:
  """The records to label. Raises UserError if the flags contradict one another."""
  if _INPUT.value is not None:
    if not _OUTPUT.value:
      raise UserError("--input needs --output, the file to write")
    if any(flag.value is not None for flag in (_TEXT, _TEXT_PAIR, _QUESTION, _CONTEXT)):
      raise UserError("--input holds the records: give no --text, --question or --context with it")
    source = _INPUT.value if _is_squad_file(_INPUT.value) else f"jsonl:{_INPUT.value}"
    return list(sources.parse_one(source, DataConfig()).records())
  if (_QUESTION.value is None) != (_CONTEXT.value is None):
    raise UserError("--question needs --context, the text that holds the answer, and the reverse")
  if (_TEXT.value is None) == (_QUESTION.value is None):
    raise UserError("give either --text, or --question with --context, or --input with --output")
  if _QUESTION.value is not None:
    return [{"question": _QUESTION.value, "text": _CONTEXT.value}]
  if _TEXT_PAIR.value is not None:
    return [{"text": _TEXT.value, "text_pair": _TEXT_PAIR.value}]
  return [{"text": _TEXT.value}]


def _write_labels(records: Sequence[dict], results: Sequence[dict], output: pathlib.Path):
  """Writes JSONL, each record with its result. The file appears only when it is complete."""
  unfinished = output.with_name(output.name + ".tmp")
  with open(unfinished, "w", encoding="utf-8") as file:
    for record, result in zip(records, results):
      fields = {name: value for name, value in record.items() if name != "_where"}
      file.write(json.dumps({**fields, **result}, ensure_ascii=False) + "\n")
  os.replace(unfinished, output)


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
    print(json.dumps(results[0], ensure_ascii=False))
    return
  output = pathlib.Path(_OUTPUT.value)
  if _is_squad_file(_INPUT.value):
    _write_answers(labeller, predictions, rows, output)
  else:
    _write_labels(records, results, output)
  print(f"{len(results)} records labelled in {output}")


if __name__ == "__main__":
  command.run(main)
