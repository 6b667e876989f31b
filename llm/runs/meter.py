"""What the steps of a run gave, and where its time went."""

import collections
import contextlib
import dataclasses
import math
import time

import jax

from llm.core import UserError
from llm.runs import metrics as metrics_lib


def _check_finite(history: list[dict], first: int):
  """Raises UserError naming the first step whose metrics are not finite."""
  for number, found in enumerate(history, first):
    bad = [name for name, (value, _) in found.items() if not math.isfinite(value)]
    if bad:
      raise UserError(
        f"{bad[0]} is not finite at step {number + 1} (batch {number}); nothing was saved after it. Look at "
        f"it with `python -m llm.show batch --step={number} --config=...`; a lower optimizer.learning_rate "
        "or a longer warm-up may help"
      )


@dataclasses.dataclass
class Meter:
  """What the steps since the last log line were: their metrics and their time."""

  checked: int  # steps known to be finite
  tokens: float  # a step, without padding
  waiting: list = dataclasses.field(default_factory=list)  # on the device, not looked at
  unlogged: list = dataclasses.field(default_factory=list)  # on the host, finite
  paces: list = dataclasses.field(default_factory=list)  # tokens a second
  mark: float = dataclasses.field(default_factory=time.perf_counter)
  since: dict = dataclasses.field(
    default_factory=collections.Counter
  )  # seconds since the mark spent on what is not training
  spent: dict = dataclasses.field(default_factory=collections.Counter)  # the same of the whole run

  def settle(self, step: int):
    """Brings the waiting metrics to the host. Raises UserError if one is not finite."""
    found, self.waiting = jax.device_get(self.waiting), []
    _check_finite(found, self.checked)
    self.unlogged += found
    self.checked = step

  def figures(self, step: int) -> dict[str, float]:
    """Means and pace since the last call."""
    self.settle(step)
    seconds = time.perf_counter() - self.mark
    waited, first = self.since.pop("input", 0.0), "compile" in self.since
    at_work = seconds - sum(self.since.values())
    # The first step stands in the time of its compilation: it does not count, unless there is no other.
    steps = len(self.unlogged) - first
    pace = steps * self.tokens / at_work if steps else self.tokens / seconds
    self.paces.append(pace)
    means = metrics_lib.means(self.unlogged)
    self.unlogged, self.mark = [], time.perf_counter()
    self.since.clear()
    return {**means, "tokens_per_second": pace, "input_wait": waited / at_work}

  @contextlib.contextmanager
  def spending(self, on: str):
    """Time in here is spent on: input (waited for), compile, evaluation or checkpoint."""
    began = time.perf_counter()
    yield
    seconds = time.perf_counter() - began
    self.since[on] += seconds
    self.spent[on] += seconds

  def shares(self, seconds: float) -> dict[str, float]:
    """What the wall clock went to, as shares of it; the rest was training."""
    shares = {
      on: self.spent[on] / seconds for on in ("input", "compile", "evaluation", "checkpoint")
    }
    return {"training": 1 - sum(shares.values()), **shares}
