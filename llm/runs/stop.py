"""Signals: a run that is asked to stop saves first, on all processes at one step."""

import contextlib
import dataclasses
import signal
import sys

import jax
from jax.experimental import multihost_utils


class Stopped(SystemExit):
  """A signal asked the run to stop; it has saved."""


@dataclasses.dataclass
class Stop:
  """Set by SIGINT and SIGTERM, polled between steps and between the batches of an evaluation.

  Of many processes, one that gets SIGTERM has all stop at the same poll: JAX listens, and they agree. SIGINT ends such a
  process at once; launch/local.sh sends SIGTERM for it.
  """

  signal: int = 0
  polls: int = 0

  def asked(self) -> int:
    """The signal, 0 if there was none. Every process must poll equally often."""
    if jax.distributed.is_initialized():
      self.polls += 1
      if not self.signal and multihost_utils.reached_preemption_sync_point(self.polls):
        self.signal = signal.SIGTERM
    return self.signal

  @contextlib.contextmanager
  def listening(self):
    """Catches the signals; a second one ends the process at once."""

    def catch(number, frame):
      if self.signal:
        raise KeyboardInterrupt
      self.signal = number
      print(
        f"\n{signal.Signals(number).name}: saving, then stopping ...", file=sys.stderr, flush=True
      )

    if jax.distributed.is_initialized():
      yield
      return
    try:
      old = {n: signal.signal(n, catch) for n in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not the main thread: signals are somebody else's
      old = {}
    try:
      yield
    finally:
      for number, handler in old.items():
        signal.signal(number, handler)
