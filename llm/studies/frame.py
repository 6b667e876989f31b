"""A study: runs that differ in stated keys, then an analysis and a report.

Runs are ordinary workdirs of llm.train under runs/ of the study's folder. Those that are done are
skipped and those that were cut off go on, so a study that was killed gives the same report. The
report can be made again without training.
"""

import abc
import contextlib
import dataclasses
import importlib
import json
import pathlib
import pkgutil
import time
from typing import Any, Callable, ClassVar, Mapping, Sequence

import tqdm

import llm.studies
from llm import cache
from llm import config as config_lib
from llm.config import Config
from llm.core import UserError, first_line
from llm.runs.log import duration
from llm.training import loop

WAIT = 5.0  # seconds between looks at the runs of other parts


@dataclasses.dataclass(frozen=True)
class Run:
  """One run of a study. name: of its folder. facts: what the analysis groups by."""

  name: str
  config: Config
  facts: Mapping[str, Any]

  def take(self, workdir: pathlib.Path, use_devices: Callable | None) -> Mapping[str, Any]:
    """The figures of the run, which is taken where it is not done; use_devices: of `loop.train`.

    A run that is more than one llm.train replaces this. It leaves config.json and result.json.
    """
    return loop.train(self.config, workdir, use_devices=use_devices)


@dataclasses.dataclass(frozen=True)
class Result:
  """What came out of a run. figures: of its result.json; {} where it diverged."""

  run: Run
  figures: Mapping[str, Any]

  @property
  def diverged(self) -> bool:
    return not self.figures


@dataclasses.dataclass(frozen=True)
class Study(abc.ABC):
  """A study is a frozen dataclass called `Study`, in a file of llm/studies. Its fields are its
  settings, with their bounds (config.key).

  title: of the report.
  """

  title: ClassVar[str]

  @abc.abstractmethod
  def next_runs(self, base: Config, done: Sequence[Result], folder: pathlib.Path) -> list[Run]:
    """All runs that are wanted, given those that are done; it is asked again until none is new.

    base: the config that the runs differ from. folder: of the study, for what a round leaves.
    """

  @abc.abstractmethod
  def report(self, done: Sequence[Result], folder: pathlib.Path) -> tuple[dict[str, Any], str]:
    """(figures for result.json, text for report.md). Draws its pictures into `folder`.

    Raises UserError where there are too few runs.
    """

  def quick(self) -> "Study":
    """The same study, smaller: for ten minutes."""
    return self


def names() -> list[str]:
  """The studies that there are: files of llm/studies with a `Study`."""
  modules = [module.name for module in pkgutil.iter_modules(llm.studies.__path__)]
  return [name for name in modules if hasattr(_module(name), "Study") and name != "frame"]


def _module(name: str) -> Any:
  return importlib.import_module(f"llm.studies.{name}")


def build(name: str, settings: Mapping[str, Any]) -> Study:
  """The study of a name. Raises UserError on an unknown name, key or value."""
  if name not in names():
    raise UserError(f"there is no study {name!r}: the studies are {', '.join(names())}")
  return config_lib.build(_module(name).Study, settings, "config.study")


def defaults(name: str) -> dict[str, Any]:
  """The settings of a study, for files in configs/."""
  return dataclasses.asdict(_module(name).Study())


def run(
  study: Study,
  base: Config,
  folder: pathlib.Path,
  part: tuple[int, int] = (0, 1),
  use_devices: Callable | None = None,
) -> dict[str, Any]:
  """Takes all runs of a study and writes its report. Returns the figures of result.json.

  part: (i, n), this process takes every n-th run from i on, and waits for the others. Raises
  UserError on bad input, and where the folder holds runs of another config.
  """
  started = time.time()
  trained = 0.0
  done: dict[str, Result] = {}
  while fresh := _fresh(study.next_runs(base, list(done.values()), folder), done):
    names = [*done, *(one_run.name for one_run in fresh)]
    progress = tqdm.tqdm(fresh[part[0] :: part[1]], desc="runs", unit="run", disable=None)
    for one_run in progress:
      is_new = not (folder / "runs" / one_run.name / "result.json").exists()
      result = _result(one_run, folder, use_devices)
      done[one_run.name] = result
      trained += is_new * result.figures.get("seconds", 0.0)
    for one_run in fresh:
      if one_run.name not in done:
        done[one_run.name] = _of_other_part(one_run, folder)
    done = {name: done[name] for name in names}  # in one order, whichever part this is
  figures = write_report(study, list(done.values()), folder)
  print(
    f"{len(done)} runs in {duration(time.time() - started)}, of which "
    f"{duration(trained)} in runs of this process; {folder / 'report.md'}"
  )
  return figures


def _fresh(wanted: Sequence[Run], done: Mapping[str, Result]) -> list[Run]:
  """The runs that are not done. Raises UserError where two have one name."""
  names = [one_run.name for one_run in wanted]
  if twice := sorted({name for name in names if names.count(name) > 1}):
    raise UserError(f"the study wants the run {twice[0]} twice: give each setting once")
  return [one_run for one_run in wanted if one_run.name not in done]


def _digest(config: Config) -> str:
  return cache.digest(json.dumps(config_lib.thaw(config), sort_keys=True))


def _result(one_run: Run, folder: pathlib.Path, use_devices: Callable | None) -> Result:
  """The result of a run, which is taken where it is not done."""
  workdir = folder / "runs" / one_run.name
  diverged = workdir / "diverged.txt"
  if diverged.exists() and diverged.read_text().startswith(_digest(one_run.config)):
    return Result(one_run, {})
  logs = folder / "logs"
  logs.mkdir(parents=True, exist_ok=True)
  try:
    # What the run says goes to a file: the console has the study's progress.
    with open(logs / f"{one_run.name}.txt", "a") as log, contextlib.redirect_stdout(log):
      figures = one_run.take(workdir, use_devices)
  except UserError as error:
    if "is not finite" not in str(error):
      raise UserError(f"run {one_run.name}: {error}")
    diverged.write_text(f"{_digest(one_run.config)}\n{first_line(error)}\n")
    return Result(one_run, {})
  return Result(one_run, figures)


def _of_other_part(one_run: Run, folder: pathlib.Path) -> Result:
  """The result of a run that another process takes, once it is there."""
  workdir = folder / "runs" / one_run.name
  print(f"waiting for the run {one_run.name}, which another part takes")
  while True:
    if (workdir / "diverged.txt").exists():
      return Result(one_run, {})
    try:
      figures = json.loads((workdir / "result.json").read_text())
      config = json.loads((workdir / "config.json").read_text())
    except (FileNotFoundError, ValueError):
      time.sleep(WAIT)
      continue
    if _digest(config_lib.freeze(config)) != _digest(one_run.config):
      raise UserError(f"{workdir} holds a run of another config: give another --workdir")
    return Result(one_run, figures)


def write_report(study: Study, done: Sequence[Result], folder: pathlib.Path) -> dict[str, Any]:
  """Writes report.md and result.json, which names every run behind the figures."""
  figures, text = study.report(done, folder)
  runs = [
    {
      "name": result.run.name,
      **result.run.facts,
      "diverged": result.diverged,
      "flops": result.figures.get("flops"),
      "seconds": result.figures.get("seconds"),
      "eval": result.figures.get("eval"),
    }
    for result in done
  ]
  diverged = [result.run.name for result in done if result.diverged]
  result = {"settings": dataclasses.asdict(study), **figures, "diverged": diverged, "runs": runs}
  (folder / "result.json").write_text(json.dumps(result, indent=1))
  parts = [f"# {study.title}\n", text]
  if diverged:
    parts.append(f"{len(diverged)} runs diverged and are left out: {', '.join(diverged)}.\n")
  if len(versions := _versions(folder)) > 1:
    parts.append(f"The runs were made by {len(versions)} versions: {', '.join(versions)}.\n")
  (folder / "report.md").write_text("\n".join(parts))
  return result


def _versions(folder: pathlib.Path) -> list[str]:
  """The source revisions that made the runs."""
  records = [json.loads(path.read_text()) for path in (folder / "runs").glob("*/run.json")]
  return sorted({record["revision"][:12] for record in records})
