"""What pretraining buys on real text, small: each part runs the commands as a user would."""

import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest

from llm.cache import cache_dir
from llm.data import answers, embedded

pytestmark = pytest.mark.slow
CACHE = cache_dir()  # the user's own: taken before conftest gives the tests another
PLAIN = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "JAX_NUM_CPU_DEVICES")}


def python(*arguments) -> str:
  """What a command prints, run without the settings of the tests."""
  done = subprocess.run(
    [sys.executable, *arguments],
    env={**PLAIN, "PRETUNE_CACHE": str(CACHE)},
    capture_output=True,
    text=True,
  )
  assert done.returncode == 0, done.stderr
  return done.stdout


def test_answers_to_unseen_abstracts_beat_the_best_constant_one(tmp_path):
  """Two layers of a published BERT, and two from scratch, answer on abstracts that neither saw."""

  def f1_of(name, *more):
    python(
      "-m",
      "llm.train",
      "--config=configs/finetune_qa.py:abstracts",
      f"--workdir={tmp_path / name}",
      "--config.data.eval=",
      "--config.transfer.checkpoint=embedded:minilm",
      "--config.model.num_layers=2",
      "--config.training.epochs=0",
      "--config.training.steps=50",
      "--config.optimizer.learning_rate=5e-4",
      "--config.objective.stride=192",
      *more,
    )
    said = python(
      "-m",
      "llm.evaluate",
      f"--checkpoint={tmp_path / name}",
      "--config.data.eval=embedded:abstracts[test]",
    )
    return 100 * json.loads(said.splitlines()[-1])["f1"]

  def split(name):
    return [[a["text"] for a in r["answers"]] for r in embedded.records("abstracts", name, CACHE)]

  known = [text for found in split("train") for text in found]
  constant = max(
    100 * np.mean([answers.f1(guess, gold) for gold in split("test")]) for guess in known
  )
  pretrained = f1_of("pretrained", "--config.transfer.skip=('^head/','layers/[2-5]/')")
  scratch = f1_of("scratch", "--config.transfer.skip=('.',)")
  print(
    f"F1 on held-out abstracts: pretrained {pretrained:.1f}, scratch {scratch:.1f}, "
    f"best constant {constant:.1f}"
  )
  assert pretrained > constant + 15 and pretrained > scratch + 5


def test_the_quickstart_shows_what_pretraining_buys(tmp_path):
  """Its smaller form, from the archives to the report."""
  python("-m", "llm.quickstart", "--quick", f"--workdir={tmp_path}", f"--cache={CACHE}")
  result = json.loads((tmp_path / "result.json").read_text())
  compared = {task["task"]: task for task in result["compared"]}
  few = compared["sentiment, 64 labels"]
  assert few["low"] > 0 and few["pretrained"] > few["scratch"] + 0.01
  assert compared["replies to prompts"]["high"] < 0
  assert set(compared) == {
    "sentiment, 64 labels",
    "sentiment, 256 labels",
    "questions on abstracts",
    "replies to prompts",
  }
  assert result["worth"]["pretrained"]["labels"] > 64
  report = (tmp_path / "report.md").read_text()
  shown = f"{100 * few['pretrained']:.1f} | {100 * few['scratch']:.1f}"
  assert shown in re.sub(" +", " ", report)
  print(report.split("\n\n")[1])
