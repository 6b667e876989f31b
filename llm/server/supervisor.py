"""Runs jobs: a queue of llm.train processes, each in its own workdir.

The database says what a job should be (queued, running, paused ...); this thread makes it so. A run
holds a lock from before its process starts until it has ended, whatever becomes of the server. So a
server that starts again knows which runs live on, and no job runs twice. llm.train resumes exactly.
"""

import contextlib
import fcntl
import json
import os
import pathlib
import shutil
import signal
import sqlite3
import subprocess
import threading
import time
import traceback
from typing import Any, Callable

import psutil

from llm.core import UserError, first_line
from llm.server import errors, examples, graders, progress, translation
from llm.server.catalog import is_gone
from llm.server.files import Files
from llm.server.state import State

POLL = 0.2  # seconds
PATIENCE = 60.0  # seconds that a run may take to save when it is told to stop
ATTEMPTS = 3  # of a run that ends without a reason and without a step forward
NICE = 5  # jobs leave the processor to chats
FILES = {"training_file": "train.jsonl", "validation_file": "eval.jsonl"}  # -> for llm.train
STOPPING = "stopping"  # a file beside a run that was told to stop
NO_SPACE = "No space left on device"
ROOM = 2**20  # bytes; with less than that, the disk is full


class Supervisor(threading.Thread):
  """limit: how many jobs run at once. command: gives the command line of a run."""

  def __init__(
    self,
    workdir: pathlib.Path,
    state: State,
    files: Files,
    limit: int,
    command: Callable[..., list[str]] = translation.command,
  ):
    super().__init__(name="supervisor", daemon=True)
    self.jobs = workdir / "jobs"
    self.jobs.mkdir(parents=True, exist_ok=True)
    self.state = state
    self.files = files
    self.limit = limit
    self.command = command
    self.processes: dict[str, subprocess.Popen] = {}
    self.orphans: set[str] = set()  # runs of an earlier server that live on
    self.told_at: dict[str, float] = {}  # when a run was told to stop
    self.attempts: dict[str, tuple[int, int]] = {}  # (tries, the last step that one of them took)
    self.told: dict[str, set[str]] = {}  # tags of events, so that each is written once
    self.stopping = threading.Event()
    self._tidy()

  def _tidy(self):
    """Removes what an earlier server left half made, and finds the runs that it left alive."""
    for folder in self.jobs.iterdir():
      if not self.state.row("jobs", id=folder.name):
        shutil.rmtree(folder)
      elif _is_locked(folder):
        self.orphans.add(folder.name)
        with contextlib.suppress(FileNotFoundError):
          self.told_at[folder.name] = (folder / STOPPING).stat().st_mtime

  def workdir(self, job_id: str) -> pathlib.Path:
    """The workdir of a job's run."""
    return self.jobs / job_id / "run"

  def run(self):
    """Makes jobs what they should be until the server stops; then their runs save and end."""
    while not self.stopping.wait(POLL):
      try:
        self.look()
      except Exception as error:  # of one look; the next one tries again
        if not errors.is_full(error):
          traceback.print_exc()
    for job_id in self.processes:
      self._tell_to_stop(job_id)
    for process in self.processes.values():
      try:
        process.wait(PATIENCE)
      except subprocess.TimeoutExpired:
        process.kill()

  def stop(self):
    """Ends the runs, which go on when a server starts again, and the thread."""
    self.stopping.set()
    if self.is_alive():
      self.join()

  def _has_room(self) -> bool:
    return shutil.disk_usage(self.jobs).free >= ROOM

  def look(self):
    """One look at all jobs. Those that are not at work wait where the disk is full."""
    for job_id in [*self.processes, *self.orphans]:
      self._guarded(job_id, self._follow, job_id)
    if not self._has_room():
      return
    for row in self.state.rows("jobs", status="validating_files"):
      self._guarded(row["id"], self._validate, row)
    for row in self.state.rows("jobs", status="running"):
      if row["id"] not in self.processes and row["id"] not in self.orphans:
        self._guarded(row["id"], self._go_on, row)
    for row in self.state.rows("jobs", status="queued"):
      if len(self.processes) + len(self.orphans) >= self.limit:
        break
      if row["id"] not in self.processes and row["id"] not in self.orphans:
        self._guarded(row["id"], self._start, row)

  def _guarded(self, job_id: str, act: Callable, *asked: Any):
    """Does something for a job. Where it goes wrong the job fails, and no other one."""
    try:
      act(*asked)
    except sqlite3.Error:  # of the database, which is that of all jobs
      raise
    except Exception as error:
      if errors.is_full(error):
        return  # the next look tries again
      traceback.print_exc()
      self._fail(job_id, "server_error", f"{type(error).__name__}: {first_line(error)}", None)

  def _validate(self, row: sqlite3.Row):
    """Writes the files of a job as llm.train reads them, and settles the keys of its run.

    A broken line fails the job.
    """
    job_id, body = row["id"], json.loads(row["body"])
    self.state.add_event(job_id, "validating", f"Validating training file: {body['training_file']}")
    folder = self.jobs / job_id
    reader = _reader(body["method"])
    counts = {}
    for param, name in FILES.items():
      if not body.get(param):
        continue
      try:
        counts[param] = examples.rewrite(folder / param, reader, folder / name)
      except UserError as error:
        self._fail(job_id, f"invalid_{param}", first_line(error), param)
        return
      except OSError as error:
        self._fail(job_id, "not_validated", first_line(error), param)
        return
    # The keys are those of every start, whatever --models or the defaults are by then.
    base = body["base"]
    keys = translation.overrides(
      body["method"],
      body["seed"],
      base["checkpoint"],
      base["max_length"],
      folder,
      counts["training_file"],
    )
    self.state.move(job_id, ["validating_files"], "queued", keys=keys)
    self.state.add_event(job_id, "queued", "Files validated, moving job to queued state")

  def _start(self, row: sqlite3.Row):
    """Starts the run of a queued job, or goes on with it."""
    job_id, body = row["id"], json.loads(row["body"])
    folder = self.jobs / job_id
    checkpoint = body["base"]["checkpoint"]
    if is_gone(checkpoint):
      message = f"the checkpoint of {body['model']} is gone: {checkpoint}"
      self._fail(job_id, "model_not_available", message, "model")
      return
    command = self.command(body["method"]["type"], body["keys"], self.workdir(job_id))
    if not self.state.move(job_id, ["queued", "running"], "running"):
      return  # cancelled meanwhile
    self.state.add_event(job_id, "started", "Fine-tuning job started")
    with open(folder / "lock", "a") as lock, open(folder / "log.txt", "ab") as log:
      try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
      except BlockingIOError:  # a run that was told to stop is still saving
        self.orphans.add(job_id)
        return
      (folder / STOPPING).unlink(missing_ok=True)
      log.write(progress.START)
      log.flush()
      # The process inherits the lock, and holds it for as long as it lives.
      self.processes[job_id] = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=log,
        start_new_session=True,
        pass_fds=[lock.fileno()],
      )
    os.setpriority(os.PRIO_PROCESS, self.processes[job_id].pid, NICE)

  def _follow(self, job_id: str):
    """Tells what a run has done, stops it where it should not run, and notices its end."""
    told_at = self.told_at.get(job_id)
    row = self.state.row("jobs", id=job_id)
    assert row is not None
    if row["status"] == "queued" and told_at is None:
      # It was paused and resumed since the last look: it has never stopped.
      self.state.move(job_id, ["queued"], "running")
      return
    process = self.processes.get(job_id)
    if process.poll() is None if process else _is_locked(self.jobs / job_id):
      if row["status"] in ("paused", "cancelled", "failed"):
        self._end(job_id)
      self._tell(job_id)
      return
    self.processes.pop(job_id, None)
    self.orphans.discard(job_id)
    self.told_at.pop(job_id, None)
    if row["status"] == "running" and told_at is None:
      self._ended(row, process.returncode if process else None)
    else:
      self._tell(job_id)

  def _go_on(self, row: sqlite3.Row):
    """A job that should run and has no process: an earlier server was killed."""
    if progress.result(self.workdir(row["id"])) is not None:
      self._succeed(row)
    elif len(self.processes) + len(self.orphans) < self.limit:
      self._start(row)

  def _end(self, job_id: str):
    """Tells a run to save and stop; one that does not is killed."""
    self._tell_to_stop(job_id)
    if time.time() - self.told_at[job_id] > PATIENCE:
      self._signal(job_id, signal.SIGKILL)

  def _tell_to_stop(self, job_id: str):
    """Tells a run to save and stop, once: a second signal would end it at once.

    A server that starts again finds the file that says so.
    """
    if job_id in self.told_at:
      return
    self.told_at[job_id] = time.time()
    with contextlib.suppress(OSError):  # the disk is full
      (self.jobs / job_id / STOPPING).touch()
    self._signal(job_id, signal.SIGTERM)

  def _signal(self, job_id: str, number: int):
    if process := self.processes.get(job_id):
      process.send_signal(number)
      return
    for orphan in _processes_of(self.workdir(job_id)):
      with contextlib.suppress(psutil.NoSuchProcess):
        orphan.send_signal(number)

  def _ended(self, row: sqlite3.Row, status: int | None):
    """A run that should go on has ended: it is done, or failed, or is started again."""
    job_id = row["id"]
    workdir = self.workdir(job_id)
    self._tell(job_id)
    if progress.result(workdir) is not None:
      self._succeed(row)
      return
    reason = progress.failure(self.jobs / job_id / "log.txt")
    if NO_SPACE in reason or not self._has_room():  # there may be none for the reason either
      message = "Paused: the server's disk is full. Make room, then resume the job"
      with self.state.all_or_nothing():  # where this cannot be noted, the job goes on by itself
        self.state.move(job_id, ["running"], "paused")
        self.state.add_event(job_id, f"full-{time.time()}", message, "error")
      return
    newest = next((int(path.name) for path in progress.steps(workdir)), 0)
    reached = max([newest, *(record["step"] for record in progress.figures(workdir))])
    tries, before = self.attempts.get(job_id, (0, reached))
    tries = tries + 1 if reached <= before else 1
    self.attempts[job_id] = (tries, max(reached, before))
    if status == 2 or tries >= ATTEMPTS:
      self._fail(job_id, "training_failed", reason, None)
      return
    message = f"The run ended unexpectedly (status {status}); it goes on from step {newest}"
    self.state.add_event(job_id, f"restart-{time.time()}", message, "warn")

  def _tell(self, job_id: str):
    """Adds an event for every new line of metrics.jsonl and every checkpoint."""
    workdir = self.workdir(job_id)
    told = self.told.setdefault(job_id, set())
    total = progress.total_steps(workdir)
    for record in progress.figures(workdir):
      tag = f"{record['split']}-{record['step']}"
      if tag not in told:
        told.add(tag)
        self._tell_figures(job_id, tag, record, total)
    for folder in progress.steps(workdir):
      tag = f"checkpoint-{folder.name}"
      if tag not in told:
        told.add(tag)
        self.state.add_event(job_id, tag, f"Checkpoint created at step {folder.name}")

  def _tell_figures(self, job_id: str, tag: str, record: dict[str, Any], total: int):
    told = progress.metrics(record)
    shown = [f"{name}={value:.4g}" for name, value in told.items() if _is_shown(name, value)]
    message = f"Step {record['step']}/{total}: {', '.join(shown)}"
    self.state.add_event(job_id, tag, message, data={**told, "total_steps": total})

  def _succeed(self, row: sqlite3.Row):
    """Serves the model of a run that is done, and keeps its figures as a file."""
    job_id, body = row["id"], json.loads(row["body"])
    workdir = self.workdir(job_id)
    result = progress.result(workdir) or {}
    name = model_name(row, body)
    table = self.files.add_result(row["owner"], job_id, progress.as_csv(workdir))
    usage = next(iter(result.get("data", {}).values()), {})  # its epochs
    self.state.insert(
      "models", id=name, owner=row["owner"], job=job_id, created_at=int(time.time())
    )
    self.state.add_event(job_id, "model", f"New fine-tuned model created: {name}")
    self.state.add_event(job_id, "succeeded", "The job has successfully completed")
    self.state.move(
      job_id,
      ["running"],
      "succeeded",
      fine_tuned_model=name,
      finished_at=int(time.time()),
      result_files=[table],
      trained_tokens=round(result.get("tokens", 0)),
      epochs=max(1, round(usage.get("epochs", 1))),
    )

  def _fail(self, job_id: str, code: str, message: str, param: str | None):
    error = {"code": code, "message": message}
    if param:
      error["param"] = param
    self.state.add_event(job_id, "failed", f"The job failed: {message}", "error")
    before = ["validating_files", "queued", "running"]
    self.state.move(job_id, before, "failed", error=error, finished_at=int(time.time()))


def model_name(row: sqlite3.Row, body: dict[str, Any]) -> str:
  """ft:BASE:OWNER:SUFFIX:ID."""
  base = body["model"].split(":")[1] if body["model"].startswith("ft:") else body["model"]
  short = row["id"].partition("-")[2][:8]
  return f"ft:{base}:{row['owner']}:{body.get('suffix', '')}:{short}"


def _is_shown(name: str, value: Any) -> bool:
  return name != "step" and not name.startswith("full_") and isinstance(value, (int, float))


def _reader(method: dict[str, Any]) -> Callable[[dict, str], dict]:
  """How the lines of a job's files are read. Those of reinforcement get the grader, filled in."""
  read = examples.READERS[method["type"]]
  if method["type"] != "reinforcement":
    return read
  grader = method["reinforcement"]["grader"]

  def with_grader(record: dict, where: str) -> dict:
    return {**read(record, where), "grader": graders.filled(grader, record, where)}

  return with_grader


def _is_locked(folder: pathlib.Path) -> bool:
  """Whether a run of this job lives."""
  with open(folder / "lock", "a") as file:
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      return True
  return False


def _processes_of(workdir: pathlib.Path) -> list[psutil.Process]:
  """The processes of a run that an earlier server started."""
  mark = f"--workdir={workdir}"
  return [p for p in psutil.process_iter(["cmdline"]) if mark in (p.info["cmdline"] or [])]
