"""Run a study: many runs, an analysis and a report.

python -m llm.study NAME --workdir=DIR [--config=configs/study_NAME.py] [--quick] [--part=i/n]

A study that was stopped goes on. With --part, n processes share the runs of one folder.
"""

import pathlib
import re
import sys

from absl import flags

from llm import command, config_file, storage
from llm import config as config_lib
from llm.core import UserError
from llm.studies import frame

_WORKDIR = flags.DEFINE_string("workdir", None, "The folder of the study and of its runs.")
_QUICK = flags.DEFINE_bool("quick", False, "Less of everything.")
_PART = flags.DEFINE_string("part", "1/1", "i/n: this process takes the i-th of n shares.")
_LEAVE_OUT = flags.DEFINE_bool("leave_out_diverged", False, "Report without runs that diverged.")
_CONFIG = config_file.define("configs/study_*.py")

CONFIGS = pathlib.Path(__file__).resolve().parents[1] / "configs"


def build(name: str) -> tuple[frame.Study, config_lib.Config]:
  """The study of a name and the config of its runs. Raises UserError where there is none."""
  config = _CONFIG.value
  if config is None or not {"study", "run"} <= set(config):
    frame.build(name, {})  # an unknown study is said first
    raise UserError(f"--config must be a config of a study, e.g. configs/study_{name}.py")
  return frame.build(name, config.study.to_dict()), config_lib.freeze(config.run)


def check_key(key: str):
  """Raises UserError if no study has `key`. The keys of the study are checked when it is built."""
  group, _, rest = key.partition(".")
  if group not in ("study", "run"):
    raise config_lib.unknown_key("config", group, ("study", "run"))
  if group == "run" and rest:
    command.check_key_of_run(rest)


def run_study(name: str):
  """Runs the study of a name."""
  study, base = build(name)
  if not _WORKDIR.value:
    raise UserError("--workdir is missing: the folder of the study")
  if storage.is_bucket(_WORKDIR.value) and study.writes_files:
    raise UserError(
      f"--workdir={_WORKDIR.value}: the runs of {name} read files that the study writes, and no "
      "source reads a bucket's: give a local or a shared folder"
    )
  if _QUICK.value:
    study = study.quick()
  folder = storage.folder(_WORKDIR.value)
  folder.mkdir(parents=True, exist_ok=True)
  frame.run(study, base, folder, _part(), command.start_cpu, _LEAVE_OUT.value)


def _part() -> tuple[int, int]:
  """--part=i/n as (i - 1, n)."""
  match = re.fullmatch(r"([0-9]+)/([0-9]+)", _PART.value)
  if not match or not 1 <= int(match[1]) <= int(match[2]):
    raise UserError(f"--part={_PART.value}: expected i/n with i from 1 to n, e.g. 2/8")
  return int(match[1]) - 1, int(match[2])


def with_config(argv: list[str]) -> list[str]:
  """The command line with the config of its study, where it names none."""
  if any(argument.startswith(("--config=", "-config=")) for argument in argv):
    return argv
  path = CONFIGS / f"study_{argv[1]}.py" if len(argv) > 1 else CONFIGS
  return [*argv[:2], f"--config={path}", *argv[2:]] if path.is_file() else argv


def main(argv: list[str]):
  """Runs `python -m llm.study NAME --flags`."""
  argv = with_config(list(argv))
  name = ""
  if len(argv) > 1 and not argv[1].startswith("-"):
    name = argv.pop(1)  # absl must not see it
  command.run(lambda: run_study(name), argv, check_key)


if __name__ == "__main__":
  main(sys.argv)
