"""How long commands take to start: to the first step of a run, and to the label of one text.

  python benchmarks/start.py [--rounds=5]

train: GPT tiny, two steps on a file of text. predict: one text, by `embedded:minilm` after one step
of fine-tuning on the reviews. A first round fills the caches; prints medians of those after it.
"""

import argparse
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parents[1]


def seconds_until(mark: str, *arguments) -> tuple[float, float]:
  """Seconds from the start of `python -m ...` to the first line that starts so, and to its end."""
  began = time.perf_counter()
  process = subprocess.Popen(
    [sys.executable, "-m", *map(str, arguments)], cwd=ROOT, text=True, stdout=subprocess.PIPE
  )
  until_mark = None
  for line in process.stdout:
    if until_mark is None and line.startswith(mark):
      until_mark = time.perf_counter() - began
  if process.wait() or until_mark is None:
    raise SystemExit(f"{' '.join(map(str, arguments))}: failed")
  return until_mark, time.perf_counter() - began


def train(folder: pathlib.Path) -> dict[str, float]:
  """A new run of GPT tiny in a folder that is not there."""
  first_step, whole = seconds_until(
    "step 1/",
    "llm.train",
    "--config=configs/pretrain_gpt.py:tiny",
    f"--workdir={folder}",
    f"--config.data.train=text:{ROOT / 'README.md'}",
    "--config.data.eval=",
    "--config.training.steps=2",
    "--config.training.log_every=1",
  )
  return {"train, to the first step": first_step, "train, two steps and a checkpoint": whole}


def fine_tune(folder: pathlib.Path):
  """A classifier to predict with."""
  seconds_until(
    "done",
    "llm.train",
    "--config=configs/finetune_classification.py:reviews",
    f"--workdir={folder}",
    "--config.transfer.checkpoint=embedded:minilm",
    "--config.data.eval=",
    "--config.training.keep_best=",
    "--config.training.epochs=0.0",
    "--config.training.steps=1",
  )


def predict(checkpoint: pathlib.Path) -> dict[str, float]:
  """One text."""
  label, whole = seconds_until(
    "{", "llm.predict", f"--checkpoint={checkpoint}", "--text=A film to see twice."
  )
  return {"predict, to the label": label, "predict, to the end": whole}


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--rounds", type=int, default=5)
  options = parser.parse_args()
  rounds = []
  with tempfile.TemporaryDirectory() as scratch:
    folder = pathlib.Path(scratch)
    fine_tune(folder / "classifier")
    for number in range(options.rounds + 1):
      rounds.append(train(folder / f"run-{number}") | predict(folder / "classifier"))
  for name in rounds[0]:
    print(f"{name:<36}{statistics.median(r[name] for r in rounds[1:]):5.2f} s")


if __name__ == "__main__":
  main()
