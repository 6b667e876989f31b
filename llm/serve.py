"""Serve checkpoints, and fine-tune them, over HTTP: OpenAI's interface.

A key:   python -m llm.serve key --workdir=DIR [--owner=NAME]
Serve:   python -m llm.serve --workdir=DIR --models=NAME=CHECKPOINT,... [--host --port]

Then give OpenAI's client base_url=http://HOST:PORT/v1 and the key, or open http://HOST:PORT/.
"""

import importlib.util
import pathlib
import re
import sqlite3
import sys
from typing import Any

import jax
from absl import flags

from llm import command, storage
from llm.core import UserError
from llm.runs import workdir as workdir_lib

_WORKDIR = flags.DEFINE_string("workdir", None, "The folder of keys, files, jobs and models.")
_OWNER = flags.DEFINE_string("owner", "default", "Of a key: who sees the same files and jobs.")
_MODELS = flags.DEFINE_string(
  "models", "", "NAME=CHECKPOINT,...: as llm.generate takes them, hf:ORG/NAME too."
)
_HOST = flags.DEFINE_string("host", "127.0.0.1", "The address to listen at: this machine alone.")
_PORT = flags.DEFINE_integer("port", 8000, "The port to listen at.")
_JOBS = flags.DEFINE_integer("jobs", 1, "Jobs that run at once.", lower_bound=1)
_SLOTS = flags.DEFINE_integer("slots", 16, "Requests that a model answers at once.", lower_bound=1)
_WAITING = flags.DEFINE_integer("waiting", 64, "Requests that wait for a slot.", lower_bound=0)
_LOADED = flags.DEFINE_integer("loaded", 4, "Models in memory at once.", lower_bound=1)
_ON_CPU = flags.DEFINE_bool(
  "on_cpu", False, "Answer on the CPU, so that the accelerators are free for the jobs."
)
_MAX_UPLOAD = flags.DEFINE_integer("max_upload", 512, "Megabytes of a file.", lower_bound=1)


def _workdir() -> pathlib.Path:
  """The folder of the server. Raises UserError without it."""
  if not _WORKDIR.value:
    raise UserError("--workdir is missing: the folder of keys, files, jobs and models")
  if not importlib.util.find_spec("fastapi") or not importlib.util.find_spec("uvicorn"):
    raise UserError("llm.serve needs the extra serve: pip install -e '.[serve]'")
  return pathlib.Path(_WORKDIR.value).expanduser().absolute()


def key():
  """Makes a key and prints it: it is shown this once."""
  workdir = _workdir()
  if not re.fullmatch(r"[A-Za-z0-9._-]+", _OWNER.value):
    raise UserError(f"--owner={_OWNER.value} must be made of letters, digits, points and dashes")
  from llm.server import keys
  from llm.server.state import State

  workdir.mkdir(parents=True, exist_ok=True)
  try:
    print(keys.make(State(workdir), _OWNER.value))
  except sqlite3.OperationalError as error:  # the disk is full, or no database lies there
    raise UserError(f"no key was made in {workdir}: {error}")


def serve():
  """Serves until it is interrupted. Jobs save and go on when it starts again."""
  workdir = _workdir()
  from llm.server import app as app_lib
  from llm.server.catalog import parse_models

  served = parse_models(_MODELS.value)
  limits = app_lib.Limits(
    _JOBS.value, _SLOTS.value, _WAITING.value, _LOADED.value, _MAX_UPLOAD.value * 10**6
  )
  if _ON_CPU.value:
    # Of this process alone: the jobs would take the environment variable over.
    jax.config.update("jax_platforms", "cpu")
  command.start_cpu()
  with workdir_lib.locked(storage.folder(workdir)):
    _run(workdir, served, limits)


def _run(workdir: pathlib.Path, served: dict[str, str], limits: Any):
  """Serves a workdir that no other server has."""
  import uvicorn

  from llm.server import app as app_lib

  server = app_lib.open_server(workdir, served, limits)
  for name in served:
    server.catalog.base("", name)  # a wrong checkpoint is told now
  if not server.state.rows("keys"):
    print(f"no key yet: python -m llm.serve key --workdir={_WORKDIR.value}", file=sys.stderr)
  print(f"serving at http://{_HOST.value}:{_PORT.value}/v1, the page at /", flush=True)
  uvicorn.run(
    app_lib.build(server, limits),
    host=_HOST.value,
    port=_PORT.value,
    log_level="warning",
    timeout_graceful_shutdown=5,
  )
  print("stopped; jobs that were not done go on at the next start", flush=True)


VERBS = {"key": key}

if __name__ == "__main__":
  if sys.argv[1:2] == ["key"]:
    command.run_verb("llm.serve", VERBS, sys.argv)
  else:
    command.run(serve)
