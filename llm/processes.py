"""How processes join to train together. The only file that needs private names of JAX."""

import contextlib
import functools
import os
import sys
import threading
from typing import Any, Iterator

import jax
from jax._src import distributed  # jax.distributed has no argument for how long its service waits

from llm.core import UserError, first_line

VARIABLES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
SERVICE = "get_distributed_runtime_service"


def join():
  """Joins this process to the others of its run. Call it before JAX is first used.

  VARIABLES say where the others are. If none is set, JAX asks the TPU pod or the Slurm job.
  PRETUNE_START_SECONDS (300) is how long the processes wait for each other at the start, and
  PRETUNE_HEARTBEAT_SECONDS (60) how long for one that falls silent. Raises UserError if they do not
  meet.
  """
  try:
    start_seconds = int(os.environ.get("PRETUNE_START_SECONDS", 300))
    heartbeat_seconds = int(os.environ.get("PRETUNE_HEARTBEAT_SECONDS", 60))
    with _meeting_within(start_seconds):
      jax.distributed.initialize(
        **_address(),
        initialization_timeout=start_seconds + 30,
        heartbeat_timeout_seconds=heartbeat_seconds,
      )
  except (RuntimeError, ValueError) as error:
    raise UserError(f"--distributed: the processes did not meet: {first_line(error)}")


def count() -> int:
  """The number of processes that train together. JAX need not be in use yet."""
  return distributed.global_state.num_processes or 1


def index() -> int:
  """The number of this process among those that train together. JAX need not be in use yet."""
  return distributed.global_state.process_id or 0


def _address() -> dict[str, Any]:
  """The arguments of jax.distributed.initialize that VARIABLES give; {} where none is set.

  Raises UserError if only some of them are set.
  """
  values = {name: os.environ.get(name, "") for name in VARIABLES}
  if not any(values.values()):
    return {}
  if missing := [name for name, value in values.items() if not value]:
    present = next(name for name, value in values.items() if value)
    raise UserError(
      f"--distributed: {missing[0]} is not set, though {present} is: set all three of "
      f"{', '.join(VARIABLES)}"
    )
  return {
    "coordinator_address": values["JAX_COORDINATOR_ADDRESS"],
    "num_processes": int(values["JAX_NUM_PROCESSES"]),
    "process_id": int(values["JAX_PROCESS_ID"]),
  }


@contextlib.contextmanager
def _meeting_within(seconds: int) -> Iterator[None]:
  """Makes JAX's service give up before the processes do.

  The service knows which processes are missing and names them, but it waits an hour by default.
  When it gives up, JAX kills all processes. A line of ours says why, one second before.
  """
  timer = threading.Timer(max(seconds - 1, 0), _print_timeout, (seconds,))
  timer.daemon = True
  timer.start()
  try:
    with _service_that_waits(seconds):
      yield
  finally:
    timer.cancel()


def _print_timeout(seconds: int):
  print(
    f"error: --distributed: not all processes came within {seconds} s (PRETUNE_START_SECONDS); "
    'JAX names the missing ones next, in the log of process 0 ("timed out task names"); if that '
    "log has no such line, process 0 itself is missing",
    file=sys.stderr,
    flush=True,
  )


@contextlib.contextmanager
def _service_that_waits(seconds: int) -> Iterator[None]:
  """In this context, JAX's service waits `seconds` for the processes.

  JAX has no public argument for it. Where a JAX has moved the private name, its default stays.
  """
  module: Any = getattr(distributed, "_jax", None)
  original = getattr(module, SERVICE, None)
  if original is None:
    yield
    return
  setattr(module, SERVICE, functools.partial(original, cluster_register_timeout=seconds))
  try:
    yield
  finally:
    setattr(module, SERVICE, original)
