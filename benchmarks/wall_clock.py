"""Wall clock of a whole small run beside a plain torch script: from the command to its last loss.

  pip install -e '.[bench]' && python benchmarks/wall_clock.py [--rounds=3] [--steps=2000]

nanoGPT's CPU setting: a GPT of 4 layers, 4 heads and width 128 on bytes of the embedded Wikipedia,
12 x 64 tokens a step, AdamW, cosine schedule, no dropout, float32. Imports, reading of the text,
compilation with empty caches, a checkpoint at the end and the loss over the same held-out bytes
count. Sides take turns; prints medians of the rounds.
"""

import argparse
import json
import math
import os
import pathlib
import re
import statistics
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parents[1]
LAYERS = HEADS = 4
WIDTH = 128
ROWS = 12
LENGTH = 64
RATE = 1e-3  # after the warm-up; a tenth of it at the end
WARM_UP = 100  # steps
HELD_OUT = 200 * ROWS * LENGTH  # bytes


def write_texts(folder: pathlib.Path):
  """train.txt and held_out.txt: one document each, for a blank line would part documents."""
  from llm.config import DataConfig
  from llm.data import sources

  (source,) = sources.parse("embedded:wikipedia", DataConfig())
  text = "\n".join(record["text"] for record in source.records())
  ascii_text = re.sub(r"\s*\n\s*", "\n", text).encode("ascii", "ignore")
  (folder / "held_out.txt").write_bytes(ascii_text[:HELD_OUT])
  (folder / "train.txt").write_bytes(ascii_text[HELD_OUT:])


def pretune_command(texts: pathlib.Path, scratch: pathlib.Path, steps: int) -> list[str]:
  """Our command of the run."""
  settings = {
    "model.num_layers": LAYERS,
    "model.num_heads": HEADS,
    "model.width": WIDTH,
    "model.mlp_dim": 4 * WIDTH,
    "model.max_length": LENGTH,
    "model.dtype": "float32",
    "tokenizer.name": "bytes",
    "data.train": f"text:{texts}/train.txt",
    "data.eval": f"text:{texts}/held_out.txt",
    "data.cache": scratch / "data",
    "optimizer.learning_rate": RATE,
    "optimizer.warmup_steps": WARM_UP,
    "training.batch_size": ROWS,
    "training.sequence_length": LENGTH,
    "training.steps": steps,
    "training.eval_every": 0,
    "training.save_every": 0,
  }
  return [
    "-m",
    "llm.train",
    "--config=configs/pretrain_gpt.py:tiny",
    f"--workdir={scratch}/run",
    *(f"--config.{key}={value}" for key, value in settings.items()),
  ]


def pretune_loss(scratch: pathlib.Path) -> float:
  return json.loads((scratch / "run" / "result.json").read_text())["eval"]["loss"]


def torch_rate(step: int, steps: int) -> float:
  """The schedule of ours, as a factor of RATE."""
  if step < WARM_UP:
    return (step + 1) / WARM_UP
  progress = (step - WARM_UP) / max(1, steps - WARM_UP)
  return 0.1 + 0.45 * (1 + math.cos(math.pi * progress))


def train_torch(texts: pathlib.Path, scratch: pathlib.Path, steps: int, compiled: bool):
  """A plain trainer; leaves loss.json and model.pt in `scratch`."""
  import numpy as np
  import torch
  import torch_peers

  train, held_out = (
    torch.from_numpy(np.fromfile(texts / f"{name}.txt", np.uint8)).long()
    for name in ("train", "held_out")
  )
  torch.manual_seed(0)
  model = torch_peers.initialized(torch_peers.PlainGPT(LAYERS, WIDTH, HEADS, 256, LENGTH))
  matrices = [p for p in model.parameters() if p.ndim > 1]
  vectors = [p for p in model.parameters() if p.ndim == 1]
  optimizer = torch.optim.AdamW(
    [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}],
    lr=RATE,
    betas=(0.9, 0.95),
    fused=True,
  )
  schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: torch_rate(step, steps))
  loss_of = torch.compile(model) if compiled else model
  for step in range(steps):
    starts = torch.randint(len(train) - LENGTH - 1, (ROWS, 1))
    windows = train[starts + torch.arange(LENGTH + 1)]
    loss = loss_of(windows[:, :-1], windows[:, 1:])
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    schedule.step()
    if (step + 1) % 100 == 0:
      print(f"step {step + 1}: {loss.item():.3f}", flush=True)
  inputs = held_out[:-1][: len(held_out) // LENGTH * LENGTH - LENGTH].view(-1, LENGTH)
  targets = held_out[1:][: inputs.numel()].view(-1, LENGTH)
  with torch.no_grad():
    losses = [
      loss_of(x, y).item()
      for x, y in zip(inputs.split(ROWS), targets.split(ROWS))
      if len(x) == ROWS
    ]
  torch.save(model.state_dict(), scratch / "model.pt")
  (scratch / "loss.json").write_text(json.dumps(statistics.mean(losses)))


def torch_command(
  texts: pathlib.Path, scratch: pathlib.Path, steps: int, compiled: bool
) -> list[str]:
  return [
    __file__,
    f"--torch={scratch}",
    f"--texts={texts}",
    f"--steps={steps}",
    *(["--compiled"] if compiled else []),
  ]


def torch_loss(scratch: pathlib.Path) -> float:
  return json.loads((scratch / "loss.json").read_text())


# name -> (texts, scratch, steps) -> command; scratch -> the last loss
SIDES = {
  "pretune": (pretune_command, pretune_loss),
  "torch": (lambda *args: torch_command(*args, compiled=False), torch_loss),
  "torch compiled": (lambda *args: torch_command(*args, compiled=True), torch_loss),
}


def measured(side: str, texts: pathlib.Path, steps: int) -> tuple[float, float]:
  """(seconds, last loss) of one run with caches of its own."""
  command, loss = SIDES[side]
  with tempfile.TemporaryDirectory() as folder:
    scratch = pathlib.Path(folder)
    environment = {
      **os.environ,
      "JAX_COMPILATION_CACHE_DIR": str(scratch / "xla"),
      "TORCHINDUCTOR_CACHE_DIR": str(scratch / "inductor"),
    }
    began = time.perf_counter()
    subprocess.run(
      [sys.executable, *command(texts, scratch, steps)],
      cwd=ROOT,
      env=environment,
      check=True,
      stdout=subprocess.DEVNULL,
    )
    return time.perf_counter() - began, loss(scratch)


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--rounds", type=int, default=3)
  parser.add_argument("--steps", type=int, default=2000)
  parser.add_argument("--torch", type=pathlib.Path, help="run the torch trainer in this folder")
  parser.add_argument("--texts", type=pathlib.Path, help="with --torch: the folder of the texts")
  parser.add_argument("--compiled", action="store_true", help="with --torch: through torch.compile")
  options = parser.parse_args()
  if options.torch:
    return train_torch(options.texts, options.torch, options.steps, options.compiled)
  runs = {side: [] for side in SIDES}
  with tempfile.TemporaryDirectory() as folder:
    texts = pathlib.Path(folder)
    write_texts(texts)
    for _ in range(options.rounds):
      for side in SIDES:
        runs[side].append(measured(side, texts, options.steps))
  base = statistics.median(seconds for seconds, _ in runs["pretune"])
  for side, pairs in runs.items():
    seconds, loss = (statistics.median(column) for column in zip(*pairs))
    print(
      f"{side:<16}{seconds:7.1f} s   loss {loss:.3f}   pretune takes {base / seconds:.2f} of it"
    )


if __name__ == "__main__":
  main()
