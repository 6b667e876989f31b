"""A study: runs that differ in stated keys, then an analysis and a report.

Runs that are done are skipped and those that were cut off go on (studies/runs.py), so a study that
was killed gives the same report. The report can be made again without training.
"""

import abc
import collections
import dataclasses
import importlib
import pkgutil
import re
from typing import Any, Callable, ClassVar, Mapping, Sequence

from etils import epath

import llm.studies
from llm import config as config_lib
from llm.config import Config, ModelConfig
from llm.core import UserError
from llm.runs import workdir as workdir_lib
from llm.runs.log import duration
from llm.studies import runs as runs_lib
from llm.studies.runs import Result, Run


@dataclasses.dataclass(frozen=True)
class Study(abc.ABC):
  """A study is a frozen dataclass called `Study`, in a file of llm/studies. Its fields are its
  settings, with their bounds (config.key).

  title: of the report. diverged_are: how runs that diverged count; "" ends the study at one.
  writes_files: whether its runs read files that it writes into its folder.
  """

  title: ClassVar[str]
  diverged_are: ClassVar[str] = ""
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
      runs_lib.check_folder(one_run, folder)
    taken = runs_lib.take(fresh[part[0] :: part[1]], folder, use_devices)
    others = [one_run for one_run in fresh if one_run.name not in taken]
    taken |= {one_run.name: runs_lib.of_other_part(one_run, folder) for one_run in others}
    done |= {one_run.name: taken[one_run.name] for one_run in fresh}
    if not (study.diverged_are or leave_out_diverged):
      _check_finite(list(done.values()))
  return write_report(study, list(done.values()), folder)


def _fresh(wanted: Sequence[Run], done: Mapping[str, Result]) -> list[Run]:
  """The runs that are not done. Raises UserError where two have one name."""
  counts = collections.Counter(one_run.name for one_run in wanted)
  if twice := sorted(name for name, count in counts.items() if count > 1):
    raise UserError(f"the study wants the run {twice[0]} twice: give each setting once")
  return [one_run for one_run in wanted if one_run.name not in done]


def _check_finite(done: Sequence[Result]):
  """Raises UserError where a run diverged."""
  if diverged := [result for result in done if result.diverged]:
    names = ", ".join(result.run.name for result in diverged)
    raise UserError(
      f"{len(diverged)} of {len(done)} runs diverged ({names}: "
      f"{diverged[0].error.partition(';')[0]}): lower their learning rate, or give "
      "--leave_out_diverged for a report without them"
    )


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
  workdir_lib.write_json(folder / "result.json", result)
  parts = [f"# {study.title}\n", text, *_remarks(done, study.diverged_are or "left out")]
  pace = f"{len(done)} runs, {clock['runs_an_hour']:,.0f} an hour, {duration(clock['seconds'])}"
  if clock["training"] is not None:
    pace += f"; {clock['training']:.0%} of the time of the runs of llm.train was training"
  parts.append(f"{pace}.\n")
  (folder / "report.md").write_text("\n".join(parts))
  print(f"{parts[-1].strip()} {folder / 'report.md'}")
  return result


def wall_clock(done: Sequence[Result]) -> dict[str, Any]:
  """Seconds of all runs, runs an hour, and the share of training in the runs of llm.train.

  The share is None where there is none of these. Not training are the start, compilation, the wait
  for input, evaluation and checkpoints.
  """
  seconds = sum(result.wall for result in done)
  measured = [result for result in done if "shares" in result.figures]
  training = 0.0
  for result in measured:
    # A run that went on counts all its seconds; those of a rung are of one call.
    of_call = min(result.figures["seconds"], result.wall)
    training += result.figures["shares"]["training"] * of_call
  an_hour = 3600 * len(done) / seconds if seconds else 0.0
  share = training / sum(result.wall for result in measured) if measured else None
  return {"seconds": seconds, "runs_an_hour": an_hour, "training": share}


def _remarks(done: Sequence[Result], diverged_are: str) -> list[str]:
  """What a reader must know of the runs: those that diverged, and more versions than one."""
  remarks = []
  diverged = [result.run.name for result in done if result.diverged]
  if diverged:
    remarks.append(
      f"**{len(diverged)} runs diverged and are {diverged_are}: {', '.join(diverged)}.**\n"
    )
  versions = collections.Counter(result.revision for result in done)
  if len(versions) > 1:
    counts = ", ".join(f"{count} by {version}" for version, count in versions.most_common())
    remarks.append(
      f"**The runs were made by {len(versions)} versions of the source ({counts}): what differs "
      "between them may differ for that reason.**\n"
    )
  return remarks
