"""The queue of jobs, with a small program in the place of llm.train that behaves as it does."""

import json
import signal
import sys
import textwrap
import time

import pytest

from llm.server import translation
from llm.server.files import Files
from llm.server.state import State, new_id
from llm.server.supervisor import Supervisor, _processes_of
from tests.serving import conversations

# Takes 20 steps of 20 ms, saves each, and goes on from the last one. Two at once are a fault. Where
# `slow` says so, it takes long to stop. It counts the signals that it got.
RUN = textwrap.dedent("""
  import fcntl, json, pathlib, signal, sys, time
  workdir = pathlib.Path(sys.argv[1].removeprefix("--workdir="))
  workdir.mkdir(parents=True, exist_ok=True)
  with open(workdir / "starts", "a") as starts:
    starts.write("x")
  lock = open(workdir / "own_lock", "a")
  fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
  message = (workdir.parent / "breaks").read_text() if (workdir.parent / "breaks").exists() else ""
  if message:
    sys.exit(print(message, flush=True) or int(sys.argv[2]))
  stopped = []
  signal.signal(signal.SIGTERM, lambda *_: stopped.append(1))
  (workdir / "resolved.json").write_text(json.dumps({"training": {"steps": 20}}))
  step_file = workdir / "step"
  step = int(step_file.read_text() or 0) if step_file.exists() else 0
  while step < 20:
    time.sleep(0.02)
    step += 1
    step_file.write_text(str(step))
    with open(workdir / "metrics.jsonl", "a") as file:
      file.write(json.dumps({"step": step, "split": "train", "loss": 1 / step}) + "\\n")
    if stopped:
      time.sleep(0.5 if (workdir.parent / "slow").exists() else 0)
      (workdir / "signals").write_text(str(len(stopped)))
      sys.exit(143)
  result = {"step": 20, "tokens": 80.0, "data": {"a": {"epochs": 2.0, "tokens": 40.0}}}
  (workdir / "result.json").write_text(json.dumps(result))
""")


class Place:
  """A workdir with a database, and supervisors that come and go."""

  def __init__(self, folder):
    self.folder = folder
    self.state = State(folder)
    self.files = Files(folder, self.state)
    self.base = folder / "base"
    self.base.mkdir()
    self.asked = []  # the keys of each start
    self.status = 2  # of a run that breaks

  def supervisor(self, limit=1):
    def command(method, keys, workdir):
      self.asked.append(keys)
      return [sys.executable, "-c", RUN, f"--workdir={workdir}", str(self.status)]

    return Supervisor(self.folder, self.state, self.files, limit, command)

  def job(self, content=None, **changes):
    job_id = new_id("ftjob")
    (self.folder / "jobs" / job_id).mkdir(parents=True)
    (self.folder / "jobs" / job_id / "training_file").write_bytes(content or conversations(3))
    method = {"type": "supervised", "supervised": {"hyperparameters": {}}}
    base = {"checkpoint": str(self.base), "max_length": 64}
    body = {"model": "base", "training_file": "file-a", "seed": 0, "method": method, "base": base}
    self.state.insert(
      "jobs",
      id=job_id,
      owner="me",
      status="validating_files",
      created_at=0,
      body=json.dumps({**body, **changes}),
    )
    return job_id

  def get(self, job_id):
    row = self.state.row("jobs", id=job_id)
    return row["status"], json.loads(row["body"])

  def starts(self, job_id):
    return len((self.folder / "jobs" / job_id / "run" / "starts").read_text())

  def look_until(self, supervisor, job_id, *statuses, and_also=lambda: True):
    deadline = time.monotonic() + 30
    while self.get(job_id)[0] not in statuses or not and_also():
      supervisor.look()
      time.sleep(0.02)
      assert time.monotonic() < deadline, self.get(job_id)
    return self.get(job_id)

  def running(self, supervisor, job_id, step=3):
    """Looks until the run of a job has taken some steps."""
    file = self.folder / "jobs" / job_id / "run" / "step"
    self.look_until(
      supervisor,
      job_id,
      "running",
      and_also=lambda: file.exists() and int(file.read_text() or 0) >= step,
    )


@pytest.fixture
def place(tmp_path):
  return Place(tmp_path)


def test_jobs_wait_for_one_another_and_are_told_of_once(place):
  supervisor = place.supervisor()
  first, second = place.job(), place.job()
  place.running(supervisor, first)
  assert place.get(second)[0] == "queued"
  _, body = place.look_until(supervisor, first, "succeeded")
  assert body["trained_tokens"] == 80 and body["fine_tuned_model"].startswith("ft:base:me::")
  place.look_until(supervisor, second, "succeeded")
  events = place.state.rows("events", job=first)
  assert sum(json.loads(event["body"])["type"] == "metrics" for event in events) == 20
  table = place.files.path(body["result_files"][0]).read_text()
  assert table.splitlines()[:2] == ["step,train_loss", "1,1.0"]


def test_a_server_that_starts_again_follows_the_run_that_lives_on(place):
  job = place.job()
  place.running(place.supervisor(), job)  # this supervisor is gone, its run is not
  place.look_until(place.supervisor(), job, "succeeded")
  assert place.starts(job) == 1


def test_a_run_that_was_killed_with_its_server_goes_on(place):
  job = place.job()
  place.running(place.supervisor(), job)
  for process in _processes_of(place.folder / "jobs" / job / "run"):
    process.send_signal(signal.SIGKILL)
  place.look_until(place.supervisor(), job, "succeeded")
  assert place.starts(job) == 2


@pytest.mark.parametrize("forgets", [False, True])
def test_pause_resume_and_cancel(place, forgets):
  """Also by a server that did not start the run."""
  supervisor = place.supervisor()
  job = place.job()
  place.running(supervisor, job)
  supervisor = place.supervisor() if forgets else supervisor
  workdir = place.folder / "jobs" / job / "run"
  for status in ("paused", "cancelled"):
    place.state.move(job, ["running"], status)
    place.look_until(
      supervisor, job, status, and_also=lambda: not supervisor.processes and not supervisor.orphans
    )
    assert not (workdir / "result.json").exists()
    if status == "paused":
      resume(place, job)
      place.running(supervisor, job, step=int((workdir / "step").read_text()) + 2)
  assert place.starts(job) == 2


def resume(place, job):
  place.state.move(job, ["paused"], "queued")


def test_paused_and_resumed_at_once_a_run_goes_on(place):
  supervisor = place.supervisor()
  job = place.job()
  place.running(supervisor, job)
  place.state.move(job, ["running"], "paused")
  resume(place, job)
  place.look_until(supervisor, job, "succeeded")
  assert place.starts(job) == 1
  job = place.job()
  place.running(supervisor, job)
  place.state.move(job, ["running"], "paused")
  resume(place, job)
  supervisor.processes[job].wait()  # it ends before the next look
  place.look_until(supervisor, job, "succeeded")
  assert place.starts(job) == 1


@pytest.mark.parametrize("meanwhile", ["resumed", "the server starts again", "the server stops"])
def test_a_run_is_told_to_stop_once(place, meanwhile):
  """A second signal would end llm.train before it has saved."""
  supervisor = place.supervisor()
  job = place.job()
  (place.folder / "jobs" / job / "slow").touch()
  place.running(supervisor, job)
  process = supervisor.processes[job]
  place.state.move(job, ["running"], "paused")
  supervisor.look()
  time.sleep(0.1)
  if meanwhile == "resumed":
    resume(place, job)
    supervisor.look()
    place.state.move(job, ["queued"], "paused")
    supervisor.look()
  elif meanwhile == "the server stops":
    supervisor.stopping.set()
    supervisor.run()
  else:
    place.supervisor().look()
  process.wait()
  assert (place.folder / "jobs" / job / "run" / "signals").read_text() == "1"
  supervisor = place.supervisor()
  supervisor.look()
  resume(place, job)
  place.look_until(supervisor, job, "succeeded")
  assert place.starts(job) == 2


def test_a_run_that_comes_further_may_end_often(place):
  """Steps that were logged count, though none was saved as a checkpoint."""
  supervisor = place.supervisor()
  job = place.job()
  for number in range(5):
    place.running(supervisor, job, step=3 * number + 2)
    supervisor.processes[job].kill()
    supervisor.processes[job].wait()
    supervisor.look()
  place.look_until(supervisor, job, "succeeded")
  assert place.starts(job) == 6


def test_each_start_has_the_keys_of_the_first(place, monkeypatch):
  """Whatever --models or the defaults are by then."""
  supervisor = place.supervisor()
  job = place.job()
  place.running(supervisor, job)
  place.state.move(job, ["running"], "paused")
  place.look_until(supervisor, job, "paused", and_also=lambda: not supervisor.processes)
  monkeypatch.setattr(translation, "overrides", None)
  resume(place, job)
  place.look_until(place.supervisor(), job, "succeeded")
  assert len(place.asked) == 2 and place.asked[0] == place.asked[1]
  assert place.asked[0]["transfer.checkpoint"] == str(place.base)


def test_a_job_whose_base_is_gone_says_so(place):
  job = place.job()
  place.base.rmdir()
  _, body = place.look_until(place.supervisor(), job, "failed")
  assert body["error"]["message"] == f"the checkpoint of base is gone: {place.base}"
  assert body["error"]["param"] == "model"


@pytest.mark.parametrize("broken", ["validating_files", "running"])
def test_a_job_that_cannot_be_looked_at_fails_alone(place, broken):
  supervisor = place.supervisor()
  job = place.job(**({"method": {}} if broken == "validating_files" else {}))
  if broken == "running":
    place.running(supervisor, job)
    (place.folder / "jobs" / job / "run" / "metrics.jsonl").write_text("[]\n")
  other = place.job()
  place.look_until(supervisor, other, "succeeded")
  status, body = place.get(job)
  said = "KeyError: type" if broken == "validating_files" else "TypeError"
  assert status == "failed" and body["error"]["message"].startswith(said)


def test_why_a_job_failed(place):
  supervisor = place.supervisor()
  job = place.job(b"{}\n")
  _, body = place.look_until(supervisor, job, "failed")
  assert body["error"]["param"] == "training_file" and "line 1" in body["error"]["message"]
  for message, place.status, starts in [("error: too long", 2, 1), ("Killed", 9, 3)]:
    job = place.job()
    (place.folder / "jobs" / job / "breaks").write_text(message)
    _, body = place.look_until(supervisor, job, "failed")
    assert body["error"]["message"] == message.removeprefix("error: ")
    assert place.starts(job) == starts


def paused_on_a_full_disk(place):
  """(supervisor, job, the file that says how its run ends)."""
  supervisor = place.supervisor()
  job = place.job()
  breaks = place.folder / "jobs" / job / "breaks"
  breaks.write_text("error: params: No space left on device")
  place.look_until(supervisor, job, "paused")
  return supervisor, job, breaks


def test_the_reason_is_that_of_the_last_attempt(place):
  supervisor, job, breaks = paused_on_a_full_disk(place)
  place.status = 9
  breaks.write_text("Killed")
  resume(place, job)
  _, body = place.look_until(supervisor, job, "failed")
  assert body["error"]["message"] == "Killed"


def test_a_full_disk_pauses_a_job(place):
  supervisor, job, breaks = paused_on_a_full_disk(place)
  breaks.unlink()
  resume(place, job)
  place.look_until(supervisor, job, "succeeded")


@pytest.mark.parametrize("kind", ["supervised", "dpo", "reinforcement"])
def test_a_job_is_a_command_that_llm_train_would_take(kind, tmp_path):
  from llm import config as config_lib

  hyperparameters = {"learning_rate_multiplier": 2.0, "batch_size": 4, "n_epochs": 3}
  if kind == "dpo":
    hyperparameters["beta"] = 0.3
  method = {"type": kind, kind: {"hyperparameters": hyperparameters}}
  (tmp_path / "eval.jsonl").touch()
  keys = translation.overrides(method, 5, "base", 64, tmp_path, 12)
  config = translation.config_of(kind)
  before = config.optimizer.learning_rate, config.recipe.learning_rate
  config.update_from_flattened_dict(keys)
  frozen = config_lib.freeze(config)
  assert frozen.training.epochs == 3 and frozen.training.steps == 0 and frozen.training.seed == 5
  assert frozen.training.batch_size == 4 and frozen.training.sequence_length == 64
  after = frozen.optimizer.learning_rate, frozen.recipe.learning_rate
  assert after[before[0] == -1] == pytest.approx(2 * before[before[0] == -1])
  assert frozen.training.save_every == (3 if kind == "reinforcement" else -1)
  assert frozen.training.keep_best == "auto"
  assert kind != "dpo" or frozen.objective["beta"] == 0.3
