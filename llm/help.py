"""What --help prints, and what an unknown flag is answered with."""

import sys
from types import ModuleType
from typing import Sequence

from absl import flags

from llm import config as config_lib
from llm.core import UserError

FLAGS = ("--help", "-help", "-h")

# What users of other codebases type, and what it is called here.
ELSEWHERE = {
  "output_dir": "--workdir",
  "out_dir": "--workdir",
  "checkpoint_dir": "--workdir",
  "model_name_or_path": "--config.transfer.checkpoint",
  "train_file": "--config.data.train",
  "validation_file": "--config.data.eval",
  "eval_file": "--config.data.eval",
}


def is_asked(argv: Sequence[str]) -> bool:
  """Whether a command line asks for help."""
  return any(argument in FLAGS for argument in argv[1:])


def text(shared: ModuleType) -> str:
  """What the command is for, with examples, its own flags and those that every command has.

  shared: the module that defines the latter.
  """
  parts = [(sys.modules["__main__"].__doc__ or "").strip(), "", "Flags:"]
  own = list(flags.FLAGS.get_key_flags_for_module(sys.argv[0]))
  if "config" in flags.FLAGS and flags.FLAGS["config"] not in own:  # that of llm.train
    own.append(flags.FLAGS["config"])
  parts += map(_line, own)
  parts += ["", "Flags of every command:"]
  parts += map(_line, flags.FLAGS.get_key_flags_for_module(shared))
  return "\n".join([*parts, "  --help, -h: Show this."])


def _line(flag: flags.Flag) -> str:
  """A flag, what it is for and its default."""
  name = f"[no]{flag.name}" if flag.boolean else flag.name
  default = "none" if flag.default in (None, "", []) else flag.default
  line = f"  --{name}: {flag.help} (default: {default})"
  if flag.name == "config":
    line += "\n  --config.GROUP.KEY: Sets a key of the config (docs/runs.md; llm/config.py)."
  return line


def unknown_flag(error: flags.UnrecognizedFlagError) -> UserError:
  """The error for a flag that does not exist, with what it is called here."""
  name = error.flagname
  has_config = "config" in flags.FLAGS
  ours = ELSEWHERE.get(name, "")
  if not ours and has_config and (key := config_lib.place_of(name)):
    ours = f"--config.{key}"
  if ours and (has_config or ours[2:] in flags.FLAGS):
    return UserError(f"unknown flag --{name}: here it is {ours}")
  return UserError(f"unknown flag --{name}{_nearest(error)}; --help lists the flags")


def _nearest(error: flags.UnrecognizedFlagError) -> str:
  """absl's guess of what was meant, as the end of a sentence; "" where it has none."""
  _, meant, guess = str(error).partition("Did you mean: ")
  return f": did you mean --{guess.rstrip(' ?')}?" if meant else ""
