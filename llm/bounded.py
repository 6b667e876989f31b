"""A function in a process of its own, with bounds: what hangs or explodes costs only itself.

`Worker` starts `python -m llm.bounded MODULE:FUNCTION`, sends it one argument a line in JSON and
reads one answer a line. The process imports no more than the module of the function, so it starts
in a tenth of a second where that is light. It ends with the one that started it.
"""

import contextlib
import importlib
import json
import os
import resource
import select
import signal
import subprocess
import sys
import threading
import time
import weakref
from typing import Any

# Seconds until the process has imported its function.
START = 60.0

# What became of a call, where the function gave no value.
TOOK_TOO_LONG = "took_too_long"
OUT_OF_MEMORY = "out_of_memory"
NESTED_TOO_DEEP = "nested_too_deep"
CRASHED = "crashed"


class Failed(Exception):
  """A bounded call gave no value. reason: one of the constants, or what the function raised."""

  def __init__(self, reason: str, message: str = ""):
    super().__init__(message or reason.replace("_", " "))
    self.reason = reason


class Worker:
  """A function of one argument, called in a process of its own.

  function: "MODULE:NAME"; the argument and the value are what JSON holds. seconds, megabytes: what
  one call may take. The process starts with the first call, and anew after a call that ended it.
  Threads take turns, as those of a server must: there is one process.
  """

  def __init__(self, function: str, seconds: float, megabytes: int):
    self.function = function
    self.seconds = seconds
    self.megabytes = megabytes
    self._process: subprocess.Popen | None = None
    self._turn = threading.Lock()

  def __call__(self, argument: Any) -> Any:
    """The value of the function. Raises Failed where there is none."""
    with self._turn:
      answer = self._answer(argument)
    if "failed" in answer:
      raise Failed(answer["failed"], answer["message"])
    return answer["value"]

  def _answer(self, argument: Any) -> dict[str, Any]:
    """What the process says of an argument. Raises Failed where it says nothing."""
    process = self._started()
    try:
      _write_line(process, argument, time.monotonic() + self.seconds)
      return _read_line(process, time.monotonic() + self.seconds)
    except TimeoutError:
      self.close()
      raise Failed(TOOK_TOO_LONG, f"it took more than {self.seconds:g} s")
    except (EOFError, OSError, ValueError):
      self.close()
      raise Failed(CRASHED, "it ended the process that tried it")

  def close(self) -> None:
    """Ends the process."""
    if self._process:
      _end(self._process)
      self._process = None

  def _started(self) -> subprocess.Popen:
    if self._process is None:
      command = [sys.executable, "-m", "llm.bounded", self.function]
      command += [str(self.seconds), str(self.megabytes)]
      # Without those of JAX, which it need not import.
      variables = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_", "XLA_"))}
      process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=variables
      )
      weakref.finalize(self, _end, process)
      try:
        _read_line(process, time.monotonic() + START)
      except (TimeoutError, EOFError, OSError, ValueError):
        _end(process)
        raise RuntimeError(f"{' '.join(command)} did not start")
      self._process = process
    return self._process


def _end(process: subprocess.Popen) -> None:
  process.kill()
  process.wait()
  for pipe in (process.stdin, process.stdout):
    if pipe:
      with contextlib.suppress(OSError):  # bytes that were not sent
        pipe.close()


def _write_line(process: subprocess.Popen, value: Any, deadline: float) -> None:
  """Sends a value. Raises TimeoutError where the process does not take it in time."""
  assert process.stdin
  pipe = process.stdin.fileno()
  os.set_blocking(pipe, False)
  left = memoryview(json.dumps(value).encode() + b"\n")
  while left:
    if not select.select([], [pipe], [], max(deadline - time.monotonic(), 0))[1]:
      raise TimeoutError
    left = left[os.write(pipe, left) :]


def _read_line(process: subprocess.Popen, deadline: float) -> Any:
  """The next value that the process sends. Raises TimeoutError, and EOFError where it has ended."""
  assert process.stdout
  pipe = process.stdout.fileno()
  parts = []
  while not parts or not parts[-1].endswith(b"\n"):
    if not select.select([pipe], [], [], max(deadline - time.monotonic(), 0))[0]:
      raise TimeoutError
    parts.append(os.read(pipe, 2**20))
    if not parts[-1]:
      raise EOFError
  return json.loads(b"".join(parts))


def limit_memory(megabytes: int) -> None:
  """Lets this process take so much more address space than it has now."""
  if sys.platform != "linux":  # others do not keep the limit
    return
  with open("/proc/self/statm") as file:
    now = int(file.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
  limit = now + megabytes * 2**20
  resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def _called(function: Any, argument: Any) -> dict[str, Any]:
  """What the process answers."""
  try:
    return {"value": function(argument)}
  except MemoryError:
    return {"failed": OUT_OF_MEMORY, "message": "it ran out of the memory that it may take"}
  except RecursionError:
    return {"failed": NESTED_TOO_DEEP, "message": "it is nested too deep"}
  except Exception as error:  # hostile input may raise anything: the caller is told
    lines = str(error).strip().splitlines() or [""]
    message = f"{type(error).__name__}: {lines[0][:300]}"
    return {"failed": f"failed ({type(error).__name__})", "message": message}


def serve(name: str, seconds: float, megabytes: int) -> None:
  """Answers calls of a function from standard input until it ends."""
  for number in (signal.SIGINT, signal.SIGTERM):  # meant for the run, which ends this process
    signal.signal(number, signal.SIG_IGN)
  answers = os.fdopen(os.dup(1), "wb")
  module, _, attribute = name.partition(":")
  function = getattr(importlib.import_module(module), attribute)
  nowhere = os.open(os.devnull, os.O_WRONLY)
  os.dup2(nowhere, 1)  # what the function prints must not look like an answer
  os.dup2(nowhere, 2)  # a library may print pages before it ends the process
  limit_memory(megabytes)
  answers.write(b'"ready"\n')
  answers.flush()
  for line in sys.stdin.buffer:
    signal.setitimer(signal.ITIMER_REAL, seconds + 5)  # ends the process if nobody else does
    answer = _called(function, json.loads(line))
    signal.setitimer(signal.ITIMER_REAL, 0)
    try:
      sent = json.dumps(answer).encode()
    except MemoryError:
      sent = json.dumps(_called(_too_large, None)).encode()
    answers.write(sent + b"\n")
    answers.flush()


def _too_large(_: None) -> None:
  raise MemoryError


if __name__ == "__main__":
  serve(sys.argv[1], float(sys.argv[2]), int(sys.argv[3]))
