"""Label text with a fine-tuned checkpoint.

python -m llm.predict --checkpoint=DIR --text="..." [--text_pair="..."]
python -m llm.predict --checkpoint=DIR --input=FILE.jsonl --output=FILE.jsonl
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
from llm.objectives import classification
from llm.training import experiment as experiment_lib

_CHECKPOINT = flags.DEFINE_string("checkpoint", None, "A workdir, its checkpoints folder or one step.")
_TEXT = flags.DEFINE_string("text", None, "One text to label.")
_TEXT_PAIR = flags.DEFINE_string("text_pair", None, "The second text, for tasks on pairs.")
_INPUT = flags.DEFINE_string("input", None, "JSONL with a field text (and text_pair).")
_OUTPUT = flags.DEFINE_string("output", None, "Where the labelled JSONL goes.")

BATCH_SIZE = 32


def predict(step: pathlib.Path, records: list[dict]) -> list[dict]:
  """Label and probabilities (or score) of each record, by a verified step."""
  saved = experiment_lib.from_checkpoint(step)
  objective = saved.objective
  if not isinstance(objective, classification.Objective):
    raise UserError(f"{step} was trained for {saved.config.objective['name']}, which labels no text: "
                    "fine-tune it with configs/finetune_classification.py first")
  rows = objective.encode(records, saved.tokenizer, saved.config.model, saved.config.training.sequence_length)
  mesh = sharding.make_mesh(MeshConfig())
  with jax.set_mesh(mesh):
    params = manager.restore(step, "params")
    params = jax.device_put(params, sharding.shardings(params, mesh))
    forward = jax.jit(lambda p, b: objective.predict(saved.model.apply({"params": p}, b, train=False), b))
    found = [jax.device_get(forward(params, batch)) for batch in tqdm.tqdm(
        batches_lib.passes(rows, objective.example, BATCH_SIZE, mesh), desc="predicting",
        total=-(-len(rows) // BATCH_SIZE), unit=" batches", disable=None)]
  merged = {k: np.concatenate([f[k] for f in found])[:len(records)] for k in found[0]}
  if objective.regression:
    return [{"score": float(s)} for s in merged["score"]]
  return [{"label": objective.classes[int(p.argmax())],
           "probabilities": {c: round(float(x), 6) for c, x in zip(objective.classes, p)}}
          for p in merged["probabilities"]]


def _records() -> list[dict]:
  if (_TEXT.value is None) == (_INPUT.value is None):
    raise UserError("give either --text or --input (with --output)")
  if _TEXT.value is not None:
    pair = {} if _TEXT_PAIR.value is None else {"text_pair": _TEXT_PAIR.value}
    return [{"text": _TEXT.value, **pair}]
  if not _OUTPUT.value:
    raise UserError("--input needs --output, the file to write")
  return list(sources.parse(f"jsonl:{_INPUT.value}", DataConfig())[0].records())


def main():
  if not _CHECKPOINT.value:
    raise UserError("--checkpoint is missing: a workdir of llm.train, its checkpoints folder or one step")
  records = _records()
  step = locate.find(_CHECKPOINT.value)
  command.use_cpu_cores(BATCH_SIZE)
  results = predict(step, records)
  if _TEXT.value is not None:
    print(json.dumps(results[0]))
    return
  scratch = pathlib.Path(_OUTPUT.value + ".tmp")
  with open(scratch, "w", encoding="utf-8") as file:
    for record, result in zip(records, results):
      given = {k: v for k, v in record.items() if k != "_where"}
      file.write(json.dumps({**given, **result}, ensure_ascii=False) + "\n")
  os.replace(scratch, _OUTPUT.value)
  print(f"{len(results)} records labelled in {_OUTPUT.value}")


if __name__ == "__main__":
  command.run(main)
