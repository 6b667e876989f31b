"""How one process becomes one of many. The only file that needs private names of JAX."""

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
  """Makes this process one of many; must come before JAX is first used.

  The others are found by VARIABLES where they are set, else by the TPU pod or the Slurm job.
  PRETUNE_START_SECONDS (300) and PRETUNE_HEARTBEAT_SECONDS (60) say how long they are waited for.
  Raises UserError.
  """
  try:
    start = int(os.environ.get("PRETUNE_START_SECONDS", 300))
    heartbeat = int(os.environ.get("PRETUNE_HEARTBEAT_SECONDS", 60))
    with _meeting_within(start):
      jax.distributed.initialize(
        **_address(), initialization_timeout=start + 30, heartbeat_timeout_seconds=heartbeat
      )
  except (RuntimeError, ValueError) as error:
    raise UserError(f"--distributed: the processes did not meet: {first_line(error)}")


def count() -> int:
  """Processes that share a mesh. JAX need not run yet."""
  return distributed.global_state.num_processes or 1


def _address() -> dict[str, Any]:
  """Coordinator, number of processes and number of this one, where the variables say so."""
  values = {name: os.environ.get(name, "") for name in VARIABLES}
  if not any(values.values()):
    return {}
  if missing := [name for name, value in values.items() if not value]:
    given = next(name for name, value in values.items() if value)
    raise UserError(
      f"--distributed: {missing[0]} is not set, though {given} is: set all three of "
      f"{', '.join(VARIABLES)}"
    )
  coordinator, processes, number = values.values()
  return {
    "coordinator_address": coordinator,
    "num_processes": int(processes),
    "process_id": int(number),
  }


@contextlib.contextmanager
def _meeting_within(seconds: int) -> Iterator[None]:
  """Has JAX's service give up before the processes do.

  The service knows which of them is missing and names it, but waits for an hour by default. JAX then
  ends all processes by force: a line of ours says before what happened.
  """
  late = threading.Timer(max(seconds - 1, 0), _say_late, (seconds,))
  late.daemon = True
  late.start()
  try:
    with _service_that_waits(seconds):
      yield
  finally:
    late.cancel()


def _say_late(seconds: int):
  print(
    f"error: --distributed: not all processes came within {seconds} s (PRETUNE_START_SECONDS); "
    'those that JAX names next as "timed out task names", in the log of process 0, are missing; if '
    "it has none, 0 itself is",
    file=sys.stderr,
    flush=True,
  )


@contextlib.contextmanager
def _service_that_waits(seconds: int) -> Iterator[None]:
  """JAX makes its service with another time-out in here; nothing changes where the name has moved."""
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
