"""Processes joined over loopback compute what one computes, stop together and name who is gone."""

import json
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest

from llm.checkpoints import manager
from llm.core import flatten

pytestmark = pytest.mark.slow
ROOT = pathlib.Path(__file__).resolve().parents[1]
PLAIN = {name: value for name, value in os.environ.items() if name != "TF_CPP_MIN_LOG_LEVEL"}
SMALL = [
  "--config=configs/pretrain_gpt.py:tiny",
  "--config.tokenizer.name=bytes",
  "--config.model.width=32",
  "--config.model.mlp_dim=64",
  "--config.model.num_layers=2",
  "--config.model.num_heads=2",
  # Several processes compute in float32, one in what is fastest.
  "--config.model.dtype=float32",
  "--config.optimizer.learning_rate=1e-3",
  "--config.training.sequence_length=32",
  "--config.training.batch_size=8",
  "--config.training.log_every=4",
  "--config.training.eval_every=6",
]


def start(count, corpus, workdir, steps, *more, log=subprocess.DEVNULL, devices=1):
  """`count` processes."""
  command = (
    ["launch/local.sh", str(count), "--"] if count > 1 else [sys.executable, "-m", "llm.train"]
  )
  environment = {
    **PLAIN,
    "JAX_NUM_CPU_DEVICES": str(devices),
    "PRETUNE_HEARTBEAT_SECONDS": "10",
    "PATH": f"{pathlib.Path(sys.executable).parent}:{os.environ['PATH']}",
  }
  return subprocess.Popen(
    [
      *command,
      *SMALL,
      f"--config.data.train=text:{corpus}",
      f"--config.data.eval=text:{corpus}",
      f"--workdir={workdir}",
      f"--config.training.steps={steps}",
      *more,
    ],
    cwd=ROOT,
    env=environment,
    stdout=log,
    stderr=subprocess.STDOUT,
    text=True,
  )


def figures(workdir):
  lines = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
  return [(line["step"], line["split"], line["loss"]) for line in lines]


def params(workdir):
  return {
    p: np.asarray(x) for p, x in flatten(manager.restore(manager.find(workdir), "params")).items()
  }


def processes(workdir):
  """Ids of the training processes of a workdir."""
  out = subprocess.run(
    ["pgrep", "-f", f"llm.train --distributed.*--workdir={workdir}"], capture_output=True, text=True
  ).stdout
  return [
    int(pid)
    for pid in out.split()
    if b"bash" not in pathlib.Path(f"/proc/{pid}/cmdline").read_bytes()
  ]


def wait_for(path):
  for _ in range(1200):
    if path.exists():
      return
    time.sleep(0.1)
  raise AssertionError(f"{path} did not appear")


def test_two_processes_compute_what_one_does(corpus, tmp_path):
  """The same devices in one process and in two give the same figures and parameters, every bit.

  No number of processes divides the evaluation.
  """
  for name, count in (("one", 1), ("two", 2)):
    assert start(count, corpus, tmp_path / name, 12, devices=2 // count).wait() == 0
  assert len(figures(tmp_path / "one")) == 5 and figures(tmp_path / "two") == figures(
    tmp_path / "one"
  )
  expected, found = params(tmp_path / "one"), params(tmp_path / "two")
  assert all((expected[path] == found[path]).all() for path in expected)


def test_two_processes_transfer_what_one_does(gpt_start, tmp_path):
  """Parameters that are resized, and layers that stay fresh, lie in parts on both."""
  corpus = ROOT / "README.md"
  rules = [
    f"--config.transfer.checkpoint={gpt_start}",
    "--config.transfer.adapt=('position/embedding',)",
    "--config.transfer.skip=('layers/1/',)",
    "--config.mesh.data=1",
    "--config.mesh.fsdp=2",
    "--config.tokenizer.sentinels=20",
  ]
  for name, count in (("one", 1), ("two", 2)):
    assert start(count, corpus, tmp_path / name, 1, *rules, devices=2 // count).wait() == 0
  expected, found = params(tmp_path / "one"), params(tmp_path / "two")
  assert all((expected[path] == found[path]).all() for path in expected)


def test_four_processes_then_two_on_another_mesh_compute_what_one_does(corpus, tmp_path):
  """Two processes go on from the checkpoint of four, with their parameters split.

  They read the same batches in the same order.
  """
  steady = ["--config.optimizer.schedule=constant"]
  assert start(1, corpus, tmp_path / "one", 12, *steady, devices=4).wait() == 0
  assert start(4, corpus, tmp_path / "several", 6, *steady).wait() == 0
  assert (
    start(
      2,
      corpus,
      tmp_path / "several",
      12,
      *steady,
      "--config.mesh.fsdp=4",
      "--config.mesh.data=1",
      devices=2,
    ).wait()
    == 0
  )
  expected, found = (
    dict(((step, split), loss) for step, split, loss in figures(tmp_path / name))
    for name in ("one", "several")
  )
  for key in ((4, "train"), (6, "eval"), (12, "train"), (12, "eval")):
    assert found[key] == pytest.approx(expected[key], rel=1e-6 if key[0] < 12 else 1e-5), key
  expected, found = params(tmp_path / "one"), params(tmp_path / "several")
  assert max(np.abs(expected[path] - found[path]).max() for path in expected) <= 1e-4


def test_a_lost_process_stops_the_rest_and_the_job_goes_on(corpus, tmp_path):
  every = [
    "--config.training.save_every=50",
    "--config.training.eval_every=0",
    "--config.training.log_every=50",
  ]
  with open(tmp_path / "log", "w") as log:
    run = start(2, corpus, tmp_path / "run", 5000, *every, log=log)
    wait_for(tmp_path / "run/checkpoints/50")
    os.kill(processes(tmp_path / "run")[-1], signal.SIGKILL)
    assert run.wait(timeout=90) != 0
  said = (tmp_path / "log").read_text()  # JAX has two ways to name it
  assert re.search(r"stopped sending heartbeats\):\s+1\s|Task 1 heartbeat timeout", said), said
  # On from what was saved, then all are asked to stop through one of them.
  run = start(2, corpus, tmp_path / "run", 5000, *every)
  reached = max(manager.steps(tmp_path / "run/checkpoints"))
  wait_for(tmp_path / f"run/checkpoints/{reached + 50}")
  os.kill(processes(tmp_path / "run")[-1], signal.SIGTERM)
  assert run.wait(timeout=90) == 128 + signal.SIGTERM
  stopped = max(manager.steps(tmp_path / "run/checkpoints"))
  whole = start(
    2, corpus, tmp_path / "whole", 5000, *every[1:], f"--config.training.save_every={stopped}"
  )
  wait_for(tmp_path / f"whole/checkpoints/{stopped}")
  whole.terminate()
  whole.wait(timeout=90)
  ours, theirs = (
    flatten(manager.restore(tmp_path / name / "checkpoints" / str(stopped), "params"))
    for name in ("run", "whole")
  )
  assert all((np.asarray(ours[path]) == np.asarray(theirs[path])).all() for path in theirs)


def by_hand(count, corpus, workdir):
  """The first two of `count` processes, the second with another config."""
  with socket.socket() as free:
    free.bind(("localhost", 0))
    address = f"localhost:{free.getsockname()[1]}"
  return [
    subprocess.Popen(
      [
        sys.executable,
        "-m",
        "llm.train",
        "--distributed",
        *SMALL,
        f"--config.data.train=text:{corpus}",
        "--config.data.eval=",
        f"--workdir={workdir}",
        f"--config.training.steps={4 + n}",
      ],
      cwd=ROOT,
      stderr=subprocess.PIPE,
      text=True,
      env={
        **PLAIN,
        "JAX_COORDINATOR_ADDRESS": address,
        "JAX_NUM_PROCESSES": str(count),
        "JAX_PROCESS_ID": str(n),
        "JAX_NUM_CPU_DEVICES": "1",
        "PRETUNE_START_SECONDS": "20",
      },
    )
    for n in range(2)
  ]


def test_processes_with_different_configs_do_not_start(corpus, tmp_path):
  for run in by_hand(2, corpus, tmp_path / "run"):
    said = run.communicate(timeout=120)[1]
    assert (
      run.returncode == 2
      and "error: process 1 was started with another config or --workdir than process 0" in said
    )


def test_a_process_that_does_not_come_is_named(corpus, tmp_path):
  runs = by_hand(3, corpus, tmp_path / "run")
  said = [run.communicate(timeout=120)[1] for run in runs]
  assert all(run.returncode for run in runs) and not (tmp_path / "run").exists()
  assert all("error: --distributed: not all processes came within 20 s" in text for text in said)
  assert re.search(r"timed out task names:\s+2\s", said[0]), said[0]
