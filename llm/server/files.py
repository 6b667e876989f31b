"""/v1/files: uploads, which are kept under their ids."""

import os
import pathlib
import shutil
import sqlite3
import time
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Form, Query, Request, UploadFile
from fastapi.responses import FileResponse

from llm.core import UserError, first_line
from llm.server import examples, listing
from llm.server.errors import ApiError, unknown
from llm.server.keys import owner_of
from llm.server.state import State, new_id

router = APIRouter(prefix="/v1/files")
Owner = Annotated[str, Depends(owner_of)]
Limit = Annotated[int, Query(ge=1, le=10_000)]
LONGEST_NAME = 255


class Files:
  """The folder of uploads. On the disk a file is called by its id, never by its name."""

  def __init__(self, workdir: pathlib.Path, state: State):
    self.folder = workdir / "files"
    self.folder.mkdir(parents=True, exist_ok=True)
    self.state = state
    for leftover in self.folder.iterdir():  # of uploads and deletions that were cut off
      if not state.row("files", id=leftover.name):
        leftover.unlink()

  def path(self, file_id: str) -> pathlib.Path:
    """Where the content of a file lies. file_id: of a row of the database."""
    return self.folder / file_id

  def add(self, owner: str, filename: str, purpose: str, content: Any, check: bool) -> sqlite3.Row:
    """Keeps a file, on the disk before this returns. Raises UserError where a line is broken."""
    file_id = new_id("file")
    path = self.path(file_id)
    try:
      with open(path, "wb") as file:
        shutil.copyfileobj(content, file, 2**20)
        file.flush()
        os.fsync(file.fileno())
      if check:
        for _ in examples.read(path, examples.any_method):
          pass
      self.state.insert(
        "files",
        id=file_id,
        owner=owner,
        filename=filename,
        purpose=purpose,
        bytes=path.stat().st_size,
        created_at=int(time.time()),
      )
    except BaseException:
      path.unlink(missing_ok=True)
      raise
    row = self.state.row("files", id=file_id)
    assert row is not None
    return row

  def add_result(self, owner: str, job_id: str, table: bytes) -> str:
    """Keeps the figures of a job as a file, once, and returns its id."""
    file_id = job_id.replace("ftjob", "file", 1)
    self.path(file_id).write_bytes(table)
    self.state.insert(
      "files",
      id=file_id,
      owner=owner,
      filename="step_metrics.csv",
      purpose="fine-tune-results",
      bytes=len(table),
      created_at=int(time.time()),
    )
    return file_id

  def get(self, owner: str, file_id: str) -> sqlite3.Row:
    """The row of an owner's file. Raises ApiError if there is none."""
    row = self.state.row("files", id=file_id, owner=owner)
    if row is None:
      raise unknown("file", file_id)
    return row


def shown(row: sqlite3.Row) -> dict[str, Any]:
  """A file as OpenAI's client reads it."""
  return {
    "id": row["id"],
    "object": "file",
    "bytes": row["bytes"],
    "created_at": row["created_at"],
    "filename": row["filename"],
    "purpose": row["purpose"],
    "status": "processed",
    "status_details": None,
    "expires_at": None,
  }


def files_of(request: Request) -> Files:
  return request.app.state.server.files


@router.post("")
def upload(
  request: Request,
  owner: Owner,
  file: UploadFile,
  purpose: Annotated[str, Form()],
  expires: Annotated[str | None, Form(alias="expires_after[anchor]")] = None,
) -> dict[str, Any]:
  if expires is not None:
    raise ApiError("files do not expire here", "expires_after", "unsupported_parameter")
  if purpose != "fine-tune":
    raise ApiError(f"purpose={purpose!r} is not supported; give fine-tune", "purpose")
  # The name is shown and never used as a path.
  name = (file.filename or "file.jsonl").encode("utf-8", "replace").decode("utf-8")[:LONGEST_NAME]
  try:
    return shown(files_of(request).add(owner, name, purpose, file.file, check=True))
  except UserError as error:
    raise ApiError(first_line(error), "file", "invalid_file_format")


@router.get("", dependencies=listing.CHECKED)
def list_files(
  request: Request,
  owner: Owner,
  after: str | None = None,
  limit: Limit = 10_000,
  order: Literal["asc", "desc"] = "desc",
  purpose: str | None = None,
) -> dict[str, Any]:
  where = {"owner": owner} if purpose is None else {"owner": owner, "purpose": purpose}
  state = files_of(request).state
  return listing.page(state, "files", shown, after, limit, order, **where)


@router.get("/{file_id}")
def get_file(request: Request, owner: Owner, file_id: str) -> dict[str, Any]:
  return shown(files_of(request).get(owner, file_id))


@router.get("/{file_id}/content")
def content(request: Request, owner: Owner, file_id: str) -> FileResponse:
  files = files_of(request)
  row = files.get(owner, file_id)
  path = files.path(row["id"])
  try:
    status = path.stat()
  except FileNotFoundError:  # it was deleted just now
    raise unknown("file", file_id)
  return FileResponse(path, media_type="application/octet-stream", stat_result=status)


@router.delete("/{file_id}")
def delete_file(request: Request, owner: Owner, file_id: str) -> dict[str, Any]:
  files = files_of(request)
  row = files.get(owner, file_id)
  files.state.delete("files", id=row["id"], owner=owner)
  files.path(row["id"]).unlink(missing_ok=True)
  return {"id": row["id"], "object": "file", "deleted": True}
