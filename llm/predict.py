"""Label text, or answer questions on it, with a fine-tuned checkpoint.

python -m llm.predict --checkpoint=DIR --text="..." [--text_pair="..."]
python -m llm.predict --checkpoint=DIR --question="..." --context="..."
python -m llm.predict --checkpoint=DIR --input=FILE.jsonl --output=FILE.jsonl
python -m llm.predict --checkpoint=DIR --input=squad:FILE.json --output=FILE.json    (as the official scorer reads it)
"""

import json
import os
import pathlib

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
_OUTPUT = flags.DEFINE_string("output", None, "Where what was found goes.")


def _records() -> list[dict]:
  """The records that the flags ask about. Raises UserError where they do not fit one another."""
  if _INPUT.value is not None:
    if not _OUTPUT.value:
      raise UserError("--input needs --output, the file to write")
    if any(flag.value is not None for flag in (_TEXT, _TEXT_PAIR, _QUESTION, _CONTEXT)):
      raise UserError("--input holds the records: give no --text, --question or --context with it")
    source = _INPUT.value if _INPUT.value.startswith("squad:") else f"jsonl:{_INPUT.value}"
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


def _write(records, results, path: pathlib.Path):
  """JSONL: each record with its result."""
  with open(path, "w", encoding="utf-8") as file:
    for record, result in zip(records, results):
      given = {k: v for k, v in record.items() if k != "_where"}
      file.write(json.dumps({**given, **result}, ensure_ascii=False) + "\n")


def main():
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
  if _INPUT.value.startswith("squad:"):
    _write_answers(labeller, predictions, rows, output)
  else:
    scratch = output.with_name(output.name + ".tmp")
    _write(records, results, scratch)
    os.replace(scratch, output)
  print(f"{len(results)} records labelled in {output}")


def _write_answers(
  labeller: Labeller, predictions: base.Predictions, rows: base.Rows, output: pathlib.Path
):
  if not isinstance(labeller.objective, base.Answers):
    raise UserError(f"--input=squad:FILE holds questions, which {labeller.name} does not answer")
  labeller.objective.write(predictions, rows, output)


if __name__ == "__main__":
  command.run(main)
