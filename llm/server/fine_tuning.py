"""/v1/fine_tuning/jobs: making jobs, looking at them, and stopping them."""

import asyncio
import contextlib
import functools
import json
import os
import pathlib
import secrets
import shutil
import sqlite3
import time
from typing import Annotated, Any, AsyncIterator

from fastapi import APIRouter, Query, Request
from fastapi.responses import StreamingResponse

from llm.core import UserError, first_line
from llm.server import listing, methods, progress
from llm.server.catalog import STEP, Base
from llm.server.errors import ApiError, unknown
from llm.server.files import Limit, Owner
from llm.server.state import State, new_id

router = APIRouter(prefix="/v1/fine_tuning/jobs")
OVER = ("succeeded", "failed", "cancelled")
STOPPABLE = ("validating_files", "queued", "running")
SHOWN = (
  "model",
  "training_file",
  "validation_file",
  "seed",
  "method",
  "metadata",
  "fine_tuned_model",
  "finished_at",
  "trained_tokens",
  "error",
)


def shown(state: State, row: sqlite3.Row) -> dict[str, Any]:
  """A job as OpenAI's client reads it."""
  body = json.loads(row["body"])
  return {
    "id": row["id"],
    "object": "fine_tuning.job",
    "created_at": row["created_at"],
    "organization_id": row["owner"],
    "status": row["status"],
    **{name: body.get(name) for name in SHOWN},
    "hyperparameters": _hyperparameters(body),
    "result_files": body.get("result_files", []),
    "integrations": [],
    "estimated_finish": _estimated_finish(state, row),
    "user_provided_suffix": body.get("suffix"),
  }


def _hyperparameters(body: dict[str, Any]) -> dict[str, Any]:
  """Those of a job, with what "auto" became as far as it is known by now."""
  asked = body["method"][body["method"]["type"]]["hyperparameters"]
  known: dict[str, Any] = {}
  if "keys" in body:
    known = {"batch_size": body["keys"]["training.batch_size"], "learning_rate_multiplier": 1.0}
  if "epochs" in body:
    known["n_epochs"] = body["epochs"]
  return {
    name: known.get(name, "auto") if value == "auto" else value for name, value in asked.items()
  }


def _estimated_finish(state: State, row: sqlite3.Row) -> int | None:
  """When a running job will end, at the pace of its events so far."""
  if row["status"] != "running":
    return None
  events = [event for event in state.rows("events", job=row["id"]) if "-" in event["tag"]]
  told = [(event["created_at"], json.loads(event["body"])["data"]) for event in events]
  steps = [(at, data["step"], data["total_steps"]) for at, data in told if data]
  if not steps or steps[-1][1] == steps[0][1]:
    return None
  (began, first, _), (now, last, total) = steps[0], steps[-1]
  return int(now + (now - began) * (total - last) / (last - first))


def shown_event(row: sqlite3.Row) -> dict[str, Any]:
  """An event as OpenAI's client reads it."""
  body = json.loads(row["body"])
  created_at = row["created_at"]
  return {"id": row["id"], "object": "fine_tuning.job.event", "created_at": created_at, **body}


def _row(request: Request, owner: str, job_id: str) -> sqlite3.Row:
  """The row of an owner's job. Raises ApiError if there is none."""
  row = request.app.state.server.state.row("jobs", id=job_id, owner=owner)
  if row is None:
    raise unknown("fine-tuning job", job_id)
  return row


@router.post("")
def create(request: Request, owner: Owner, asked: methods.JobRequest) -> dict[str, Any]:
  server = request.app.state.server
  method = methods.settled(asked)
  base = _trainable(server, owner, asked.model)
  job_id = new_id("ftjob")
  folder = server.supervisor.jobs / job_id
  folder.mkdir()
  try:
    for name in ("training_file", "validation_file"):
      if file_id := getattr(asked, name):
        _keep(server.files, owner, file_id, name, folder)
    body = {
      **asked.model_dump(exclude_none=True, exclude={"method", "hyperparameters", "integrations"}),
      "method": method,
      # --models may name another checkpoint, or none, when the job starts.
      "base": {"checkpoint": base.checkpoint, "max_length": base.max_length},
      "seed": secrets.randbelow(2**31) if asked.seed is None else asked.seed,
    }
    server.state.add_event(job_id, "created", f"Created fine-tuning job: {job_id}")
    server.state.insert(
      "jobs",
      id=job_id,
      owner=owner,
      status="validating_files",
      created_at=int(time.time()),
      body=json.dumps(body),
    )
  except BaseException:
    shutil.rmtree(folder, ignore_errors=True)
    raise
  return shown(server.state, _row(request, owner, job_id))


def _trainable(server: Any, owner: str, model: str) -> Base:
  """The model as the start of a job. Raises ApiError where it cannot be trained so."""
  try:
    base = server.catalog.base(owner, model)
  except UserError as error:
    raise ApiError(first_line(error), "model")
  if base.kind != "decoder":
    name = base.kind.replace("_", "-")
    raise ApiError(f"{model} is an {name}: it cannot be trained to chat", "model")
  return base


def _keep(files: Any, owner: str, file_id: str, name: str, folder: Any):
  """Keeps a file of a job beside it, so that deleting the file does not change the job."""
  try:
    row = files.get(owner, file_id)
  except ApiError as error:
    raise ApiError(error.message, name, "file_not_found")
  if row["purpose"] != "fine-tune":
    raise ApiError(f"{file_id} has the purpose {row['purpose']}, not fine-tune", name)
  try:
    os.link(files.path(row["id"]), folder / name)
  except FileNotFoundError:  # it was deleted just now
    raise ApiError(f"there is no file {file_id!r}", name, "file_not_found")


@router.get("", dependencies=listing.CHECKED)
def list_jobs(
  request: Request, owner: Owner, after: str | None = None, limit: Limit = 20
) -> dict[str, Any]:
  state = request.app.state.server.state
  show = functools.partial(shown, state)
  return listing.page(state, "jobs", show, after, limit, owner=owner)


@router.get("/{job_id}")
def get_job(request: Request, owner: Owner, job_id: str) -> dict[str, Any]:
  state = request.app.state.server.state
  return shown(state, _row(request, owner, job_id))


def _moved(
  request: Request, owner: str, job_id: str, before: tuple[str, ...], after: str, message: str
) -> dict[str, Any]:
  """The job with another status. Raises ApiError where its status does not allow it."""
  state = request.app.state.server.state
  row = _row(request, owner, job_id)
  finished = {"finished_at": int(time.time())} if after in OVER else {}
  if not state.move(job_id, before, after, **finished):
    status = _row(request, owner, job_id)["status"]
    raise ApiError(f"the job {job_id} is {status}: it cannot become {after}", code="wrong_status")
  state.add_event(job_id, f"{after}-{time.time()}", message)
  return shown(state, _row(request, owner, row["id"]))


@router.post("/{job_id}/cancel")
def cancel(request: Request, owner: Owner, job_id: str) -> dict[str, Any]:
  before = (*STOPPABLE, "paused")
  return _moved(request, owner, job_id, before, "cancelled", "The job was cancelled")


@router.post("/{job_id}/pause")
def pause(request: Request, owner: Owner, job_id: str) -> dict[str, Any]:
  before = ("queued", "running")
  return _moved(request, owner, job_id, before, "paused", "The job was paused")


@router.post("/{job_id}/resume")
def resume(request: Request, owner: Owner, job_id: str) -> dict[str, Any]:
  return _moved(request, owner, job_id, ("paused",), "queued", "The job goes on")


@router.get("/{job_id}/events", dependencies=listing.CHECKED)
async def events(
  request: Request,
  owner: Owner,
  job_id: str,
  after: str | None = None,
  limit: Limit = 20,
  stream: bool = False,
) -> Any:
  _row(request, owner, job_id)
  state = request.app.state.server.state
  if not stream:
    return listing.page(state, "events", shown_event, after, limit, job=job_id)
  return StreamingResponse(_stream(request, job_id), media_type="text/event-stream")


async def _stream(request: Request, job_id: str) -> AsyncIterator[str]:
  """Every event of a job, from the first on, until the job is over."""
  state = request.app.state.server.state
  last = None
  while True:
    row = state.row("jobs", id=job_id)
    page = listing.page(state, "events", shown_event, last, 100, "asc", job=job_id)
    for event in page["data"]:
      last = event["id"]
      yield f"data: {json.dumps(event)}\n\n"
    if not page["data"] and (row is None or row["status"] in OVER):
      yield "data: [DONE]\n\n"
      return
    if not page["has_more"]:
      await asyncio.sleep(0.3)


@router.get("/{job_id}/checkpoints", dependencies=listing.CHECKED)
def checkpoints(
  request: Request,
  owner: Owner,
  job_id: str,
  after: str | None = None,
  limit: Annotated[int, Query(ge=1, le=100)] = 10,
) -> dict[str, Any]:
  row = _row(request, owner, job_id)
  model = json.loads(row["body"]).get("fine_tuned_model")
  workdir = request.app.state.server.supervisor.workdir(job_id)
  items = []
  for folder in progress.steps(workdir):
    with contextlib.suppress(FileNotFoundError):  # the run has removed it just now
      items.append(_checkpoint(job_id, model, workdir, folder.name))
  ids = [item["id"] for item in items]
  if after and after not in ids:
    raise ApiError(f"after={after!r} is not in this list", "after", "invalid_value")
  first = ids.index(after) + 1 if after else 0
  return listing.of(items[first : first + limit], len(items) > first + limit)


def _checkpoint(job_id: str, model: str | None, workdir: pathlib.Path, step: str) -> dict[str, Any]:
  """A checkpoint as OpenAI's client reads it. It is served once its job has succeeded."""
  return {
    "id": f"ftckpt-{job_id.partition('-')[2]}-{step}",
    "object": "fine_tuning.job.checkpoint",
    "created_at": int((workdir / "checkpoints" / step).stat().st_mtime),
    "fine_tuned_model_checkpoint": f"{model}{STEP}{step}" if model else "",
    "fine_tuning_job_id": job_id,
    "step_number": int(step),
    "metrics": progress.at_step(workdir, int(step)),
  }
