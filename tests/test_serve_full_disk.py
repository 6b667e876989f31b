"""A server whose disk is full: a file system of its own, of 24 MB, is its workdir."""

import contextlib
import fcntl
import os
import subprocess
import sys
import time

import pytest

from tests.serving import ROOT, Serving, conversations, environment
from tests.test_serve import HELLO, ended, error

pytestmark = pytest.mark.slow
SIZE = 24 * 2**20


@pytest.fixture
def disk(tmp_path):
  """A folder that is a file system of its own."""
  folder = tmp_path / "disk"
  folder.mkdir()
  command = ["mount", "-t", "tmpfs", "-o", f"size={SIZE}", "pretune-test", str(folder)]
  try:
    mounted = subprocess.run(command, capture_output=True, text=True)
  except FileNotFoundError:
    pytest.skip("a small file system cannot be mounted here: there is no mount")
  if mounted.returncode:
    pytest.skip(f"a small file system cannot be mounted here: {mounted.stderr.strip()}")
  yield folder
  subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.fixture
def serving(disk, gpt_start):
  running = Serving(disk, f"gpt={gpt_start}").start()
  yield running
  running.stop()


def fill(disk, left: int):
  """Leaves so many bytes of the disk, which a job writes to meanwhile."""
  with open(disk / "filler", "wb") as file:
    while True:
      free = os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize
      with contextlib.suppress(OSError):
        os.posix_fallocate(file.fileno(), 0, free - left)
        return


def upload(client, count: int):
  return client.files.create(file=("talk.jsonl", conversations(count)), purpose="fine-tune")


@pytest.mark.parametrize("left", [0, 200_000])
def test_what_was_acknowledged_is_kept_and_work_goes_on_with_room(serving, disk, left):
  """With 200,000 bytes there may be room to note that a job is paused, and to say why, or not."""
  client = serving.client(serving.key())
  jobs = client.fine_tuning.jobs
  file = upload(client, 40)
  method = {"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 20}}}
  job = jobs.create(model="gpt", training_file=file.id, method=method).id
  while not jobs.checkpoints.list(job).data:
    time.sleep(0.05)
  fill(disk, left)
  wrong = error(upload, client=client, count=3_000)
  assert wrong.status_code == 507 and wrong.code == "insufficient_storage"
  assert wrong.message.endswith("the server's disk is full")
  if not left:
    refused = key(serving)
    assert refused.returncode == 2 and "database or disk is full" in refused.stderr
  wait_for_end_of_run(disk / "jobs" / job)
  # Where the server has no room to note that the job is paused, it goes on by itself.
  status = jobs.retrieve(job).status
  told = [event.message for event in jobs.list_events(job, limit=100)]
  says_why = any("disk is full. Make room" in message for message in told)
  assert (status, says_why) in [("paused", True), ("running", False)]
  assert [kept.id for kept in client.files.list()] == [file.id]
  assert client.files.content(file.id).read() == conversations(40)
  answer = client.chat.completions.create(model="gpt", messages=HELLO, max_tokens=3)
  assert answer.usage.completion_tokens == 3
  (disk / "filler").unlink()
  assert upload(client, 3_000).id and key(serving).returncode == 0
  if status == "paused":
    jobs.resume(job)
  assert ended(client, job).status == "succeeded"
  assert serving.log.read_text().count("Traceback") == 0


def key(serving) -> subprocess.CompletedProcess:
  command = [sys.executable, "-m", "llm.serve", "key", f"--workdir={serving.workdir}"]
  return subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True)


def wait_for_end_of_run(folder):
  """Waits until the run of a job holds its lock no more, and the server has seen it."""
  with open(folder / "lock") as lock:
    fcntl.flock(lock, fcntl.LOCK_EX)
  time.sleep(1)
