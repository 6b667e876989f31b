"""What must be right before JAX is imported: its version and the variables that it reads."""

import importlib.metadata
import os
import sys

# jaxlib -> what it does wrong on CPU. `pyproject.toml` excludes these versions too.
WRONG_NUMBERS = {"0.10.2": "sums over more than 32,768 rows are wrong (jax issue 39103)"}


def fault() -> str:
  """What is wrong with this environment, in one line; empty where nothing is."""
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


def prepare():
  """Called when `llm` is imported. Where the environment is at fault, a command (`python -m llm.X`)
  ends with one line and status 2, and any other import raises ImportError.

  Silences jaxlib 0.10's loader of compiled programs, which takes tuning hints for missing CPU
  features. Several processes keep its log: it names those that are lost.
  """
  if reason := fault():
    if sys.argv[:1] != ["-m"]:  # Python sets this while it imports the package of a command
      raise ImportError(reason)
    print(f"error: {reason}", file=sys.stderr)
    sys.exit(2)
  noisy = importlib.metadata.version("jaxlib").startswith("0.10.")
  if noisy and not any(argument.startswith("--distributed") for argument in sys.argv):
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
