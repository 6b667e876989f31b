"""Checkpoints: self-describing, with a digest of every file, written by Orbax in the background.

The folder checkpoints/STEP/ has these parts:

  params/, opt_state/  as Orbax writes them
  description.json     step, config (with the objective), what "auto" became, metrics, progress
  tokenizer/           as data/tokenizer.py saves it
  manifest.json        the size and SHA-256 of every other file

The manifest is written last. On a disk, Orbax then renames the folder to its final name, so a step
with that name is complete. A bucket cannot rename: there, a step with a manifest is complete.

A step is verified against its manifest when it is read. In a bucket, the checksums are those that
the store keeps (MD5), and no file is read for them.
"""

import contextlib
import dataclasses
import hashlib
import json
import math
import os
import pathlib
import stat
from typing import Annotated, Any, Callable, Iterator

import jax
import msgspec
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from llm import cache, core, reading, storage
from llm import config as config_lib
from llm.config import Config
from llm.core import Params, UserError
from llm.data import tokenizer as tokenizer_lib

MANIFEST = "manifest.json"
MD5 = "md5:"  # begins the digest of a file that was written to a bucket
# Orbax changes these after the manifest is written. They hold no state.
CHANGING = {"_CHECKPOINT_METADATA", "commit_success.txt", MANIFEST}
# While Orbax writes a step, this follows the step's number in the name of the folder.
TEMPORARY = ".orbax-checkpoint-tmp"
# The devices that hold the same array share the writing of it where each has this much to write.
# Below that, it costs more than it saves: every device compiles a program for its part.
LEAST_BYTES_A_DEVICE = 2**20


class Damaged(UserError):
  """A checkpoint is incomplete, or its files are not as they were written."""


def _files(folder: epath.Path) -> Iterator[epath.Path]:
  """All files of a step that the manifest lists."""
  for path in sorted(folder.iterdir()):
    if path.is_dir():
      yield from _files(path)
    elif path.name not in CHANGING:
      yield path


@dataclasses.dataclass(frozen=True)
class Best:
  """The best evaluation of a run by a goal; step -1 is none. since: evaluations after it."""

  goal: str = ""
  step: int = -1
  value: float = math.nan
  since: int = 0


@dataclasses.dataclass(frozen=True)
class Saved:
  """The content of description.json.

  settled: what "auto" became where the step was trained. data: source -> digest. window: the sums
  of the log line that the run is in. seconds: that the run took so far, by activity, and `whole`.
  tokens: that it has learned from so far.
  """

  step: Annotated[int, msgspec.Meta(ge=0)]
  config: dict[str, dict[str, Any]]
  metrics: dict[str, float | None] = dataclasses.field(default_factory=dict)
  progress: Best = Best()
  settled: dict[str, str] = dataclasses.field(default_factory=dict)
  data: dict[str, str] = dataclasses.field(default_factory=dict)
  window: dict[str, list[float]] = dataclasses.field(default_factory=dict)
  seconds: dict[str, float] = dataclasses.field(default_factory=dict)
  tokens: float = 0.0


@dataclasses.dataclass(frozen=True)
class Description:
  """What a step says of itself: `Saved`, with its config checked."""

  step: int
  config: Config
  metrics: dict[str, float | None]
  progress: Best
  settled: dict[str, str]
  data: dict[str, str]
  window: dict[str, list[float]]
  seconds: dict[str, float]
  tokens: float


def _size(path: epath.Path) -> int:
  if storage.is_bucket(path):
    return path.stat().length
  # epath's stat() also looks up the user name of a local file's owner, and there may be none.
  return os.path.getsize(path)


def _digest(path: epath.Path) -> str:
  """The digest of a file for the manifest: its SHA-256, or what the store of a bucket keeps."""
  if not storage.is_bucket(path):
    return cache.file_digest(path)
  checksum = storage.checksum(path)
  return f"{MD5}{checksum}" if checksum else ""


def _is_as_written(path: epath.Path, digest: str) -> bool:
  """Whether the content of a file has a digest, as far as this is known without reading a bucket.

  A step that was copied between a bucket and a disk keeps the digests of where it was written.
  """
  if storage.is_bucket(path):
    return not digest.startswith(MD5) or _digest(path) in (digest, "")
  if digest.startswith(MD5):
    with open(path, "rb") as file:
      return digest == MD5 + hashlib.file_digest(file, "md5").hexdigest()
  return not digest or cache.file_digest(path) == digest


def write_manifest(folder: epath.Path) -> None:
  """Writes the size and digest of every file of a step."""
  entries = {str(path.relative_to(folder)): [_size(path), _digest(path)] for path in _files(folder)}
  (folder / MANIFEST).write_text(json.dumps(entries, indent=0))


def digest(folder: epath.Path) -> str:
  """The digest of a step's manifest, and so of its content."""
  return cache.digest((folder / MANIFEST).read_bytes())


def verify(folder: epath.Path) -> None:
  """Raises Damaged, naming the file, unless the files of a step are as they were written."""
  if not (folder / MANIFEST).exists():
    raise Damaged(f"{folder} is no complete checkpoint: it has no {MANIFEST}")
  _check_kinds(folder)
  try:
    entries = reading.read_json(folder / MANIFEST, dict[str, tuple[int, str]])
  except UserError as error:
    raise Damaged(f"{folder}: {MANIFEST} is damaged ({error})")
  if "description.json" not in entries:
    raise Damaged(f"{folder}: {MANIFEST} is damaged (it lists no description.json)")
  for name, (size, digest) in entries.items():
    if not _is_inside(name):
      raise Damaged(f"{folder}: {MANIFEST} lists {name!r}, which is not in the folder")
    path = folder / name
    if not path.exists():
      raise Damaged(f"{folder}: {name} is missing")
    if not storage.is_bucket(path) and not path.is_file():
      raise Damaged(f"{folder}: {name} is no file")
    if (actual_size := _size(path)) != size:
      raise Damaged(f"{folder}: {name} has {actual_size} bytes, {size} were written")
    if not _is_as_written(path, digest):
      kind = "MD5" if digest.startswith(MD5) else "SHA-256"
      raise Damaged(f"{folder}: {name} is damaged (its {kind} is not the one that was written)")


def _check_kinds(folder: epath.Path) -> None:
  """Raises Damaged where a local step holds a link, which could lead out of it, or a pipe."""
  if storage.is_bucket(folder):
    return
  for parent, folders, files in os.walk(folder):
    for name in (*folders, *files):
      mode = os.lstat(os.path.join(parent, name)).st_mode
      if not stat.S_ISDIR(mode) and not stat.S_ISREG(mode):
        raise Damaged(f"{folder}: {name} is a link or no file at all, and was written as a file")


def _is_inside(name: str) -> bool:
  """Whether a name of a manifest is that of a file in the folder."""
  parts = pathlib.PurePosixPath(name).parts
  return bool(parts) and not name.startswith("/") and ".." not in parts and "\0" not in name


def steps(root: epath.Path) -> list[int]:
  """The numbers of the step folders under checkpoints/, newest first."""
  numbers = [int(path.name) for path in root.glob("*") if path.name.isdecimal() and path.is_dir()]
  return sorted(numbers, reverse=True)


def newest_valid(root: epath.Path, say: Callable[[str], object] = print) -> epath.Path | None:
  """The newest valid step under checkpoints/, or None. `say` reports the steps passed over."""
  for leftover in sorted(root.glob(f"*{TEMPORARY}*")):
    say(f"passing over {leftover.name}: its save was interrupted")
  for step in steps(root):
    try:
      verify(root / str(step))
      return root / str(step)
    except Damaged as error:
      say(f"passing over a damaged checkpoint: {error}")
  return None


def find(path: str | pathlib.PurePath, say: Callable[[str], object] = print) -> epath.Path:
  """The verified step folder of a workdir, of its checkpoints/ or of one step.

  Of a run that kept its best step it is the best one, else the newest. `say` reports the steps
  passed over. Raises UserError where there is no valid step.
  """
  path = storage.folder(path)
  if not path.is_dir():
    raise UserError(f"{path}: no such checkpoint folder")
  is_step = path.name.isdecimal() and path.parent.name == "checkpoints"
  if is_step or (path / MANIFEST).exists():
    verify(path)
    return path
  root = path / "checkpoints" if (path / "checkpoints").is_dir() else path
  step = _best_valid(root, say) or newest_valid(root, say)
  if step is None:
    raise UserError(
      f"{path} holds no complete checkpoint: give a workdir of llm.train, its "
      "checkpoints folder or one step of it"
    )
  return step


def _best_valid(root: epath.Path, say: Callable[[str], object]) -> epath.Path | None:
  """The step that the newest readable one says is the best; None without one that is whole."""
  for step in steps(root):
    try:
      best = describe(root / str(step)).progress.step
    except Damaged:
      continue
    if best in (-1, step):
      return None
    try:
      verify(root / str(best))
      return root / str(best)
    except Damaged as error:
      say(f"passing over the best checkpoint: {error}")
      return None
  return None


def evaluations(workdir: epath.Path) -> list[tuple[int, dict[str, float | None]]]:
  """(step, figures) of the complete checkpoints of a workdir, in order, without damaged ones."""
  root = workdir / "checkpoints"
  figures = []
  for step in reversed(steps(root)):
    if (root / str(step) / MANIFEST).exists():
      with contextlib.suppress(Damaged):
        figures.append((step, describe(root / str(step)).metrics))
  return figures


def describe(step: epath.Path) -> Description:
  """What a step says of itself. Raises Damaged where it cannot be read, or says nonsense."""
  try:
    saved = reading.read_json(step / "description.json", Saved)
    config = config_lib.freeze(saved.config)
    config_lib.build(config_lib.ModelConfig, saved.settled, "settled")
  except UserError as error:
    raise Damaged(f"{step}: description.json is damaged: {error}")
  return Description(
    saved.step,
    config,
    saved.metrics,
    saved.progress,
    saved.settled,
    saved.data,
    saved.window,
    saved.seconds,
    saved.tokens,
  )


def load_tokenizer(step: epath.Path) -> tokenizer_lib.Tokenizer:
  """The tokenizer that a step was trained with."""
  return tokenizer_lib.load(step / "tokenizer")


def restore(step: epath.Path, item: str, like: Any = None) -> Any:
  """The `params` or the `opt_state` of a verified step.

  like: a tree of ShapeDtypeStructs with shardings. None gives host arrays of the saved shapes.
  Raises Damaged where the step does not fit `like`.
  """
  with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
    try:
      if like is not None:
        args = ocp.checkpoint_utils.construct_restore_args(like)
        return reader.restore(step / item, item=like, restore_args=args)
      metadata = reader.metadata(step / item).item_metadata
      if metadata is None:
        raise ValueError("Orbax finds no description of its arrays")
      args = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), metadata.tree)
      return reader.restore(step / item, restore_args=args)
    # What Orbax raises on files that it did not write so.
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
      raise Damaged(f"{step}: {item} does not fit this run: {core.first_line(error)}")


def _writing() -> ocp.PyTreeCheckpointHandler:
  """Writes a tree of arrays."""
  of_devices = ocp.type_handlers.ArrayHandler(
    min_slice_bytes_for_replica_parallel=LEAST_BYTES_A_DEVICE
  )
  registry = ocp.type_handlers.create_type_handler_registry(
    (jax.Array, of_devices), (np.ndarray, ocp.type_handlers.NumpyHandler())
  )
  return ocp.PyTreeCheckpointHandler(type_handler_registry=registry)


class Manager:
  """Saves the steps of a run, and removes all but the newest `keep` and the best."""

  def __init__(
    self,
    workdir: str | pathlib.PurePath,
    keep: int,
    tokenizer: tokenizer_lib.Tokenizer,
  ):
    self.root = storage.folder(workdir) / "checkpoints"
    self.root.mkdir(parents=True, exist_ok=True)
    self.keep = keep
    self.tokenizer = tokenizer
    # The step that stays too; -1 is none.
    self.best = -1
    # The step being written, or written last, and its description.
    self._pending: tuple[int, dict] | None = None
    self._writer = ocp.AsyncCheckpointer(
      ocp.CompositeCheckpointHandler(params=_writing(), opt_state=_writing()),
      async_options=ocp.AsyncOptions(post_finalization_callback=self._finish),
    )

  def save(
    self,
    step: int,
    params: Params,
    opt_state: Any,
    description: dict[str, Any],
    best: int = -1,
  ) -> None:
    """Waits for the previous save, then starts this one. opt_state None saves parameters alone.

    best: the step that stays, however old it is; -1 is none.

    Raises UserError where the step cannot be written, as on a full disk.
    """
    self.wait()
    self._prune(best)
    self.best = best
    self._pending = step, description
    folder = self.root / str(step)
    items = {"params": ocp.args.PyTreeSave(params)}
    if opt_state is not None:
      items["opt_state"] = ocp.args.PyTreeSave(opt_state)
    try:
      # A folder of this step can only be a damaged one, which the run passed over.
      if folder.exists() and jax.process_index() == 0:
        folder.rmtree()
      self._writer.save(folder, ocp.args.Composite(**items))
    except Exception as error:  # the errors of object stores have no common base
      raise self._failure(error)

  def _finish(self) -> None:
    """Adds the description, the tokenizer and the manifest. Orbax's thread calls this.

    The folder still has its temporary name; in a bucket, it has its final name from the start.
    """
    assert self._pending is not None  # `save` set it
    step, description = self._pending
    folder = next(iter(self.root.glob(f"{step}{TEMPORARY}*")), self.root / str(step))
    (folder / "description.json").write_text(json.dumps({"step": step, **description}, indent=1))
    self.tokenizer.save(folder / "tokenizer")
    write_manifest(folder)

  def wait(self) -> None:
    """Waits until the last save is on disk. Raises UserError if it failed."""
    try:
      self._writer.wait_until_finished()
    except Exception as error:  # Orbax wraps the errors of its threads in several types
      raise self._failure(error)

  def _failure(self, error: BaseException) -> UserError:
    """The error to raise for a failed save. It names the newest step that is complete."""
    step = self._pending[0] if self._pending else "?"
    self._pending = None
    complete = []
    with contextlib.suppress(Exception):  # where the store has failed, listing it fails too
      complete = self._complete_steps()
    message = f"cannot save step {step} in {self.root}: {core.first_line(error)}; "
    if complete:
      message += f"the newest complete checkpoint is step {complete[0]}"
    else:
      message += "no earlier complete checkpoint was found"
    if not storage.is_bucket(self.root):
      message += "; free space and start again"
    return UserError(message)

  def _complete_steps(self) -> list[int]:
    """The steps with a manifest, newest first.

    Steps after the last save are left out: they are damaged, and the run passed them over.
    """
    last = self._pending[0] if self._pending else float("inf")
    return [
      step
      for step in steps(self.root)
      if step <= last and (self.root / str(step) / MANIFEST).exists()
    ]

  def _prune(self, next_best: int) -> None:
    """Removes the steps that need not be kept, and the folders of interrupted saves.

    next_best: may still have to be saved, so the best one before it stays as long.
    """
    # Before the first save of this run, nothing is removed.
    if jax.process_index() or not self._pending:
      return
    kept = {*self._complete_steps()[: self.keep], self.best, next_best}
    for step in set(steps(self.root)) - kept:
      (self.root / str(step)).rmtree()
    for leftover in self.root.glob(f"*{TEMPORARY}*"):
      with contextlib.suppress(OSError):
        leftover.rmtree()

  def close(self) -> None:
    """Waits for the last save, removes old steps and ends Orbax's threads."""
    self.wait()
    self._prune(self.best)
    self._writer.close()
