"""Checks before JAX is imported: its version and the environment variables that it reads."""

import importlib.metadata
import importlib.util
import mmap
import os
import pathlib
import sys

# Of jaxlib: it holds the names of all flags of XLA.
XLA_LIBRARY = "libjax_common.so"

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
  return _fault_of_xla_flags(os.environ.get("XLA_FLAGS", "")) or _fault_of_jax_variables()


def _fault_of_xla_flags(text: str) -> str:
  """The first flag that XLA does not have: it would end the process without a word of Python's."""
  jaxlib = importlib.util.find_spec("jaxlib")
  library = pathlib.Path(str(jaxlib and jaxlib.origin)).parent / XLA_LIBRARY
  flags = text.split()
  if flags and not flags[0].startswith("--"):
    return "" if os.path.isfile(flags[0]) else f"XLA_FLAGS={text!r} must be flags, --NAME=VALUE"
  if not flags or not library.is_file():
    return ""
  with open(library, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as code:
    for flag in flags:
      name = flag.removeprefix("--").partition("=")[0]
      if code.find(name.encode()) < 0:
        return f"XLA_FLAGS: this jaxlib has no flag --{name}"
  return ""


def _fault_of_jax_variables() -> str:
  """What JAX says of a variable of its own that it does not understand."""
  if any(name.startswith("JAX_") for name in os.environ):
    try:
      import jax  # noqa: F401 (reads them)
    except ValueError as error:
      return f"JAX does not understand its environment: {error}"
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
