"""The runs of a study: each is taken once, and what came out of it is kept.

A run is an ordinary workdir of llm.train under runs/ of the study's folder. Its result lies under
results/, with the config that it is of. Several processes may share the runs of one folder.
"""

import contextlib
import dataclasses
import io
import json
import time
from typing import Any, Callable, Iterator, Mapping, Sequence

from etils import epath

from llm import config as config_lib
from llm import storage
from llm.config import Config
from llm.core import Diverged, UserError, first_line
from llm.runs import workdir as workdir_lib
from llm.runs.log import duration
from llm.training import loop

WAIT = 5.0  # seconds between looks at the runs of other parts
SAID_AGAIN = 600.0  # seconds after which a part says again what it waits for
# What may differ between the machines that share the runs of a study.
OF_THE_MACHINE = ("mesh", "data.cache", "data.prefetch", "data.workers")


@dataclasses.dataclass(frozen=True)
class Run:
  """One run of a study.

  name: of its result. facts: what the analysis groups by. workdir: the name of its folder; "" is
  `name`. until: the step after which it stops, 0 is its end; another run of the same folder goes on
  from there. cost: beside the cost of other runs, for the time left.
  """

  name: str
  config: Config
  facts: Mapping[str, Any]
  workdir: str = ""
  until: int = 0
  cost: float = 1.0

  def folder(self, study: epath.Path) -> epath.Path:
    """The workdir."""
    return study / "runs" / (self.workdir or self.name)

  def take(self, workdir: epath.Path, use_devices: Callable | None) -> Mapping[str, Any]:
    """The figures of the run, which is taken where it is not done; use_devices: of `loop.train`.

    A run that is more than one llm.train replaces this. It leaves config.json and result.json.
    """
    return loop.train(self.config, workdir, until=self.until, use_devices=use_devices)


@dataclasses.dataclass(frozen=True)
class Result:
  """What came out of a run. figures: of its result.json, {} where it diverged; NaN is None.

  error: how it diverged. wall: seconds. revision: of the source that made it.
  """

  run: Run
  figures: Mapping[str, Any]
  error: str = ""
  wall: float = 0.0
  revision: str = "unknown"

  @property
  def diverged(self) -> bool:
    return not self.figures

  def evaluated(self, name: str) -> float:
    """A figure of the last evaluation; NaN where it has no value. Raises UserError without it."""
    figures = self.figures["eval"]
    if name not in figures:
      has = ", ".join(sorted(figures)) or "nothing, for config.run.data.eval is not set"
      raise UserError(f"the run {self.run.name} evaluates no {name}; it has {has}")
    return float("nan") if figures[name] is None else float(figures[name])

  def evaluations(self, study: epath.Path) -> list[dict[str, float]]:
    """The figures of every evaluation of the run so far, each with its step."""
    lines = (self.run.folder(study) / "metrics.jsonl").read_text().splitlines()
    logged = [json.loads(line) for line in lines]
    last = self.run.until or float("inf")
    return [line for line in logged if line["split"] == "eval" and line["step"] <= last]


def take(
  runs: Sequence[Run], folder: epath.Path, use_devices: Callable | None
) -> dict[str, Result]:
  """Name -> result of runs, of which those are taken that are not done. Says how many are left."""
  results: dict[str, Result] = {}
  seconds = cost = 0.0
  left = sum(one_run.cost for one_run in runs)
  for number, one_run in enumerate(runs, 1):
    result = _saved(one_run, folder)
    left -= one_run.cost
    if result is None:
      result = _taken(one_run, folder, use_devices)
      seconds += result.wall
      cost += one_run.cost
      print(
        f"run {number} of {len(runs)}, {one_run.name}: {duration(result.wall)}"
        f"{', diverged' * result.diverged}; this round has about "
        f"{duration(seconds / cost * left)} left",
        flush=True,
      )
    results[one_run.name] = result
  return results


def of_other_part(one_run: Run, folder: epath.Path) -> Result:
  """The result of a run that another process takes, once it is there.

  Raises UserError where the other process failed since this one waits.
  """
  began_at = said_at = time.time()
  result = _saved(one_run, folder)
  if result is None:
    print(f"waiting for the run {one_run.name}, which another part takes", flush=True)
  while result is None:
    time.sleep(WAIT)
    result = _saved(one_run, folder)
    failure = _failure(one_run, folder)
    if failure.exists():
      failed = json.loads(failure.read_text())
      if failed["at"] > began_at:
        raise UserError(f"another part failed: {failed['error']}")
    if time.time() - said_at > SAID_AGAIN:
      said_at = time.time()
      print(f"still waiting for {one_run.name}, {duration(said_at - began_at)}", flush=True)
  check_folder(one_run, folder)
  return result


def is_done(one_run: Run, folder: epath.Path) -> bool:
  """Whether there is a result of a run."""
  return _path(one_run, folder).exists()


def check_folder(one_run: Run, folder: epath.Path) -> None:
  """Raises UserError where the workdir or the result of a run is that of another config."""
  workdir = one_run.folder(folder)
  if (workdir / "config.json").exists():
    _check_same(_json(workdir / "config.json"), one_run, folder, workdir)
  path = _path(one_run, folder)
  if path.exists():
    saved = _kept(path)
    _check_same(saved["config"], one_run, folder, path)
    if saved["until"] != one_run.until:
      raise UserError(
        f"{path} is of a run that ended after step {saved['until']}, not {one_run.until}: give "
        "another --workdir"
      )


def _json(path: epath.Path) -> Any:
  try:
    return json.loads(path.read_text())
  except ValueError:
    return None


def _kept(path: epath.Path) -> dict[str, Any]:
  """What is kept of a run. Raises UserError where it is not whole."""
  kept = _json(path)
  names = {"figures", "error", "wall", "revision", "config", "until"}
  if not isinstance(kept, dict) or not names <= set(kept):
    raise UserError(f"{path} is damaged: remove it, and the run is looked at again")
  return kept


def _check_same(old: Any, one_run: Run, folder: epath.Path, where: epath.Path) -> None:
  """Raises UserError where `old`, which lies in `where`, is not the config of a run."""
  wanted = config_lib.thaw(one_run.config)
  try:
    changed = workdir_lib.differences(_as_here(old, wanted, str(folder)), wanted, OF_THE_MACHINE)
  except UserError:
    raise UserError(
      f"{where / 'config.json'} is damaged: remove {where}, and the run is taken again"
    )
  if changed:
    raise UserError(
      f"{where} holds a run of another config ({'; '.join(changed[:4])}): give another --workdir"
    )


def _as_here(old: Any, wanted: Any, folder: str) -> Any:
  """An old config with the paths into the study's folder as they are now: it may have moved."""
  if isinstance(wanted, Mapping) and isinstance(old, Mapping):
    return {name: _as_here(value, wanted.get(name), folder) for name, value in old.items()}
  if isinstance(wanted, str) and isinstance(old, str) and f"{folder}/" in wanted:
    return wanted if old.endswith(wanted.partition(folder)[2]) else old
  return old


def _taken(one_run: Run, folder: epath.Path, use_devices: Callable | None) -> Result:
  """The result of a run, which is taken, and saved."""
  workdir = one_run.folder(folder)
  _failure(one_run, folder).unlink(missing_ok=True)
  started_at = time.time()
  figures: Mapping[str, Any] = {}
  diverged = ""
  try:
    with _logged(folder / "logs" / f"{one_run.name}.txt"):
      figures = one_run.take(workdir, use_devices)
  except Diverged as error:
    diverged = first_line(error)
  except Exception as error:
    said = f"run {one_run.name}: {first_line(error)}"
    _write(_failure(one_run, folder), {"at": time.time(), "error": said})
    if isinstance(error, UserError):
      raise UserError(said)
    raise
  wall = time.time() - started_at
  if not one_run.until:  # it may have gone on from where an earlier call was killed
    wall = max(wall, figures.get("seconds", 0.0))
  saved: dict[str, Any] = {
    "figures": figures,
    "error": diverged,
    "wall": wall,
    "revision": _revision(workdir),
    "config": config_lib.thaw(one_run.config),
    "until": one_run.until,
  }
  _write(_path(one_run, folder), saved)
  result = _saved(one_run, folder)
  assert result is not None  # just written
  return result


def _revision(workdir: epath.Path) -> str:
  """Of the source that took the run."""
  record = workdir / "run.json"
  if not record.exists():
    return "unknown"
  of_run = json.loads(record.read_text())
  changed = "" if of_run.get("clean", True) else " with changes"
  return of_run["revision"][:12] + changed


@contextlib.contextmanager
def _logged(path: epath.Path) -> Iterator[None]:
  """What a run says goes to a file: the console has the study's progress.

  A bucket gets it when the run ends, for nothing can be appended to its files.
  """
  path.parent.mkdir(parents=True, exist_ok=True)
  if not storage.is_bucket(path):
    with open(path, "a") as log, contextlib.redirect_stdout(log):
      yield
    return
  said = io.StringIO(path.read_text() if path.exists() else "")
  said.seek(0, io.SEEK_END)
  try:
    with contextlib.redirect_stdout(said):
      yield
  finally:
    path.write_text(said.getvalue())


def _write(path: epath.Path, value: Any) -> None:
  path.parent.mkdir(parents=True, exist_ok=True)
  workdir_lib.write_json(path, value)


def _path(one_run: Run, folder: epath.Path) -> epath.Path:
  return folder / "results" / f"{one_run.name}.json"


def _failure(one_run: Run, folder: epath.Path) -> epath.Path:
  """Where a part says that it failed, for those that wait for it."""
  return folder / "results" / f"{one_run.name}.error"


def _saved(one_run: Run, folder: epath.Path) -> Result | None:
  """The result of a run that is done, else None."""
  path = _path(one_run, folder)
  if not path.exists():
    return None
  saved = _kept(path)
  return Result(one_run, *(saved[name] for name in ("figures", "error", "wall", "revision")))
