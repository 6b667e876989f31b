"""Checks before JAX is imported: its version and the environment variables that it reads."""

import importlib.metadata
import os
import sys

# Version of jaxlib -> its fault on CPU. `pyproject.toml` excludes these versions too.
WRONG_NUMBERS = {"0.10.2": "sums over more than 32,768 rows are wrong (jax issue 39103)"}


def fault() -> str:
  """The fault of this environment, in one line; empty where there is none."""
  version = importlib.metadata.version("jaxlib")
  if version in WRONG_NUMBERS:
    return (
      f"jaxlib {version} computes wrong numbers on CPU: {WRONG_NUMBERS[version]}. "
      f"Install another: pip install 'jax>=0.10,!={version}' 'jaxlib!={version}'"
    )
  devices = os.environ.get("JAX_NUM_CPU_DEVICES", "")
  if devices and not (devices.isdigit() and 1 <= int(devices) <= 1024):
    return f"JAX_NUM_CPU_DEVICES={devices!r} must be a number from 1 to 1024"
  return ""


def prepare() -> None:
  """Checks the environment and quiets JAX's log. `llm` calls this when it is imported.

  Where the environment has a fault, a command (`python -m llm.X`) prints one line and exits with
  status 2. Any other import raises ImportError.
  """
  if reason := fault():
    # While Python imports the package of a command, sys.argv begins with "-m".
    if sys.argv[:1] != ["-m"]:
      raise ImportError(reason)
    print(f"error: {reason}", file=sys.stderr)
    sys.exit(2)
  _quiet_the_log()


def _quiet_the_log() -> None:
  """Silences false alarms of jaxlib 0.10, in runs of one process.

  Its loader of compiled programs mistakes tuning hints for missing CPU features. A run of several
  processes keeps the log, because it names the processes that are lost.
  """
  false_alarms = importlib.metadata.version("jaxlib").startswith("0.10.")
  distributed = any(argument.startswith("--distributed") for argument in sys.argv)
  if false_alarms and not distributed:
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
