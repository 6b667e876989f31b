"""Which evaluation of a run was the best, and how many have passed since."""

import dataclasses
import math
from typing import Any, Mapping, Sequence

from llm.checkpoints.manager import Best
from llm.core import UserError


@dataclasses.dataclass
class Progress:
  """The best evaluation so far.

  goal: "max:METRIC" or "min:METRIC"; "" tells none apart. step, value: of the best evaluation; step
  -1 is none yet. since: evaluations after it.
  """

  goal: str
  step: int = -1
  value: float = math.nan
  since: int = 0

  @classmethod
  def of_run(
    cls,
    goal: str,
    saved: Best,
    evaluations: Sequence[tuple[int, Mapping[str, float | None]]] = (),
  ) -> "Progress":
    """The progress of the checkpoint that a run goes on from, `saved`, if its goal was the same.

    evaluations: (step, figures) of the checkpoints on disk, which tell the best by another goal.
    """
    if saved.step >= 0 and saved.goal == goal:
      return cls(**dataclasses.asdict(saved))
    progress = cls(goal)
    metric = goal.partition(":")[2]
    for step, figures in evaluations:
      finite = {name: value for name, value in figures.items() if value is not None}
      if metric in finite:
        progress.add(step, finite)
    return progress

  def saved(self) -> dict[str, Any]:
    """What a checkpoint keeps of it; nothing before the first evaluation."""
    return dataclasses.asdict(self) if self.step >= 0 else {}

  def check(self, figures: Mapping[str, float]) -> None:
    """Raises UserError where the figures of an evaluation lack the metric of the goal."""
    metric = self.goal.partition(":")[2]
    if metric not in figures:
      raise UserError(
        f"config.training.keep_best={self.goal}: an evaluation has no {metric!r}, it has "
        f"{', '.join(sorted(figures))}"
      )

  def add(self, step: int, figures: Mapping[str, float]) -> bool:
    """Takes the figures of an evaluation, {} for none. Returns whether they are the best so far.

    Raises UserError where they lack the metric.
    """
    if not (self.goal and figures):
      return False
    mode, _, metric = self.goal.partition(":")
    self.check(figures)
    value = figures[metric]
    better = value > self.value if mode == "max" else value < self.value
    # A correlation has no value where all predictions are equal.
    first = self.step < 0 or math.isnan(self.value) and not math.isnan(value)
    if first or better:
      self.step, self.value, self.since = step, value, 0
      return True
    self.since += 1
    return False
