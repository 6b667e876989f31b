"""What large corpora cost: packing plans by the number of documents, and preparation by its size.

  python benchmarks/corpora.py plan [--documents=1e6,1e7,1e8] [--mean=100] [--folder=DIR]
  python benchmarks/corpora.py prepare [--documents=1e4,4e4] [--workers=2] [--folder=DIR]

plan: documents of made-up lengths (log-normal), packed into rows of 1,024 tokens; no token is
stored. Prints seconds, peak memory, bytes of the plan, seconds to open it, and rows read at random.
prepare: made-up documents of about 2 kB, some of them duplicates, through the steps of FineWeb.
"""

import argparse
import contextlib
import json
import pathlib
import random
import resource
import subprocess
import sys
import tempfile
import time

import numpy as np
import psutil
import tabulate
from spacy.lang.en.stop_words import STOP_WORDS

ROW = 1024


def peak_gigabytes() -> float:
  usage = resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN
  return max(resource.getrusage(who).ru_maxrss for who in usage) / 2**20


def plan(documents: int, mean: float, folder: pathlib.Path) -> dict:
  """Makes and opens a plan of so many documents, in this process."""
  from llm.data import growing, packing
  from llm.data.batches import Batches
  from llm.data.documents import Documents

  rng = np.random.default_rng(0)
  with growing.Growing(folder / "bounds.npy") as bounds:
    bounds.add([0])
    end = 0
    for group in packing.groups(documents):
      lengths = np.maximum(1, rng.lognormal(np.log(mean) - 0.5, 1.0, len(group))).astype(np.int64)
      bounds.add(end + np.cumsum(lengths))
      end += int(lengths.sum())
  mapped = growing.mapped(folder / "bounds.npy")

  class Tokens:
    dtype = np.dtype("<u2")

    def __len__(self):
      return end

    def __getitem__(self, span):
      return np.zeros(span.stop - span.start, self.dtype)

  data = Documents(Tokens(), mapped, np.zeros(len(mapped), np.int8), str(documents), folder)
  before = peak_gigabytes()
  start = time.perf_counter()
  packing.plan(data, ROW, np.arange(ROW + 1), folder)
  made = time.perf_counter() - start
  peak = peak_gigabytes()
  start = time.perf_counter()
  rows = packing.PlannedRows(data, packing.plan(data, ROW, np.arange(ROW + 1), folder), ROW)
  batches = Batches([Shown(rows)], [1.0], 256, 0)
  batches.read(0, range(1))
  opened = time.perf_counter() - start
  start = time.perf_counter()
  batches.read(1000, range(256))
  read = 256 / (time.perf_counter() - start)
  stored = sum(path.stat().st_size for path in (folder / "plans").rglob("*.npy"))
  return {
    "documents": f"{documents:,}",
    "tokens": f"{end:,}",
    "rows": f"{len(rows):,}",
    "full": f"{rows.plan.fill(ROW):.1%}",
    "seconds": f"{made:.1f}",
    "peak GiB (before)": f"{peak:.2f} ({before:.2f})",
    "plan GB": f"{stored / 1e9:.2f}",
    "seconds to open": f"{opened:.2f}",
    "rows/s at random": f"{read:,.0f}",
  }


class Shown:
  """Rows as a batch takes them."""

  def __init__(self, rows):
    self.rows = rows
    self.tokens = rows.tokens

  def __len__(self):
    return len(self.rows)

  def example(self, i, rng):
    return {"tokens": np.array([sum(map(len, self.rows.pieces(i)))])}


def write_texts(documents: int, folder: pathlib.Path, files: int = 8) -> int:
  """Files of made-up English-like documents of about 2 kB; returns their bytes."""
  rng = random.Random(0)
  words = ["".join(rng.choices("abcdefghilmnoprstuvw", k=rng.randint(3, 9))) for _ in range(20_000)]
  common = sorted(STOP_WORDS)  # enough of them that the language is told
  previous = ""
  total = 0
  for number in range(files):
    with open(folder / f"{number}.jsonl", "w") as file:
      for _ in range(documents // files):
        if rng.random() > 0.05 or not previous:  # one in twenty is like the one before
          sentences = []
          for _ in range(25):
            sentence = rng.choices(words, k=7) + rng.choices(common, k=6)
            rng.shuffle(sentence)
            sentences.append(" ".join(sentence).capitalize() + ".")
          previous = "\n".join(" ".join(sentences[i : i + 5]) for i in range(0, 25, 5))
        text = previous.replace(" the ", " of ", rng.randint(0, 1))
        total += file.write(json.dumps({"text": text}) + "\n")
  return total


def prepare(documents: int, workers: int, folder: pathlib.Path) -> dict:
  """Prepares so many documents by the command."""
  texts = folder / "texts"
  texts.mkdir()
  size = write_texts(documents, texts)
  steps = "gopher_repetition gopher_quality c4 fineweb_quality exact_duplicates near_duplicates"
  command = [sys.executable, "-m", "llm.prepare", "--config=configs/prepare_text.py"]
  command += [f"--config.input={texts}", f"--output={folder}/out", f"--workers={workers}"]
  command += [f"--config.steps={tuple(['language', *steps.split()])!r}"]
  start = time.perf_counter()
  process = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
  peak = watched(process)
  seconds = time.perf_counter() - start
  assert process.returncode == 0
  figures = json.loads((folder / "out" / "report.json").read_text())
  print((folder / "out" / "report.md").read_text().split("## Why")[0])
  stored = [*sorted((folder / "out" / "work").iterdir()), folder / "out" / "documents"]
  stored.append(folder / "out" / "shards")
  return {
    "documents": f"{documents:,}",
    "MB": f"{size / 1e6:,.0f}",
    "kept": f"{figures['documents_out']:,}",
    "seconds": f"{seconds:,.0f}",
    "documents/s": f"{documents / seconds:,.0f}",
    "peak GiB of a process": f"{peak / 2**30:.2f}",
    **{f"MB of {path.name}": f"{megabytes(path):,.0f}" for path in stored},
  }


def watched(process: subprocess.Popen) -> int:
  """Waits for a command. Returns the most bytes that it or a process under it held at a time."""
  peak = 0
  while process.poll() is None:
    with contextlib.suppress(psutil.Error):
      tree = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
      peak = max(peak, *(member.memory_info().rss for member in tree))
    time.sleep(0.2)
  return peak


def megabytes(folder: pathlib.Path) -> float:
  return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 1e6


def main():
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("what", choices=("plan", "prepare", "one_plan"))
  parser.add_argument("--documents", default="")
  parser.add_argument("--mean", type=float, default=100.0, help="plan: tokens of a document")
  parser.add_argument("--workers", type=int, default=2, help="prepare: tasks at a time")
  parser.add_argument("--folder", help="where the files go; default: a temporary folder")
  arguments = parser.parse_args()
  counts = arguments.documents or {"plan": "1e6,1e7"}.get(arguments.what, "1e4,4e4")
  rows = []
  for documents in (int(float(count)) for count in counts.split(",")):
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
      if arguments.what == "prepare":
        rows.append(prepare(documents, arguments.workers, pathlib.Path(folder)))
      elif arguments.what == "one_plan":
        print(json.dumps(plan(documents, arguments.mean, pathlib.Path(folder))))
        return
      else:  # a process for each, so that peaks do not mix
        command = [sys.executable, __file__, "one_plan", f"--documents={documents}"]
        command += [f"--mean={arguments.mean}", f"--folder={folder}"]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        rows.append(json.loads(done.stdout.splitlines()[-1]))
  print(tabulate.tabulate(rows, headers="keys", disable_numparse=True))


if __name__ == "__main__":
  main()
