"""The workdir of a run: whose it is, and the records that stand in it."""

import contextlib
import dataclasses
import fcntl
import importlib.metadata
import json
import os
import pathlib
import platform
import subprocess
import sys
import tempfile

import jax
import numpy as np
from etils import epath

from llm import config as config_lib
from llm import core, storage
from llm.config import Config
from llm.core import UserError
from llm.data import cache
from llm.objectives import base

# What may differ between a run and its continuation.
MAY_CHANGE = {
  "data.prefetch",
  "data.workers",
  "data.cache",
  "mesh",
  "model.scan",
  "model.remat",
  "model.loss_chunk",
  *(
    f"training.{k}"
    for k in (
      "steps",
      "epochs",
      "log_every",
      "eval_every",
      "eval_batches",
      "save_every",
      "keep",
      "keep_best",
      "profile",
    )
  ),
}


def _revision() -> dict:
  """The source revision and whether the working tree was clean; unknown outside a checkout."""
  root = pathlib.Path(__file__).resolve().parents[2]
  git = lambda *args: subprocess.run(
    ["git", "-C", str(root), *args], capture_output=True, text=True
  )
  try:
    head = git("rev-parse", "HEAD")
    return {
      "revision": head.stdout.strip() or "unknown",
      "clean": not git("status", "--porcelain").stdout,
    }
  except OSError:
    return {"revision": "unknown", "clean": None}


def write_json(path: epath.Path, value):
  """Written whole or not at all, by process 0."""
  if jax.process_index() == 0:
    scratch = (
      path if storage.is_bucket(path) else path.with_suffix(".tmp")
    )  # in a bucket a file is whole or not there
    scratch.write_text(json.dumps(value, indent=1))
    if scratch != path:
      scratch.replace(path)


def run_record() -> dict:
  """run.json: what ran where."""
  packages = (
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "orbax-checkpoint",
    "grain",
    "numpy",
    "sentencepiece",
  )
  return {
    "command": sys.argv,
    **_revision(),
    "python": platform.python_version(),
    "versions": {p: importlib.metadata.version(p) for p in packages},
    "devices": [str(d) for d in jax.devices()],
    "processes": jax.process_count(),
    "xla_flags": os.environ.get("XLA_FLAGS", ""),
  }


def _differences(old: dict, new: dict) -> list[str]:
  found = []
  for group in sorted({*old, *new} - MAY_CHANGE):
    a, b = old.get(group, {}), new.get(group, {})
    for key in sorted({*a, *b}):
      left, right = (json.dumps(x.get(key)) for x in (a, b))
      if left != right and f"{group}.{key}" not in MAY_CHANGE:
        found.append(f"{group}.{key} was {left}, is {right}")
  return found


def agree(config: Config, workdir: epath.Path):
  """Raises UserError, naming the process, unless all were started with one config and one workdir."""
  if jax.process_count() == 1:
    return
  from jax.experimental import multihost_utils

  told = cache.digest(json.dumps(config_lib.thaw(config), sort_keys=True), str(workdir))
  digests = multihost_utils.process_allgather(np.frombuffer(bytes.fromhex(told), np.uint8))
  if different := [n for n, other in enumerate(digests) if (other != digests[0]).any()]:
    raise UserError(
      f"process {different[0]} was started with another config or --workdir than process 0: start all with the same"
    )


@contextlib.contextmanager
def locked(workdir: epath.Path):
  """The workdir, made if need be, is this run's while it lasts. Raises UserError where another run has it."""
  if storage.is_bucket(workdir):  # its folders are names
    if not jax.process_index():
      print(
        f"{workdir} cannot be locked, for it is a bucket: see to it that no other run uses it",
        file=sys.stderr,
      )
    yield
    return
  try:
    workdir.mkdir(parents=True, exist_ok=True)
  except OSError as error:
    raise UserError(f"--workdir={workdir}: {error.strerror}")
  with open(workdir / "lock", "a") as file:
    try:
      if not jax.process_index():
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      raise UserError(
        f"another run is at work in {workdir}: choose another --workdir, or stop it first"
      )
    except OSError as error:  # not every shared file system knows locks
      print(
        f"{workdir} cannot be locked ({error.strerror}): see to it that no other run uses it",
        file=sys.stderr,
      )
    yield


def with_new_keys(config: dict) -> dict:
  """A config of an earlier revision, with the keys that came since at their defaults."""
  current = config_lib.freeze(config)
  objective = {**base.defaults(current.objective["name"]), **current.objective}
  plain = config_lib.thaw(dataclasses.replace(current, objective=objective))
  return json.loads(json.dumps(plain))


def claim(workdir: epath.Path, config: Config, go_on: bool):
  """Makes the workdir, which is there, this config's. Raises UserError if it holds a run of another one."""
  path = workdir / "config.json"
  if path.exists() and not go_on:
    try:
      old = with_new_keys(json.loads(path.read_text()))
    except (ValueError, UserError):
      raise UserError(f"{path} is damaged; --go_on replaces it")
    if found := _differences(old, json.loads(json.dumps(config_lib.thaw(config)))):
      raise UserError(
        f"{workdir} holds a run of another config ({'; '.join(found[:4])}): choose another "
        "--workdir, or --go_on to go on with the new one"
      )
  try:
    write_json(path, config_lib.thaw(config))
  except Exception as error:
    if not storage.is_bucket(workdir):
      raise
    raise UserError(f"{workdir} cannot be written: {core.first_line(error)}")


class Growing:
  """The folder of a workdir for files that grow (metrics.jsonl, events, profiles).

  A bucket takes whole files alone: there they grow in a folder of this machine, and `copy` brings them over.
  """

  def __init__(self, workdir: epath.Path):
    self._away = storage.is_bucket(workdir)
    self._scratch = tempfile.TemporaryDirectory(prefix="pretune-") if self._away else None
    self.workdir, self.folder, self._copied = (
      workdir,
      pathlib.Path(self._scratch.name if self._away else workdir),
      {},
    )
    metrics = workdir / "metrics.jsonl"
    if self._away and metrics.exists():
      self._copied[self.folder / metrics.name] = (self.folder / metrics.name).write_bytes(
        metrics.read_bytes()
      )

  def copy(self):
    """What changed since the last call, to the bucket. What fails is said, and tried again by the next call."""
    for path in filter(pathlib.Path.is_file, self.folder.rglob("*") if self._away else ()):
      if self._copied.get(path) != (size := path.stat().st_size):
        there = self.workdir / path.relative_to(self.folder).as_posix()
        try:
          there.write_bytes(path.read_bytes())
          self._copied[path] = size
        except Exception as error:  # a log is not worth the run
          print(f"{there} cannot be written now: {core.first_line(error)}", file=sys.stderr)
