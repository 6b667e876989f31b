"""The metrics of a run's steps, and where its time went."""

import collections
import contextlib
import dataclasses
import math
import time
from typing import Any, Iterator

import jax

from llm.core import Diverged
from llm.runs import metrics as metrics_lib

# What a run can spend time on, besides training.
ACTIVITIES = ("start", "input", "writing", "compile", "evaluation", "checkpoint")


def _check_finite(history: list[dict], first_step: int):
  """Raises Diverged, naming the first step whose metrics are not finite."""
  for step, metrics in enumerate(history, first_step):
    for name, (value, _) in metrics.items():
      if not math.isfinite(value):
        raise Diverged(
          f"{name} is not finite at step {step + 1} (batch {step}); nothing was saved after it. "
          f"Look at it with `python -m llm.show batch --step={step} --config=...`; a lower "
          "optimizer.learning_rate or a longer warm-up may help"
        )


def _zeros() -> dict[str, float]:
  """Seconds by activity, 0 for each that has not happened."""
  return collections.defaultdict(float)


@dataclasses.dataclass
class Meter:
  """Collects the metrics and the time of the steps since the last log line.

  Metrics stay on the device until they are needed, so that no step waits for the one before.
  """

  # Steps whose metrics are known to be finite.
  checked_steps: int
  # Of each step since the last log line: tokens without padding, and FLOPs of the model.
  work: list[tuple[float, float]] = dataclasses.field(default_factory=list)
  on_device: list = dataclasses.field(default_factory=list)
  # Sums since the last log line. A run that goes on begins with those of its checkpoint.
  window: metrics_lib.Totals = dataclasses.field(default_factory=dict)
  # The means of the last log line.
  last: dict[str, float] = dataclasses.field(default_factory=dict)
  # Tokens and FLOPs a second, of each log line.
  paces: list[tuple[float, float]] = dataclasses.field(default_factory=list)
  # Of the whole run. A run that goes on begins with the tokens of its checkpoint.
  total_tokens: float = 0.0
  total_flops: float = 0.0
  # When the last log line was written.
  logged_at: float = dataclasses.field(default_factory=time.perf_counter)
  # Seconds by activity: since the last log line, and of the whole run.
  recent_seconds: dict[str, float] = dataclasses.field(default_factory=_zeros)
  total_seconds: dict[str, float] = dataclasses.field(default_factory=_zeros)

  def add(self, metrics: dict[str, Any], tokens: float, flops: float):
    """Takes the metrics and the work of one more step, without waiting for them."""
    self.on_device.append(metrics)
    self.work.append((tokens, flops))
    self.total_tokens += tokens
    self.total_flops += flops

  def settle(self, step: int):
    """Fetches the metrics of all steps up to `step`. Raises Diverged if one is not finite."""
    fetched = jax.device_get(self.on_device)
    self.on_device = []
    _check_finite(fetched, self.checked_steps)
    for metrics in fetched:
      metrics_lib.add(self.window, metrics)
    self.checked_steps = step

  def figures(self, step: int) -> dict[str, float]:
    """Mean metrics, tokens a second and the share of time spent on input, since the last call.

    Input and writing are part of the training that the tokens are counted over.
    """
    self.settle(step)
    elapsed = time.perf_counter() - self.logged_at
    input_seconds = self.recent_seconds.pop("input", 0.0)
    self.recent_seconds.pop("writing", 0.0)
    compiled = "compile" in self.recent_seconds
    training_seconds = elapsed - sum(self.recent_seconds.values())
    # The time of the first step is counted as compilation. So that step does not count, unless it
    # is the only one.
    if len(self.work) > compiled:
      counted, seconds = self.work[compiled:], training_seconds
    else:
      counted, seconds = self.work, elapsed
    tokens, flops = (sum(amounts) for amounts in zip(*counted))
    self.paces.append((tokens / seconds, flops / seconds))
    self.last = means = metrics_lib.means_of(self.window)
    self.window = {}
    self.work = []
    self.logged_at = time.perf_counter()
    self.recent_seconds.clear()
    return {
      **means,
      "tokens_per_second": tokens / seconds,
      "input_wait": input_seconds / training_seconds,
    }

  @contextlib.contextmanager
  def timed(self, activity: str) -> Iterator[None]:
    """Counts the time inside as that of one of ACTIVITIES."""
    start = time.perf_counter()
    yield
    seconds = time.perf_counter() - start
    self.recent_seconds[activity] += seconds
    self.total_seconds[activity] += seconds

  def shares(self, seconds: float) -> dict[str, float]:
    """The share of a run of so many seconds that each activity took; the rest is training."""
    shares = {activity: self.total_seconds[activity] / seconds for activity in ACTIVITIES}
    return {"training": 1 - sum(shares.values()), **shares}
