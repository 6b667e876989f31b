"""Makes runs/: text, workdirs that stopped half way, their second half's losses and all batches.

  python tests/golden/make_runs.py

It was run at revision db0707c, before the contracts of objectives and architectures changed. The
test resumes the workdirs, and holds losses and batches against those of that revision.
"""

import hashlib
import json
import os
import pathlib
import random
import shutil
import sys

os.environ["JAX_PLATFORMS"] = "cpu"

from llm import config as config_lib
from llm.objectives import base
from llm.training import experiment, loop

HERE = pathlib.Path(__file__).parent / "runs"
WORDS = (
  "the film was a joy to watch and every scene of it had warmth but its plot made no sense".split()
)
STEPS = (0, 1, 5)


def sentence(rng: random.Random) -> str:
  return " ".join(rng.choices(WORDS, k=rng.randint(4, 12))).capitalize() + "."


def write_data():
  """The text and the records that every run reads."""
  rng = random.Random(0)
  documents = ["\n".join(sentence(rng) for _ in range(rng.randint(2, 8))) for _ in range(24)]
  (HERE / "corpus.txt").write_text("\n\n".join(documents) + "\n")
  records = []
  for number in range(40):
    text, reply, other = sentence(rng), sentence(rng), sentence(rng)
    start = text.index(" ") + 1
    answer = text[start:].split()[0]
    records.append(
      {
        "text": text,
        "text_pair": reply,
        "label": ("bad", "good")[number % 2],
        "target": reply,
        "question": "What comes next?",
        "id": str(number),
        "answers": [{"text": answer, "answer_start": start}],
        "instruction": text,
        "input": "",
        "output": reply,
        "prompt": text,
        "chosen": reply,
        "rejected": other,
      }
    )
  (HERE / "records.jsonl").write_text("\n".join(map(json.dumps, records)) + "\n")


def tiny(objective: str, model: str, source: str, fields: dict | None = None):
  """A config of a very small model; its paths are relative to runs/."""
  config = config_lib.defaults(base.defaults(objective) | (fields or {}))
  config.model.update(
    name=model,
    num_layers=1,
    width=16,
    num_heads=2,
    mlp_dim=32,
    max_length=256,
    dropout=0.1,
    dtype="float32",
  )
  config.tokenizer.update(name="bytes", sentinels=20)
  config.data.update(train=source, sentences="lines")
  config.optimizer.update(learning_rate=1e-2, warmup_steps=2)
  config.training.update(batch_size=8, sequence_length=64, steps=6, log_every=1, save_every=3)
  return config


CORPUS, RECORDS = "text:corpus.txt", "jsonl:records.jsonl"
OBJECTIVES = {
  "masked_lm": ("masked_lm", "bert", CORPUS, {}),
  "masked_lm without pairs": ("masked_lm", "bert", CORPUS, {"next_sentence": False}),
  "masked_lm of whole words": ("masked_lm", "bert", CORPUS, {"whole_word": True}),
  "causal_lm": ("causal_lm", "gpt", CORPUS, {}),
  "span_corruption": ("span_corruption", "t5", CORPUS, {}),
  "prefix": ("span_corruption", "t5", CORPUS, {"prefix": True}),
  "classification": ("classification", "bert", RECORDS, {}),
  "classification by a decoder": ("classification", "gpt", RECORDS, {}),
  "span_qa": ("span_qa", "bert", RECORDS, {}),
  "text_to_text": ("text_to_text", "t5", RECORDS, {}),
  "chat": ("chat", "gpt", RECORDS, {}),
  "preference": ("preference", "gpt", RECORDS, {}),
}


def batch_digests() -> dict[str, dict[str, list[str]]]:
  """objective -> array -> a digest of it in the batches of STEPS."""
  digests = {}
  for name, (objective, model, source, fields) in OBJECTIVES.items():
    config = tiny(objective, model, source, fields)
    config.training.sequence_length = 256
    batches = experiment.prepare(config_lib.freeze(config), say=lambda text: None).batches
    digests[name] = {}
    for step in STEPS:
      for key, array in batches[step].items():
        content = str((array.dtype, array.shape)).encode() + array.tobytes()
        digests[name].setdefault(key, []).append(hashlib.sha256(content).hexdigest()[:16])
  return digests


def half_run(name: str, config):
  """The losses of a run's second half; the workdir keeps what the first half left."""
  workdir = HERE / name
  loop.train(config_lib.freeze(config), workdir, say=print)
  lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
  shutil.rmtree(workdir / "checkpoints" / str(config.training.steps))
  shutil.rmtree(workdir / "events")
  for file in ("result.json", "run.json", "lock"):
    (workdir / file).unlink()
  return {line["step"]: line["loss"] for line in lines if line["step"] > config.training.save_every}


def main():
  shutil.rmtree(HERE, ignore_errors=True)
  HERE.mkdir()
  os.chdir(HERE)
  os.environ["PRETUNE_CACHE"] = "/tmp/pretune-golden"
  write_data()
  pretraining = tiny("masked_lm", "bert", CORPUS)
  fine_tuning = tiny("classification", "", RECORDS)
  fine_tuning.model.update(
    num_layers=0, width=0, num_heads=0, mlp_dim=0, max_length=0, dropout=-1.0
  )
  fine_tuning.tokenizer.name = ""
  fine_tuning.transfer.update(checkpoint="bert", skip=(r"^head/(?!pooler)",))
  t5 = tiny("span_corruption", "t5", CORPUS)
  t5.optimizer.update(name="adafactor", schedule="rsqrt")
  expected = {"bert": half_run("bert", pretraining)}
  expected["classifier"] = half_run("classifier", fine_tuning)
  expected["t5"] = half_run("t5", t5)
  (HERE / "expected.json").write_text(
    json.dumps({"losses": expected, "batches": batch_digests()}, indent=1)
  )


if __name__ == "__main__":
  sys.exit(main())
