"""Whole preparations by the command: killed and resumed, by several workers, on Slurm and Ray."""

import json
import os
import pathlib
import signal
import stat
import subprocess
import sys
import time

import psutil
import pytest

from tests.test_corpus import prose, write_jsonl

pytestmark = pytest.mark.slow

STEPS = "('gopher_quality','exact_duplicates','near_duplicates')"
FEW_STEPS = "('exact_duplicates',)"


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
  """Five files of texts, some of them twice, nearly twice or too short."""
  folder = tmp_path_factory.mktemp("texts")
  for number in range(5):
    file = [prose(100 * number + n) for n in range(30)]
    file += [prose(n) for n in range(3)]
    file += [prose(n + 10).replace("the", "of", 1) for n in range(3)] + ["too short"]
    write_jsonl(folder / f"{number}.jsonl", file)
  return folder


def command(texts, output, *more, steps=STEPS):
  return [sys.executable, "-m", "llm.prepare", "--config=configs/prepare_text.py"] + [
    f"--config.input={texts}",
    f"--output={output}",
    f"--config.steps={steps}",
    "--config.tokenizer.vocab_size=300",
    *more,
  ]


def run(texts, output, *more, steps=STEPS, env=None):
  arguments = command(texts, output, *more, steps=steps)
  environment = {**os.environ, **(env or {})}
  done = subprocess.run(arguments, capture_output=True, text=True, env=environment)
  assert done.returncode == 0, done.stderr[-3000:]
  return done.stdout


def shards(output):
  return {p.name: p.read_bytes() for p in (pathlib.Path(output) / "shards").glob("*.ds*")}


@pytest.fixture(scope="module")
def undisturbed(texts, tmp_path_factory):
  output = tmp_path_factory.mktemp("undisturbed") / "out"
  run(texts, output, "--workers=1")
  return output


@pytest.fixture(scope="module")
def few(texts, tmp_path_factory):
  """Two files of texts, and what their equal documents leave: few tasks, for slow executors."""
  folder = tmp_path_factory.mktemp("few")
  for number in range(2):
    os.link(texts / f"{number}.jsonl", folder / f"{number}.jsonl")
  output = tmp_path_factory.mktemp("of_few") / "out"
  run(folder, output, "--workers=1", steps=FEW_STEPS)
  return folder, output


def test_any_number_of_workers_gives_the_same(texts, undisturbed, tmp_path):
  """Two are those of the kills below."""
  run(texts, tmp_path / "out", "--workers=4")
  assert shards(tmp_path / "out") == shards(undisturbed)


def test_killed_in_each_stage_and_started_again(texts, undisturbed, tmp_path):
  """The whole group is killed as soon as each stage has begun; the last run ends as undisturbed."""
  stages = sorted(path.name for path in (undisturbed / "logs").iterdir())
  output = tmp_path / "out"
  inside = 0
  for stage in stages:
    process = subprocess.Popen(
      command(texts, output, "--workers=2"),
      start_new_session=True,
      stdout=subprocess.DEVNULL,
      stderr=subprocess.DEVNULL,
    )
    logs = output / "logs" / stage / "logs"
    while process.poll() is None and not (logs.is_dir() and list(logs.iterdir())):
      time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    finished = len(list((output / "logs" / stage).glob("completions/*")))
    inside += finished < len(list((undisturbed / "logs" / stage).glob("completions/*")))
  assert inside > len(stages) // 2, "the kills came too late"
  run(texts, output, "--workers=2")
  assert shards(output) == shards(undisturbed)
  before, after = (json.loads((o / "report.json").read_text()) for o in (undisturbed, output))
  assert before["dropped"] == after["dropped"]
  assert before["documents_out"] == after["documents_out"]


def test_a_killed_worker_is_replaced(texts, undisturbed, tmp_path):
  """SIGKILL of a process of the pool: its tasks are run again, and the command ends well."""
  process = subprocess.Popen(
    command(texts, tmp_path / "out", "--workers=2"), stderr=subprocess.DEVNULL
  )
  killed = 0
  while process.poll() is None and killed < 2:
    for child in psutil.Process(process.pid).children():  # the server that forks, and a tracker
      for worker in child.children():
        worker.kill()
        killed += 1
        time.sleep(2.0)
        break
    time.sleep(0.005)  # the first is killed while it starts
  assert process.wait() == 0
  assert killed
  assert shards(tmp_path / "out") == shards(undisturbed)


def test_a_full_disk_is_one_line(texts, tmp_path):
  """A limit on the size of files stands for it."""
  limited = ["bash", "-c", 'ulimit -f 8; trap "" XFSZ; exec "$@"', "bash"]
  done = subprocess.run(
    limited + command(texts, tmp_path / "out", "--workers=1"), capture_output=True, text=True
  )
  assert done.returncode == 2
  assert "Traceback" not in done.stderr
  last = done.stderr.strip().splitlines()[-1]
  assert last.startswith("error: task ") and "finished tasks are kept" in last


def test_two_at_once_in_one_output(texts, tmp_path):
  first = subprocess.Popen(command(texts, tmp_path / "out"), stderr=subprocess.PIPE, text=True)
  while not (tmp_path / "out" / "logs").exists():
    time.sleep(0.05)
  second = subprocess.run(command(texts, tmp_path / "out"), capture_output=True, text=True)
  assert second.returncode == 2
  assert len(second.stderr.strip().splitlines()) == 1
  assert first.wait() == 0


# A stand-in for Slurm: sbatch runs the array at once, one task after another.
SBATCH = r"""#!/bin/bash
for last; do :; done
array=$(grep -oP '^#SBATCH --array=0-\K[0-9]+' "$last")
echo "$@" >> "$SLURM_STUB/calls"
cp "$last" "$SLURM_STUB/script-$(wc -l < "$SLURM_STUB/calls")"
for task in $(seq 0 "$array"); do
  export SLURM_ARRAY_TASK_ID=$task SLURM_NODELIST=here RUN_OFFSET=0
  bash "$last" > "$SLURM_STUB/log" 2>&1 || exit 1
done
echo "Submitted batch job $(wc -l < "$SLURM_STUB/calls")"
"""
SRUN = """#!/bin/bash
while [[ $1 == -* ]]; do
  if [[ $1 == -n ]]; then shift; fi
  shift
done
exec "$@"
"""


def test_slurm_runs_the_same_stages(few, tmp_path):
  """The scripts of --dry_run are those that are submitted; a stand-in runs them to the same end."""
  texts, undisturbed = few
  stub = tmp_path / "bin"
  stub.mkdir()
  for name, text in {
    "sbatch": SBATCH,
    "srun": SRUN,
    "scontrol": "#!/bin/bash\necho here\n",
  }.items():
    (stub / name).write_text(text)
    (stub / name).chmod(stat.S_IRWXU)
  env = {"PATH": f"{stub}:{os.environ['PATH']}", "SLURM_STUB": str(tmp_path)}
  slurm = ("--executor=slurm", "--partition=cpu", "--workers=3")
  shown = run(texts, tmp_path / "out", *slurm, "--dry_run", steps=FEW_STEPS, env=env)
  assert not (tmp_path / "out" / "shards").exists()
  run(texts, tmp_path / "out", *slurm, steps=FEW_STEPS, env=env)
  assert shards(tmp_path / "out") == shards(undisturbed)
  assert (tmp_path / "out" / "report.md").exists()
  submitted = [path.read_text() for path in tmp_path.glob("script-*")]
  for directive in ("#SBATCH --partition=cpu", "#SBATCH --array=0-1%3"):
    assert directive in shown
    assert any(directive in script for script in submitted)
  calls = (tmp_path / "calls").read_text().splitlines()
  assert sum("--dependency=afterok" in call for call in calls) >= 5


def test_ray_runs_the_same_stages(few, tmp_path):
  pytest.importorskip("ray", reason="the extra ray is not installed")
  texts, undisturbed = few
  run(texts, tmp_path / "out", "--executor=ray", "--workers=2", steps=FEW_STEPS)
  assert shards(tmp_path / "out") == shards(undisturbed)
