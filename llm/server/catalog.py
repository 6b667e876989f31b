"""The models that are served: those of --models for everybody, fine-tuned ones for their owner.

A model is loaded when it is first asked for. When too many are, the one that was not asked for
longest goes.
"""

import collections
import dataclasses
import pathlib
import threading
import time
import weakref
from typing import Any, Callable, TypeVar

import llm
from llm import models, storage
from llm.checkpoints import locate, manager
from llm.core import UserError
from llm.inference.embedder import Embedder
from llm.inference.engine import Engine
from llm.inference.labeller import Labeller
from llm.inference.talker import Talker
from llm.objectives import base as base_lib
from llm.server.errors import ApiError, unknown
from llm.server.state import State

STEP = ":ckpt-step-"
Served = TypeVar("Served", Talker, Labeller, Embedder)


@dataclasses.dataclass(frozen=True)
class Base:
  """A checkpoint that a job can start from: a step. kind: of its architecture."""

  checkpoint: str
  kind: str
  max_length: int
  labels: bool


def parse_models(text: str) -> dict[str, str]:
  """--models=NAME=CHECKPOINT,... as name -> checkpoint. Raises UserError."""
  served = {}
  for part in filter(None, text.split(",")):
    name, equals, checkpoint = part.partition("=")
    if not equals or not name or not checkpoint or ":" in name or name in served:
      raise UserError(
        f"--models={part} must be NAME=CHECKPOINT, each name once and without a colon; commas part "
        "several"
      )
    served[name] = checkpoint
  return served


class Catalog:
  """served: the models of --models. rows, waiting: of an `Engine`. limit: models in memory."""

  def __init__(
    self,
    workdir: pathlib.Path,
    state: State,
    served: dict[str, str],
    rows: int,
    waiting: int,
    limit: int,
  ):
    self.workdir = workdir
    self.state = state
    self.served = served
    self.rows = rows
    self.waiting = waiting
    self.limit = limit
    self.created_at = int(time.time())
    self.loaded: collections.OrderedDict[tuple[str, type], Any] = collections.OrderedDict()
    self.bases: dict[str, Base] = {}
    self._lock = threading.Lock()  # of what is in memory: it is held for moments
    self._leaving: weakref.WeakSet[Engine] = weakref.WeakSet()  # they still answer somebody
    self._loading: dict[tuple[str, type], threading.Event] = {}  # set when a model is loaded

  def listed(self, owner: str) -> list[dict[str, Any]]:
    """The models of an owner, as the API lists them."""
    shown = [_shown(name, "server", self.created_at) for name in self.served]
    rows = self.state.rows("models", owner=owner)
    return shown + [_shown(row["id"], owner, row["created_at"]) for row in rows]

  def checkpoint(self, owner: str, name: str) -> str:
    """The checkpoint of a model. Raises ApiError if this owner has none of that name."""
    if name in self.served:
      return self.served[name]
    model, has_step, step = name.partition(STEP)
    row = self.state.row("models", id=model, owner=owner)
    folder = self.workdir / "jobs" / row["job"] / "run" if row else None
    if folder and has_step:
      folder = folder / "checkpoints" / step if step.isdecimal() else None
    if not folder or not folder.is_dir():
      raise unknown("model", name, "model_not_found")
    return str(folder)

  def base(self, owner: str, name: str) -> Base:
    """A model as the start of a job. Raises ApiError or UserError."""
    checkpoint = self.checkpoint(owner, name)
    known = self.bases.get(checkpoint)
    if known is None or is_gone(known.checkpoint):  # its run has removed it
      step = locate.find(checkpoint, _say_nothing)
      saved = manager.describe(step).config
      facts = models.facts(saved.model)
      objective = base_lib.build(saved.objective)
      labels = isinstance(objective, base_lib.Labels)
      length = saved.model.max_length
      self.bases[checkpoint] = Base(str(step), facts.kind, length, labels)
    return self.bases[checkpoint]

  def talker(self, owner: str, name: str) -> Talker:
    """A model that writes. Raises ApiError if it is none."""
    base = self.base(owner, name)
    if base.kind != "decoder":
      kind = base.kind.replace("_", "-")
      raise ApiError(f"{name} is an {kind}: only decoders answer here", "model")
    return self._loaded(name, base, Talker, self._make_talker)

  def labeller(self, owner: str, name: str) -> Labeller:
    """A model that labels text or answers questions on it. Raises ApiError if it is none."""
    base = self.base(owner, name)
    if not base.labels:
      raise ApiError(f"{name} was not fine-tuned to label text or to answer questions", "model")
    return self._loaded(
      name, base, Labeller, lambda checkpoint: Labeller(locate.find(checkpoint, _say_nothing))
    )

  def embedder(self, owner: str, name: str) -> Embedder:
    """An encoder. Raises ApiError if it is none."""
    base = self.base(owner, name)
    if base.kind != "encoder":
      raise ApiError(f"{name} is no encoder: embeddings need one", "model")
    return self._loaded(name, base, Embedder, lambda checkpoint: Embedder(llm.load(checkpoint)))

  def _make_talker(self, checkpoint: str) -> Talker:
    return Talker(llm.load(checkpoint), self.rows, self.waiting)

  def _loaded(
    self, name: str, base: Base, kind: type[Served], make: Callable[[str], Served]
  ) -> Served:
    """The model from memory, or as `make` loads it. Those that are in memory do not wait for it."""
    key = name, kind
    while True:
      with self._lock:
        if key in self.loaded:
          self.loaded.move_to_end(key)
          return self.loaded[key]
        others = self._loading.get(key)
        if others is None:
          self._loading[key] = threading.Event()
          self._make_room()
      if others is None:
        return self._load(key, base, make)
      others.wait()

  def _load(self, key: tuple[str, type], base: Base, make: Callable[[str], Served]) -> Served:
    """Loads a model that nobody else loads now."""
    try:
      model = make(base.checkpoint)
      with self._lock:
        self.loaded[key] = model
      return model
    finally:
      with self._lock:
        self._loading.pop(key).set()

  def _make_room(self):
    """Lets go of the model that was asked for least lately, unless it is at work."""
    idle = [
      key
      for key, model in self.loaded.items()
      if not (isinstance(model, Talker) and model.engine.busy)
    ]
    while len(self.loaded) + len(self._loading) > self.limit and idle:
      self._let_go(self.loaded.pop(idle.pop(0)))

  def forget(self, name: str):
    """Lets go of a model that was deleted, when what it is asked now is answered."""
    with self._lock:
      for key in [key for key in self.loaded if key[0] == name]:
        self._let_go(self.loaded.pop(key))

  def _let_go(self, model: Any):
    """A model leaves the memory. A request may have come just now: it is answered first."""
    if isinstance(model, Talker):
      self._leaving.add(model.engine)
      model.engine.retire()

  def close(self):
    """Ends the threads of all models."""
    engines = [model.engine for model in self.loaded.values() if isinstance(model, Talker)]
    for engine in [*engines, *self._leaving]:
      engine.close()


def is_gone(checkpoint: str) -> bool:
  """Whether a step is on the disk no more. One in a bucket is taken to be there."""
  return not storage.is_bucket(checkpoint) and not pathlib.Path(checkpoint).exists()


def _shown(name: str, owner: str, created_at: int) -> dict[str, Any]:
  return {"id": name, "object": "model", "created": created_at, "owned_by": owner}


def _say_nothing(*_: Any):
  """Takes the place of `say`."""
