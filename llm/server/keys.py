"""API keys: shown once when they are made, and stored as a digest."""

import hashlib
import secrets
import time

from fastapi import Request

from llm.server.errors import ApiError
from llm.server.state import State


def make(state: State, owner: str) -> str:
  """A new key of an owner. Keys of one owner see the same files, jobs and models."""
  key = f"sk-{secrets.token_urlsafe(32)}"
  state.insert("keys", digest=_digest(key), owner=owner, created_at=int(time.time()))
  return key


def _digest(key: str) -> str:
  # A key has 256 random bits, so that a fast digest keeps it as well as a slow one.
  return hashlib.sha256(key.encode("utf-8", "replace")).hexdigest()


def owner_of(request: Request) -> str:
  """The owner of the key of a request. Raises ApiError without a valid one."""
  scheme, _, key = request.headers.get("authorization", "").partition(" ")
  state: State = request.app.state.server.state
  row = state.row("keys", digest=_digest(key.strip())) if scheme.lower() == "bearer" else None
  if row is None:
    raise ApiError(
      "no valid API key: `python -m llm.serve key --workdir=DIR` makes one",
      code="invalid_api_key",
      status=401,
    )
  return row["owner"]
