"""The workdir of a run: its lock, the check of its config, and the records in it."""

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
from typing import Any, Collection, Iterator, Mapping

import jax
import numpy as np
from etils import epath

from llm import cache, core, reading, storage
from llm import config as config_lib
from llm.config import Config
from llm.core import UserError
from llm.data import sources
from llm.objectives import base
from llm.runs import metrics as metrics_lib

# What may differ between a run and its continuation.
MAY_CHANGE = {
  "mesh",
  "data.cache",
  "data.prefetch",
  "data.workers",
  "model.embedding_start",
  "model.init_std",
  "model.loss_chunk",
  "model.remat",
  "model.scan",
  "training.epochs",
  "training.eval_batches",
  "training.eval_every",
  "training.keep",
  "training.keep_best",
  "training.log_every",
  "training.patience",
  "training.profile",
  "training.save_every",
  "training.steps",
}
# Packages whose versions run.json names.
PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy", "sentencepiece")


def _git(*args: str) -> str:
  root = pathlib.Path(__file__).resolve().parents[2]
  command = ["git", "-C", str(root), *args]
  return subprocess.run(command, capture_output=True, text=True).stdout.strip()


def _revision() -> dict[str, Any]:
  """The source revision ("unknown" outside a checkout), and whether the working tree is clean."""
  try:
    return {
      "revision": _git("rev-parse", "HEAD") or "unknown",
      "clean": not _git("status", "--porcelain"),
    }
  except OSError:  # no git
    return {"revision": "unknown", "clean": None}


def write_json(path: epath.Path, value: Any):
  """Writes a file whole or not at all. Only process 0 writes."""
  if jax.process_index():
    return
  storage.write_whole(path, json.dumps(metrics_lib.as_json(value), indent=1))


def run_record() -> dict[str, Any]:
  """What run.json holds: the command, the source revision, versions and devices."""
  return {
    "command": sys.argv,
    **_revision(),
    "python": platform.python_version(),
    "versions": {package: importlib.metadata.version(package) for package in PACKAGES},
    "devices": [str(device) for device in jax.devices()],
    "processes": jax.process_count(),
    "xla_flags": os.environ.get("XLA_FLAGS", ""),
  }


def differences(old: dict, new: dict, may_change: Collection[str]) -> list[str]:
  """A line for every key that two configs set to different values and that may not change.

  old, new: as config.json holds them, perhaps of an earlier revision. Raises UserError where one
  is no config.
  """
  old, new = with_new_keys(old), with_new_keys(new)
  lines = []
  for group in sorted({*old, *new} - set(may_change)):
    old_group = old.get(group, {})
    new_group = new.get(group, {})
    for key in sorted({*old_group, *new_group}):
      before = json.dumps(old_group.get(key))
      after = json.dumps(new_group.get(key))
      if before != after and f"{group}.{key}" not in may_change:
        lines.append(f"{group}.{key} was {before}, is {after}")
  return lines


def check_processes_agree(config: Config, workdir: epath.Path, resume_from: epath.Path | None):
  """Raises UserError unless all processes have the same config, workdir and step to go on from."""
  if jax.process_count() == 1:
    return
  from jax.experimental import multihost_utils

  asked = json.dumps(config_lib.thaw(config), sort_keys=True)
  digest = cache.digest(asked, str(workdir), str(resume_from))
  digests = multihost_utils.process_allgather(np.frombuffer(bytes.fromhex(digest), np.uint8))
  for process, other in enumerate(digests):
    if (other != digests[0]).any():
      raise UserError(
        f"process {process} was started with another config or --workdir than process 0, or sees "
        "another newest checkpoint there: start all with the same, on a folder that all share"
      )


@contextlib.contextmanager
def locked(workdir: epath.Path) -> Iterator[None]:
  """Creates the workdir and keeps other runs out of it.

  Raises UserError where another run is in it, or the folder cannot be created. Warns where it
  cannot be locked.
  """
  if storage.is_bucket(workdir):
    _warn_unlocked(workdir, "it is a bucket")
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
    except OSError as error:  # some shared file systems have no locks
      _warn_unlocked(workdir, error.strerror)
    yield


def _warn_unlocked(workdir: epath.Path, reason: str | None):
  if not jax.process_index():
    print(
      f"{workdir} cannot be locked ({reason}): make sure that no other run uses it",
      file=sys.stderr,
    )


def with_new_keys(config: dict) -> dict:
  """The config of an earlier revision, with the keys that are new since then at their defaults."""
  current = config_lib.freeze(config)
  objective = {**base.defaults(current.objective["name"]), **current.objective}
  plain = config_lib.thaw(dataclasses.replace(current, objective=objective))
  return json.loads(json.dumps(plain))


def claim(workdir: epath.Path, config: Config, go_on: bool):
  """Writes config.json into an existing workdir.

  Raises UserError where it holds a run of another config, unless `go_on`, and where it cannot be
  written.
  """
  path = workdir / "config.json"
  if path.exists() and not go_on:
    _check_same_config(path, config)
  try:
    write_json(path, config_lib.thaw(config))
  except Exception as error:  # those of stores have no common base
    if not storage.is_bucket(workdir):
      raise
    raise UserError(f"{workdir} cannot be written: {core.first_line(error)}")


def _check_same_config(path: epath.Path, config: Config):
  """Raises UserError where a config.json holds another config, or cannot be read."""
  try:
    old = with_new_keys(reading.shaped(reading.json_value(path.read_text(), ""), dict, ""))
  except (OSError, UnicodeDecodeError, UserError):
    raise UserError(f"{path} is damaged; --go_on replaces it")
  if changed := differences(old, config_lib.thaw(config), MAY_CHANGE):
    raise UserError(
      f"{path.parent} holds a run of another config ({'; '.join(changed[:4])}): choose another "
      "--workdir, or --go_on to go on with the new one"
    )


def data_digests(config: Config) -> dict[str, str]:
  """The sources of a config -> the digest of the content of each."""
  read = [*sources.parse(config.data.train, config.data)]
  if config.data.eval:
    read.append(sources.parse_one(config.data.eval, config.data))
  return {source.spec: source.digest() for source in read}


def check_same_data(config: Config, before: Mapping[str, str]) -> None:
  """Raises UserError where the data of a run that goes on have changed since its checkpoint."""
  for name, digest in data_digests(config).items():
    if before.get(name, digest) != digest:
      raise UserError(
        f"{name} has changed since this run began, so what it learns from is no longer the same: "
        "choose another --workdir, or --go_on to go on with the new data"
      )


class LogFolder:
  """The local folder of the files that grow during a run: metrics.jsonl, events, profiles.

  It is the workdir, unless that is a bucket. A bucket takes only whole files: there the files grow
  in a temporary folder, and `copy` writes them to the bucket.
  """

  def __init__(self, workdir: epath.Path):
    self.workdir = workdir
    self._scratch: tempfile.TemporaryDirectory | None = None
    # Bytes that were copied to the bucket, by local path.
    self._copied_sizes: dict[pathlib.Path, int] = {}
    if not storage.is_bucket(workdir):
      self.path = pathlib.Path(workdir)
      return
    self._scratch = tempfile.TemporaryDirectory(prefix="pretune-")
    self.path = pathlib.Path(self._scratch.name)
    for remote in (workdir / "metrics.jsonl", workdir / "rollouts.jsonl"):
      if remote.exists():
        local = self.path / remote.name
        self._copied_sizes[local] = local.write_bytes(remote.read_bytes())

  def copy(self):
    """Writes to the bucket what changed since the last call.

    A failure is printed and costs nothing: the next call tries again.
    """
    if not self._scratch:
      return
    for path in filter(pathlib.Path.is_file, self.path.rglob("*")):
      size = path.stat().st_size
      if self._copied_sizes.get(path) == size:
        continue
      remote = self.workdir / path.relative_to(self.path).as_posix()
      try:
        remote.write_bytes(path.read_bytes())
        self._copied_sizes[path] = size
      except Exception as error:  # a log is not worth the run
        print(f"{remote} cannot be written now: {core.first_line(error)}", file=sys.stderr)
