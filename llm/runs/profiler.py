"""A profile of some steps of a run."""

import contextlib
import pathlib
from typing import Any, Callable, Iterator

import jax

from llm.core import UserError


@contextlib.contextmanager
def profiling(steps: str, folder: pathlib.Path) -> Iterator[Callable[[int, Any], None]]:
  """Yields a function (step, state) to call before every step. It starts and stops the profile.

  steps: which steps to profile, e.g. "10:15" for 10 to 14; "" for none. The profile is written to
  folder/profile. Raises UserError where `steps` is not of that form.
  """
  first, last = _step_range(steps)
  running = False

  def before_step(step: int, state: Any):
    nonlocal running
    if step == first:
      jax.profiler.start_trace(str(folder / "profile"))
      running = True
    elif running and step == last:
      jax.block_until_ready(state)
      jax.profiler.stop_trace()
      running = False

  try:
    yield before_step
  finally:
    if running:
      jax.profiler.stop_trace()


def _step_range(text: str) -> tuple[int, int]:
  if not text:
    return -1, -1
  first, _, last = text.partition(":")
  if not (first.isdigit() and last.isdigit() and int(first) < int(last)):
    raise UserError(f"config.training.profile={text!r} is not of the form '10:15'")
  return int(first), int(last)
