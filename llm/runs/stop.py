"""Signals: a run that is told to stop saves first, on all processes at the same step."""

import contextlib
import dataclasses
import os
import signal
import sys
from typing import Iterator

import jax
from jax.experimental import multihost_utils


class Stopped(SystemExit):
  """A signal stopped the run, which has saved."""


@dataclasses.dataclass
class Stop:
  """Set by SIGINT and SIGTERM, polled between steps and between the batches of an evaluation.

  In a run of several processes, SIGTERM to one of them stops all: JAX catches it, and the
  processes agree on the poll at which they stop. SIGINT ends such a process at once, so
  launch/local.sh sends SIGTERM in its place.
  """

  signal: int = 0
  polls: int = 0

  def requested(self) -> int:
    """The number of the signal, 0 if there was none. All processes must poll equally often."""
    if jax.distributed.is_initialized():
      self.polls += 1
      if not self.signal and multihost_utils.reached_preemption_sync_point(self.polls):
        self.signal = signal.SIGTERM
    return self.signal

  @contextlib.contextmanager
  def listening(self) -> Iterator[None]:
    """Catches the signals. A second one ends the process at once."""
    if jax.distributed.is_initialized():
      yield
      return
    try:
      previous = {
        number: signal.signal(number, self._catch) for number in (signal.SIGINT, signal.SIGTERM)
      }
    except ValueError:  # only the main thread may catch signals
      previous = {}
    try:
      yield
    finally:
      for number, handler in previous.items():
        signal.signal(number, handler)

  def _catch(self, number: int, frame: object):
    name = signal.Signals(number).name
    if self.signal:
      # An exception could wait for ever in what it interrupts: checkpoints are whole or not there.
      os.write(
        sys.stderr.fileno(), f"\n{name} again: ended at once, nothing more is saved\n".encode()
      )
      os._exit(128 + number)
    self.signal = number
    print(f"\n{name}: saving, then stopping ...", file=sys.stderr, flush=True)
