"""Checkpoints: written by Orbax in the background, self-describing, a digest for every file.

checkpoints/STEP/ holds params/ and opt_state/ (Orbax), description.json (config, objective, step,
metrics), tokenizer/ and manifest.json (size and SHA-256 of every other file). The manifest is
written last: before Orbax renames the folder to its final name, so a step that has its name is
whole, or, in a bucket, which knows no renaming, so that a step without one is not. It is verified
when the step is read; in a bucket by the sizes alone, for the store keeps checksums of its own.
"""

import contextlib
import json
import os
import pathlib
from typing import Any, Iterator

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from llm import core, storage
from llm.core import Params, UserError
from llm.data import cache
from llm.data import tokenizer as tokenizer_lib

MANIFEST = "manifest.json"
# Orbax touches these after the manifest is written; they carry no state.
CHANGING = {"_CHECKPOINT_METADATA", "commit_success.txt", MANIFEST}


class Damaged(UserError):
  """A checkpoint that is incomplete or not what was written."""


def _files(folder: epath.Path) -> Iterator[epath.Path]:
  for path in sorted(folder.iterdir()):
    if path.is_dir():
      yield from _files(path)
    elif path.name not in CHANGING:
      yield path


def _size(path: epath.Path) -> int:
  # epath would also look up the name of a local file's owner, who may have none.
  return path.stat().length if storage.is_bucket(path) else os.path.getsize(path)


def write_manifest(folder: epath.Path):
  """Size and digest of every file of a step."""
  told = lambda path: "" if storage.is_bucket(path) else cache.file_digest(path)
  entries = {str(path.relative_to(folder)): [_size(path), told(path)] for path in _files(folder)}
  (folder / MANIFEST).write_text(json.dumps(entries, indent=0))


def digest(folder: epath.Path) -> str:
  """A name for the content of a step."""
  return cache.digest((folder / MANIFEST).read_bytes())


def verify(folder: epath.Path):
  """Raises Damaged, naming the file, unless the step is exactly what was written."""
  try:
    entries = json.loads((folder / MANIFEST).read_text())
  except FileNotFoundError:
    raise Damaged(f"{folder} is no complete checkpoint: it has no {MANIFEST}")
  except ValueError:
    raise Damaged(f"{folder}: {MANIFEST} is damaged")
  for name, (size, digest) in entries.items():
    path = folder / name
    if not path.exists():
      raise Damaged(f"{folder}: {name} is missing")
    if (found := _size(path)) != size:
      raise Damaged(f"{folder}: {name} has {found} bytes, {size} were written")
    if digest and not storage.is_bucket(path) and cache.file_digest(path) != digest:
      raise Damaged(f"{folder}: {name} is damaged (its SHA-256 is not the one that was written)")


def steps(root: epath.Path) -> list[int]:
  """The steps with a folder under checkpoints/, newest first."""
  return sorted(
    (int(p.name) for p in root.glob("*") if p.name.isdigit() and p.is_dir()), reverse=True
  )


def newest_valid(root: epath.Path, say=print) -> epath.Path | None:
  """The newest whole step; those passed over are named."""
  for leftover in sorted(root.glob("*.orbax-checkpoint-tmp*")):
    say(f"passing over {leftover.name}: its writing was cut off")
  for step in steps(root):
    try:
      verify(root / str(step))
      return root / str(step)
    except Damaged as error:
      say(f"passing over a damaged checkpoint: {error}")
  return None


def find(path: str | pathlib.PurePath, say=print) -> epath.Path:
  """A workdir, its checkpoints/ or one step -> a verified step folder. Raises UserError."""
  path = storage.folder(path)
  if not path.is_dir():
    raise UserError(f"{path}: no such checkpoint folder")
  if (path / MANIFEST).exists() or path.name.isdigit() and path.parent.name == "checkpoints":
    verify(path)
    return path
  root = path / "checkpoints" if (path / "checkpoints").is_dir() else path
  if (step := newest_valid(root, say)) is None:
    raise UserError(
      f"{path} holds no complete checkpoint: give a workdir of llm.train, its "
      "checkpoints folder or one step of it"
    )
  return step


def describe(step: epath.Path) -> dict[str, Any]:
  """description.json of a step: step, config, metrics, what the tokenizer is."""
  try:
    return json.loads((step / "description.json").read_text())
  except (OSError, ValueError) as error:
    raise Damaged(f"{step}: description.json cannot be read ({error})")


def load_tokenizer(step: epath.Path) -> tokenizer_lib.Tokenizer:
  """The tokenizer that a step was trained with."""
  return tokenizer_lib.load(step / "tokenizer")


def restore(step: epath.Path, item: str, like=None):
  """`params` or `opt_state` of a step. like: a tree of ShapeDtypeStructs with shardings, or None
  for host arrays as they were saved. The step must have been verified. Raises Damaged."""
  with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
    try:
      if like is None:
        tree = reader.metadata(step / item).item_metadata.tree
        args = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
        return reader.restore(step / item, restore_args=args)
      return reader.restore(
        step / item, item=like, restore_args=ocp.checkpoint_utils.construct_restore_args(like)
      )
    except (ValueError, FileNotFoundError, KeyError, TypeError) as error:
      raise Damaged(f"{step}: {item} does not fit this run: {core.first_line(error)}")


class Manager:
  """Saves the steps of one run and removes the old ones: the newest `keep` stay, and the best."""

  def __init__(
    self,
    workdir: str | pathlib.PurePath,
    keep: int,
    keep_best: str,
    tokenizer: tokenizer_lib.Tokenizer,
  ):
    self.root = storage.folder(workdir) / "checkpoints"
    self.root.mkdir(parents=True, exist_ok=True)
    self.keep, self.tokenizer = keep, tokenizer
    self.best_mode, _, self.best_metric = keep_best.partition(":")
    self._pending: tuple[int, dict] | None = None
    self._writer = ocp.AsyncCheckpointer(
      ocp.CompositeCheckpointHandler("params", "opt_state"),
      async_options=ocp.AsyncOptions(post_finalization_callback=self._finish),
    )

  def save(self, step: int, params: Params, opt_state, description: dict):
    """Starts saving; waits for the save before this one. opt_state None: parameters alone.

    Raises UserError on a full disk.
    """
    self.wait()
    self._prune()
    self._pending = step, description
    folder = self.root / str(step)
    try:
      if folder.exists() and jax.process_index() == 0:  # a damaged one that was passed over
        folder.rmtree()
      items = (
        {"params": params} if opt_state is None else {"params": params, "opt_state": opt_state}
      )
      self._writer.save(
        folder, ocp.args.Composite(**{k: ocp.args.PyTreeSave(v) for k, v in items.items()})
      )
    except Exception as error:  # those of stores have no common base
      raise self._failed(error)

  def _finish(self):
    """Runs in Orbax's thread, inside the temporary folder, before it gets its final name (which it has in a bucket)."""
    step, description = self._pending
    folder = next(iter(self.root.glob(f"{step}.orbax-checkpoint-tmp*")), self.root / str(step))
    (folder / "description.json").write_text(json.dumps({"step": step, **description}, indent=1))
    self.tokenizer.save(folder / "tokenizer")
    write_manifest(folder)

  def wait(self):
    """Until the last save is on disk. Raises UserError if it failed."""
    try:
      self._writer.wait_until_finished()
    except Exception as error:  # Orbax wraps what its threads raise in kinds of its own
      raise self._failed(error)

  def _failed(self, error: BaseException) -> UserError:
    step, self._pending = self._pending[0] if self._pending else "?", None
    kept = []
    with contextlib.suppress(Exception):  # the store may be what failed
      kept = self._whole()
    return UserError(
      f"cannot save step {step} in {self.root}: {core.first_line(error)}; "
      + (
        f"the newest complete checkpoint is step {kept[0]}"
        if kept
        else "no earlier checkpoint is seen"
      )
      + ("" if storage.is_bucket(self.root) else "; free space and start again")
    )

  def _whole(self) -> list[int]:
    """The steps that were written to their end, newest first. Those after the last save were damaged, and passed over."""
    last = self._pending[0] if self._pending else float("inf")
    return [
      step
      for step in steps(self.root)
      if step <= last and (self.root / str(step) / MANIFEST).exists()
    ]

  def best(self) -> int | None:
    """The step with the best metric, of those on disk that have it."""
    scores = {}
    for step in self._whole():
      try:
        value = describe(self.root / str(step))["metrics"].get(self.best_metric)
      except UserError:
        continue
      if value is not None:
        scores[step] = value
    if not scores:
      return None
    return (max if self.best_mode == "max" else min)(scores, key=scores.get)

  def _prune(self):
    if jax.process_index() or not self._pending:  # nothing goes before something new is there
      return
    stay = {*self._whole()[: self.keep], self.best() if self.best_metric else None}
    for step in set(steps(self.root)) - stay:
      (self.root / str(step)).rmtree()
    for leftover in self.root.glob("*.orbax-checkpoint-tmp*"):
      with contextlib.suppress(OSError):
        leftover.rmtree()

  def close(self):
    """Waits for the last save and tidies up."""
    self.wait()
    self._prune()
    self._writer.close()
