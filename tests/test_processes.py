"""Real processes joined over loopback: they compute what one computes, stop together, and say who is gone."""
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from llm.checkpoints import manager
from llm.core import flatten

pytestmark = pytest.mark.slow
ROOT = pathlib.Path(__file__).resolve().parents[1]
PLAIN = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
SMALL = ["--config=configs/pretrain_gpt.py:tiny", "--config.tokenizer.name=bytes", "--config.model.width=32", "--config.model.mlp_dim=64",
         "--config.model.num_layers=2", "--config.model.num_heads=2", "--config.training.sequence_length=32", "--config.training.batch_size=8",
         "--config.training.log_every=4", "--config.training.eval_every=6"]


def start(count, corpus, workdir, steps, *more, log=subprocess.DEVNULL, devices=1):
  """`count` processes."""
  command = ["launch/local.sh", str(count), "--"] if count > 1 else [sys.executable, "-m", "llm.train"]
  environment = {**PLAIN, "JAX_NUM_CPU_DEVICES": str(devices), "PRETUNE_HEARTBEAT_SECONDS": "10",
                 "PATH": f"{pathlib.Path(sys.executable).parent}:{os.environ['PATH']}"}
  return subprocess.Popen([*command, *SMALL, f"--config.data.train=text:{corpus}", f"--config.data.eval=text:{corpus}", f"--workdir={workdir}",
                           f"--config.training.steps={steps}", *more], cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT, text=True)


def figures(workdir):
  lines = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
  return [(line["step"], line["split"], line["loss"]) for line in lines]


def params(workdir):
  return {p: np.asarray(x) for p, x in flatten(manager.restore(manager.find(workdir), "params")).items()}


def processes(workdir):
  """Ids of the training processes of a workdir."""
  out = subprocess.run(["pgrep", "-f", f"llm.train --distributed.*--workdir={workdir}"], capture_output=True, text=True).stdout
  return [int(pid) for pid in out.split() if b"bash" not in pathlib.Path(f"/proc/{pid}/cmdline").read_bytes()]


def wait_for(path):
  for _ in range(1200):
    if path.exists():
      return
    time.sleep(0.1)
  raise AssertionError(f"{path} did not appear")


@pytest.mark.parametrize("count", [2, 4])
def test_processes_compute_what_one_does(count, corpus, tmp_path):
  """The same devices in one process and in several: figures, with an evaluation that no number divides, and parameters.

  Two add up in one order only: every bit is the same. Four add up as the transport does.
  """
  one = start(1, corpus, tmp_path / "one", 12, devices=count)
  assert one.wait() == 0
  several = start(count, corpus, tmp_path / "several", 12)
  assert several.wait() == 0
  expected, found = (np.array([loss for *_, loss in figures(tmp_path / name)]) for name in ("one", "several"))
  assert len(expected) == 5 and np.abs(found / expected - 1).max() <= (0 if count == 2 else 1e-6)
  expected, found = params(tmp_path / "one"), params(tmp_path / "several")
  assert max(np.abs(expected[path] - found[path]).max() for path in expected) <= (0 if count == 2 else 1e-4)


def test_a_lost_process_stops_the_rest_and_the_job_goes_on(corpus, tmp_path):
  every = ["--config.training.save_every=50", "--config.training.eval_every=0", "--config.training.log_every=50"]
  with open(tmp_path / "log", "w") as log:
    run = start(2, corpus, tmp_path / "run", 5000, *every, log=log)
    wait_for(tmp_path / "run/checkpoints/50")
    os.kill(processes(tmp_path / "run")[-1], signal.SIGKILL)
    assert run.wait(timeout=90) != 0
  said = (tmp_path / "log").read_text()   # JAX has two ways to name it
  assert re.search(r"stopped sending heartbeats\):\s+1\s|Task 1 heartbeat timeout", said), said
  # On from what was saved, then all are asked to stop through one of them.
  run = start(2, corpus, tmp_path / "run", 5000, *every)
  reached = max(manager.steps(tmp_path / "run/checkpoints"))
  wait_for(tmp_path / f"run/checkpoints/{reached + 50}")
  os.kill(processes(tmp_path / "run")[-1], signal.SIGTERM)
  assert run.wait(timeout=90) == 128 + signal.SIGTERM
  stopped = max(manager.steps(tmp_path / "run/checkpoints"))
  whole = start(2, corpus, tmp_path / "whole", 5000, *every[1:], f"--config.training.save_every={stopped}")
  wait_for(tmp_path / f"whole/checkpoints/{stopped}")
  whole.terminate()
  whole.wait(timeout=90)
  ours, theirs = (flatten(manager.restore(tmp_path / name / "checkpoints" / str(stopped), "params")) for name in ("run", "whole"))
  assert all((np.asarray(ours[path]) == np.asarray(theirs[path])).all() for path in theirs)


def test_processes_with_different_configs_do_not_start(corpus, tmp_path):
  import socket
  with socket.socket() as free:
    free.bind(("localhost", 0))
    address = f"localhost:{free.getsockname()[1]}"
  runs = [subprocess.Popen(
      [sys.executable, "-m", "llm.train", "--distributed", *SMALL, f"--config.data.train=text:{corpus}", "--config.data.eval=",
       f"--workdir={tmp_path / 'run'}", f"--config.training.steps={4 + n}"], cwd=ROOT, stderr=subprocess.PIPE, text=True,
      env={**PLAIN, "JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": str(n), "JAX_NUM_CPU_DEVICES": "1"})
      for n in range(2)]
  for run in runs:
    said = run.communicate(timeout=120)[1]
    assert run.returncode == 2 and "error: process 1 was started with another config or --workdir than process 0" in said
