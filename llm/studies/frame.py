"""A study: runs that differ in stated keys, then an analysis and a report.

Runs are ordinary workdirs of llm.train under runs/ of the study's folder, and what came out of each
is under results/. Those that are done are skipped and those that were cut off go on, so a study
that was killed gives the same report. The report can be made again without training.
"""

import abc
import collections
import contextlib
import dataclasses
import importlib
import io
import json
import pkgutil
import re
import time
from typing import Any, Callable, ClassVar, Iterator, Mapping, Sequence

from etils import epath

import llm.studies
from llm import config as config_lib
from llm import storage
from llm.config import Config, ModelConfig
from llm.core import UserError, first_line
from llm.runs import workdir as workdir_lib
from llm.runs.log import duration
from llm.training import loop

WAIT = 5.0  # seconds between looks at the runs of other parts
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
  """What came out of a run. figures: of its result.json, {} where it diverged.

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

  def evaluations(self, study: epath.Path) -> list[dict[str, float]]:
    """The figures of every evaluation of the run so far, each with its step."""
    lines = (self.run.folder(study) / "metrics.jsonl").read_text().splitlines()
    logged = [json.loads(line) for line in lines]
    last = self.run.until or float("inf")
    return [line for line in logged if line["split"] == "eval" and line["step"] <= last]


@dataclasses.dataclass(frozen=True)
class Study(abc.ABC):
  """A study is a frozen dataclass called `Study`, in a file of llm/studies. Its fields are its
  settings, with their bounds (config.key).

  title: of the report. counts_diverged: whether a run that diverged is a result like others.
  writes_files: whether its runs read files that it writes into its folder.
  """

  title: ClassVar[str]
  counts_diverged: ClassVar[bool] = False
  writes_files: ClassVar[bool] = False

  @abc.abstractmethod
  def next_runs(self, base: Config, done: Sequence[Result], folder: epath.Path) -> list[Run]:
    """All runs that are wanted, given those that are done; it is asked again until none is new.

    base: the config that the runs differ from. folder: of the study, for what a round leaves.
    """

  @abc.abstractmethod
  def report(self, done: Sequence[Result], folder: epath.Path) -> tuple[dict[str, Any], str]:
    """(figures for result.json, text for report.md). Draws its pictures into `folder`.

    Raises UserError where there are too few runs.
    """

  def quick(self) -> "Study":
    """The same study, smaller: for ten minutes."""
    return self


def sized(model: ModelConfig, size: str) -> ModelConfig:
  """The model with the layers and the width of LAYERSxWIDTH, and heads of 32 columns.

  Raises UserError where `size` is not of that form.
  """
  match = re.fullmatch("([1-9][0-9]*)x([1-9][0-9]*)", size)
  if not match:
    raise UserError(f"config.study.sizes: {size!r} is not LAYERSxWIDTH, e.g. 4x128")
  layers, width = int(match[1]), int(match[2])
  heads = max(1, width // 32)
  return dataclasses.replace(
    model, num_layers=layers, width=width, num_heads=heads, mlp_dim=4 * width
  )


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
  folder: epath.Path,
  part: tuple[int, int] = (0, 1),
  use_devices: Callable | None = None,
  leave_out_diverged: bool = False,
) -> dict[str, Any]:
  """Takes all runs of a study and writes its report. Returns the figures of result.json.

  part: (i, n), this process takes every n-th run from i on, and waits for the others. Raises
  UserError on bad input, where the folder holds runs of another config, and where a run diverged,
  unless those are to be left out.
  """
  done: dict[str, Result] = {}
  while fresh := _fresh(study.next_runs(base, list(done.values()), folder), done):
    for one_run in fresh:
      _check_folder(one_run, folder)
    mine = fresh[part[0] :: part[1]]
    taken = _take(mine, folder, use_devices)
    others = [one_run for one_run in fresh if one_run.name not in taken]
    taken |= {one_run.name: _of_other_part(one_run, folder) for one_run in others}
    done |= {one_run.name: taken[one_run.name] for one_run in fresh}
    if not (study.counts_diverged or leave_out_diverged):
      _check_finite(list(done.values()))
  return write_report(study, list(done.values()), folder)


def _fresh(wanted: Sequence[Run], done: Mapping[str, Result]) -> list[Run]:
  """The runs that are not done. Raises UserError where two have one name."""
  counts = collections.Counter(one_run.name for one_run in wanted)
  if twice := sorted(name for name, count in counts.items() if count > 1):
    raise UserError(f"the study wants the run {twice[0]} twice: give each setting once")
  return [one_run for one_run in wanted if one_run.name not in done]


def _check_folder(one_run: Run, folder: epath.Path):
  """Raises UserError where the workdir of a run holds a run of another config."""
  workdir = one_run.folder(folder)
  path = workdir / "config.json"
  if not path.exists():
    return
  try:
    old = json.loads(path.read_text())
    changed = workdir_lib.differences(old, config_lib.thaw(one_run.config), OF_THE_MACHINE)
  except ValueError:
    raise UserError(f"{path} is damaged: remove {workdir}, and the run is taken again")
  if changed:
    raise UserError(
      f"{workdir} holds a run of another config ({'; '.join(changed[:4])}): give another --workdir"
    )


def _check_finite(done: Sequence[Result]):
  """Raises UserError where a run diverged."""
  if diverged := [result for result in done if result.diverged]:
    names = ", ".join(result.run.name for result in diverged)
    raise UserError(
      f"{len(diverged)} of {len(done)} runs diverged ({names}: "
      f"{diverged[0].error.partition(';')[0]}): lower their learning rate, or give "
      "--leave_out_diverged for a report without them"
    )


def _take(runs: Sequence[Run], folder: epath.Path, use_devices: Callable | None):
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
        f"{', diverged' * result.diverged}; about {duration(seconds / cost * left)} left",
        flush=True,
      )
    results[one_run.name] = result
  return results


def _taken(one_run: Run, folder: epath.Path, use_devices: Callable | None) -> Result:
  """The result of a run, which is taken, and saved."""
  workdir = one_run.folder(folder)
  started_at = time.time()
  figures: Mapping[str, Any] = {}
  diverged = ""
  try:
    with _logged(folder / "logs" / f"{one_run.name}.txt"):
      figures = one_run.take(workdir, use_devices)
  except UserError as error:
    if "is not finite" not in str(error):
      raise UserError(f"run {one_run.name}: {first_line(error)}")
    diverged = first_line(error)
  record = workdir / "run.json"
  revision = json.loads(record.read_text())["revision"][:12] if record.exists() else "unknown"
  saved: dict[str, Any] = {
    "figures": figures,
    "error": diverged,
    "wall": time.time() - started_at,
    "revision": revision,
  }
  path = _path(one_run, folder)
  path.parent.mkdir(exist_ok=True)
  workdir_lib.write_json(path, saved)
  return Result(one_run, **saved)


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


def _path(one_run: Run, folder: epath.Path) -> epath.Path:
  return folder / "results" / f"{one_run.name}.json"


def _saved(one_run: Run, folder: epath.Path) -> Result | None:
  """The result of a run that is done, else None."""
  path = _path(one_run, folder)
  return Result(one_run, **json.loads(path.read_text())) if path.exists() else None


def _of_other_part(one_run: Run, folder: epath.Path) -> Result:
  """The result of a run that another process takes, once it is there."""
  result = _saved(one_run, folder)
  if result is None:
    print(f"waiting for the run {one_run.name}, which another part takes", flush=True)
  while result is None:
    time.sleep(WAIT)
    result = _saved(one_run, folder)
  _check_folder(one_run, folder)
  return result


def write_report(study: Study, done: Sequence[Result], folder: epath.Path) -> dict[str, Any]:
  """Writes report.md and result.json, which names every run behind the figures."""
  figures, text = study.report(done, folder)
  runs = [
    {
      "name": result.run.name,
      **result.run.facts,
      "diverged": result.diverged,
      "flops": result.figures.get("flops"),
      "seconds": result.wall,
      "eval": result.figures.get("eval"),
      "revision": result.revision,
    }
    for result in done
  ]
  diverged = [result.run.name for result in done if result.diverged]
  clock = wall_clock(done)
  result = {
    "settings": dataclasses.asdict(study),
    **figures,
    "diverged": diverged,
    "wall_clock": clock,
    "runs": runs,
  }
  (folder / "result.json").write_text(json.dumps(result, indent=1))
  parts = [f"# {study.title}\n", text, *_remarks(done, study.counts_diverged)]
  parts.append(
    f"{len(done)} runs, {clock['runs_an_hour']:,.0f} an hour; {clock['training']:.0%} of the wall "
    f"clock, {duration(clock['seconds'])}, was training.\n"
  )
  (folder / "report.md").write_text("\n".join(parts))
  print(f"{parts[-1].strip()} {folder / 'report.md'}")
  return result


def wall_clock(done: Sequence[Result]) -> dict[str, float]:
  """Seconds of all runs, runs an hour, and the share of the time that was training.

  Not training are the start, compilation, the wait for input, evaluation and checkpoints.
  """
  seconds = sum(result.wall for result in done)
  training = 0.0
  for result in done:
    share = result.figures.get("shares", {}).get("training", 0.0)
    # A run that went on counts all its seconds; here are those of one call.
    training += share * min(result.figures.get("seconds", 0.0), result.wall)
  an_hour = 3600 * len(done) / seconds if seconds else 0.0
  share = training / seconds if seconds else 0.0
  return {"seconds": seconds, "runs_an_hour": an_hour, "training": share}


def _remarks(done: Sequence[Result], counts_diverged: bool) -> list[str]:
  """What a reader must know of the runs: those that diverged, and more versions than one."""
  remarks = []
  diverged = [result.run.name for result in done if result.diverged]
  if diverged:
    how = "count as the worst" if counts_diverged else "are left out"
    remarks.append(f"**{len(diverged)} runs diverged and {how}: {', '.join(diverged)}.**\n")
  versions = collections.Counter(result.revision for result in done)
  if len(versions) > 1:
    counts = ", ".join(f"{count} by {version}" for version, count in versions.most_common())
    remarks.append(
      f"**The runs were made by {len(versions)} versions of the source ({counts}): what differs "
      "between them may differ for that reason.**\n"
    )
  return remarks
