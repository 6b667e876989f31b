"""Label text, or answer questions on it, with a fine-tuned checkpoint.

python -m llm.predict --checkpoint=DIR --text="..." [--text_pair="..."]
python -m llm.predict --checkpoint=DIR --question="..." --context="..."
python -m llm.predict --checkpoint=DIR --input=FILE.jsonl --output=FILE.jsonl
python -m llm.predict --checkpoint=DIR --input=squad:FILE.json --output=FILE.json    (as the official scorer reads it)
"""

import json
import os
import pathlib

import jax
import numpy as np
import tqdm
from absl import flags

from llm import command, sharding
from llm.checkpoints import locate, manager
from llm.config import DataConfig, MeshConfig
from llm.core import UserError
from llm.data import batches as batches_lib
from llm.data import sources
from llm.training import experiment as experiment_lib

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

BATCH_SIZE = 32


def predict(step: pathlib.Path, records: list[dict]):
  """(objective, predictions, rows) of records, by a verified step: what its `results` are made of."""
  saved = experiment_lib.from_checkpoint(step)
  objective = saved.objective
  if not hasattr(objective, "results"):
    raise UserError(
      f"{step} was trained for {saved.config.objective['name']}, which labels no text: "
      "fine-tune it with configs/finetune_classification.py or finetune_qa.py first"
    )
  rows = objective.encode(
    records, saved.tokenizer, saved.config.model, saved.config.training.sequence_length
  )
  mesh = sharding.make_mesh(MeshConfig())
  with jax.set_mesh(mesh):
    params = manager.restore(step, "params")
    params = jax.device_put(params, sharding.shardings(params, mesh))
    forward = jax.jit(
      lambda p, b: objective.predict(saved.model.apply({"params": p}, b, train=False), b)
    )
    found = [
      jax.device_get(forward(params, batch))
      for batch in tqdm.tqdm(
        batches_lib.passes(rows, objective.example, BATCH_SIZE, mesh),
        desc="predicting",
        total=-(-len(rows) // BATCH_SIZE),
        unit=" batches",
        disable=None,
      )
    ]
  return objective, {k: np.concatenate([f[k] for f in found])[: len(rows)] for k in found[0]}, rows


def _records() -> list[dict]:
  if sum(v is not None for v in (_TEXT.value, _QUESTION.value, _INPUT.value)) != 1:
    raise UserError("give either --text, or --question with --context, or --input with --output")
  if _QUESTION.value is not None:
    if not _CONTEXT.value:
      raise UserError("--question needs --context, the text that holds the answer")
    return [{"text": _CONTEXT.value, "question": _QUESTION.value}]
  if _TEXT.value is not None:
    pair = {} if _TEXT_PAIR.value is None else {"text_pair": _TEXT_PAIR.value}
    return [{"text": _TEXT.value, **pair}]
  if not _OUTPUT.value:
    raise UserError("--input needs --output, the file to write")
  source = _INPUT.value if _INPUT.value.startswith("squad:") else f"jsonl:{_INPUT.value}"
  return list(sources.parse(source, DataConfig())[0].records())


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
  objective, predictions, rows = predict(step, records)
  results = objective.results(predictions, rows)
  if not _OUTPUT.value:
    print(json.dumps(results[0], ensure_ascii=False))
    return
  output = pathlib.Path(_OUTPUT.value)
  if _INPUT.value.startswith("squad:"):
    objective.write(predictions, rows, output)
  else:
    scratch = output.with_name(output.name + ".tmp")
    _write(records, results, scratch)
    os.replace(scratch, output)
  print(f"{len(results)} records labelled in {output}")


if __name__ == "__main__":
  command.run(main)
