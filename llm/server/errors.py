"""Errors as OpenAI's client expects them: {"error": {"message", "type", "param", "code"}}."""

import errno
import sqlite3
import sys
import traceback
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from llm.core import UserError, first_line
from llm.inference.engine import Full

NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
TYPES = {
  401: "authentication_error",
  404: "not_found_error",
  413: "invalid_request_error",
  429: "rate_limit_error",
  500: "server_error",
  503: "server_error",
  507: "server_error",
}


class ApiError(Exception):
  """An answer that is an error. param: the parameter that is to blame. code: for programs."""

  def __init__(self, message: str, param: str | None = None, code: str | None = None, status=400):
    super().__init__(message)
    self.message = message
    self.param = param
    self.code = code
    self.status = status


def unknown(what: str, name: str, code: str | None = None) -> ApiError:
  """There is no `what` of that name, or it is another owner's."""
  return ApiError(f"there is no {what} {name!r}", code=code, status=404)


def response(error: ApiError) -> JSONResponse:
  """The error as an answer."""
  body = {
    "message": _printable(error.message),
    "type": TYPES.get(error.status, "invalid_request_error"),
    "param": error.param,
    "code": error.code,
  }
  # OpenAI's client would repeat the request where the disk is full, which helps nobody.
  headers = {"retry-after": "1"} if error.status == 429 else {"x-should-retry": "false"}
  return JSONResponse({"error": body}, error.status, headers)


def _printable(text: str) -> str:
  """The text without halves of characters, which no answer can carry."""
  return text.encode("utf-8", "replace").decode("utf-8")


def of_exception(error: Exception) -> ApiError:
  """What an exception means to the client."""
  if isinstance(error, ApiError):
    return error
  if isinstance(error, UserError):
    return ApiError(first_line(error))
  if isinstance(error, Full):
    message = f"the server is busy: {first_line(error)}; try again"
    return ApiError(message, code="queue_full", status=429)
  if isinstance(error, RequestValidationError):
    return _of_validation(error)
  if isinstance(error, HTTPException):
    # What stopped the reading of a body is behind what FastAPI makes of it.
    if isinstance(error.__cause__, (ApiError, OSError)):
      return of_exception(error.__cause__)
    return ApiError(str(error.detail), status=error.status_code)
  if is_full(error):
    return ApiError("the server's disk is full", code="insufficient_storage", status=507)
  traceback.print_exception(error, file=sys.stderr)
  return ApiError("the server failed; its log says where", status=500)


def is_full(error: Exception) -> bool:
  """Whether the disk had no room: for a file, or for the database."""
  if isinstance(error, OSError):
    return error.errno in NO_SPACE
  return isinstance(error, sqlite3.OperationalError) and "full" in str(error)


def _of_validation(error: RequestValidationError) -> ApiError:
  """The first parameter that pydantic refuses, with all that it may be."""
  first, *others = error.errors()
  place = [str(part) for part in first["loc"][1:]]
  names = [part for part in place if part.isidentifier() or part.isdigit()]
  param = ".".join(names) or None
  if first["type"] == "json_invalid":
    return ApiError("the body is no JSON object")
  if first["type"] == "extra_forbidden" or _takes_nothing(first):
    message = f"unknown or unsupported parameter: {param}"
    return ApiError(message, param, "unsupported_parameter")
  # A parameter of several types has an error for each of them.
  same = [e for e in others if [str(part) for part in e["loc"][1:]][: len(names)] == names]
  message = " or ".join(dict.fromkeys(e["msg"] for e in [first, *same]))
  return ApiError(f"{param}: {message}" if param else message, param, "invalid_value")


def _takes_nothing(error: dict[str, Any]) -> bool:
  """Whether a parameter is known only so that clients may send that it is not used."""
  context = error.get("ctx", {})
  return (
    error["type"] == "too_long"
    and context["max_length"] == 0
    or error["type"] == "less_than_equal"
    and context["le"] == 0
    or error["type"] == "literal_error"
    and context["expected"] == "False"
  )


def add_handlers(app: FastAPI):
  """Makes every exception of a route an error of this form."""

  async def handle(request: Request, error: Exception) -> JSONResponse:
    return response(of_exception(error))

  known = (ApiError, UserError, Full, RequestValidationError, HTTPException)
  # Of any other exception, Starlette would close the connection after the answer.
  for kind in (*known, OSError, sqlite3.Error, Exception):
    app.add_exception_handler(kind, handle)
