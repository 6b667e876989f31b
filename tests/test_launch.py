"""The launch scripts: clean, and what they would run is what they say."""

import os
import pathlib
import shlex
import subprocess
import sys
import tarfile

import pytest

from tests.test_processes import PLAIN, SMALL, figures

ROOT = pathlib.Path(__file__).resolve().parents[1]
BIN = pathlib.Path(sys.executable).parent


def dry(script, *arguments, **environment):
  """(exit status, what is printed)."""
  done = subprocess.run(
    [f"launch/{script}", *arguments],
    cwd=ROOT,
    capture_output=True,
    text=True,
    env={**PLAIN, "PATH": f"{BIN}:{os.environ['PATH']}", **environment},
  )
  return done.returncode, done.stdout + done.stderr


def test_scripts_are_clean():
  done = subprocess.run(
    [BIN / "shellcheck", *sorted((ROOT / "launch").glob("*.sh"))], capture_output=True, text=True
  )
  assert done.returncode == 0, done.stdout


def test_local_says_what_it_runs():
  status, said = dry(
    "local.sh",
    "--dry_run",
    "2",
    "--",
    "--config=a b.py",
    "--workdir=w",
    PORT="1234",
    JAX_NUM_CPU_DEVICES="3",
  )
  assert status == 0 and said == "".join(
    f"env JAX_COORDINATOR_ADDRESS=localhost:1234 JAX_NUM_PROCESSES=2 JAX_PROCESS_ID={n} "
    f"JAX_NUM_CPU_DEVICES=3 "
    f"python -m llm.train --distributed --config=a\\ b.py --workdir=w \n"
    for n in range(2)
  )


def test_slurm_says_what_it_submits():
  status, said = dry(
    "slurm.sh",
    "--dry_run",
    "4",
    "--partition=gpu",
    "--",
    "--config=c.py",
    "--workdir=w",
    GPUS_PER_NODE="8",
  )
  assert (
    status == 0
    and said
    == """sbatch --partition=gpu <<'END'
#!/bin/bash
#SBATCH --job-name=pretune
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --signal=TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
exec srun --kill-on-bad-exit=1 python -m llm.train --distributed --config=c.py --workdir=w
END
"""
  )


TPU = dict(NAME="slice", ZONE="us-x", TYPE="v5litepod-16")


def code() -> set[str]:
  """The files of the package, as paths from the root."""
  return {str(path.relative_to(ROOT)) for path in (ROOT / "llm").rglob("*.py")}


def packed(command: str, folder: pathlib.Path) -> set[str]:
  """What a printed tar command packs, as paths from the root."""
  archive = folder / "packed.tar.gz"
  words = [f"--file={archive}" if w.startswith("--file=") else w for w in shlex.split(command)]
  subprocess.run(words, cwd=ROOT, check=True)
  with tarfile.open(archive) as file:
    return {name.removeprefix("./") for name in file.getnames()}


def test_tpu_vm_says_what_it_runs(tmp_path):
  status, said = dry("tpu_vm.sh", "--dry_run", "create", **TPU, SPOT="1")
  assert status == 0 and said == (
    "gcloud compute tpus queued-resources create slice --zone=us-x --accelerator-type=v5litepod-16 "
    "--runtime-version=tpu-ubuntu2204-base --node-id=slice --spot \n"
  )
  status, said = dry(
    "tpu_vm.sh", "--dry_run", "run", "--", "--config=c.py", "--workdir=/mnt/w", **TPU
  )
  lines = said.splitlines()
  packing = next(line for line in lines if line.startswith("tar "))
  assert status == 0 and packed(packing, tmp_path) >= code()
  assert [line.split()[3:5] for line in lines if line.startswith("gcloud")] == [
    ["queued-resources", "create"],
    ["tpu-vm", "scp"],
    ["tpu-vm", "ssh"],
    ["tpu-vm", "ssh"],
  ]
  assert (
    "--worker=all" in lines[-1]
    and r"llm.train\ --distributed\ --config=c.py\ --workdir=/mnt/w" in lines[-1]
  )
  status, said = dry("tpu_vm.sh", "--dry_run", "stop", **TPU)
  assert status == 0 and "pkill" in said and "delete slice" in said


@pytest.mark.parametrize(
  "script, arguments, message",
  [
    ("local.sh", ["--", "--config=c.py"], "launch/local.sh [--dry_run] N --"),
    ("local.sh", ["2"], "launch/local.sh [--dry_run] N --"),
    ("slurm.sh", ["two", "--", "x"], "launch/slurm.sh [--dry_run] NODES"),
    ("slurm.sh", ["2", "--x"], "launch/slurm.sh [--dry_run] NODES"),
    ("tpu_vm.sh", ["create"], "error: NAME is not set"),
  ],
)
def test_what_is_missing_is_said(script, arguments, message):
  status, said = dry(script, *arguments)
  assert status == 2 and message in said


SRUN = """#!/bin/bash
# Two tasks of a job on this machine.
shift
for i in 0 1; do
  SLURM_JOB_ID=$PPID SLURM_STEP_NODELIST=localhost SLURM_NTASKS=2 SLURM_STEP_NUM_TASKS=2 \\
    SLURM_PROCID=$i SLURM_LOCALID=$i "$@" &
done
wait -n && wait
"""


@pytest.mark.slow
def test_slurm_runs_two_processes_to_a_finished_run(corpus, tmp_path):
  """A stub starts the processes as srun would."""
  for name, text in (("sbatch", "#!/bin/bash\nexec bash\n"), ("srun", SRUN)):
    (tmp_path / name).write_text(text)
    (tmp_path / name).chmod(0o755)
  run = subprocess.run(
    [
      "launch/slurm.sh",
      "2",
      "--",
      *SMALL,
      f"--config.data.train=text:{corpus}",
      f"--config.data.eval=text:{corpus}",
      f"--workdir={tmp_path / 'run'}",
      "--config.training.steps=6",
    ],
    cwd=ROOT,
    capture_output=True,
    text=True,
    env={**PLAIN, "PATH": f"{tmp_path}:{BIN}:{os.environ['PATH']}", "JAX_NUM_CPU_DEVICES": "1"},
  )
  assert run.returncode == 0, run.stderr
  assert [step for step, split, _ in figures(tmp_path / "run") if split == "train"] == [4, 6]
  assert "mesh data 2" in run.stdout
