"""Do abilities emerge? Exact match beside the loss of a token, over sizes and lengths of training.

A target of several tokens is matched only where all of them are right. So exact match can jump
where the loss of a token falls smoothly: that is the metric's doing (Schaeffer et al. 2023). Where
the loss jumps too, the model has changed. For each seed, the largest step of a curve is its largest
change between neighbouring points, as a share of its whole change. Points are sizes, or lengths of
training that double. The report compares the largest step of the loss with that of exact match.
"""

import dataclasses
from typing import Any, Sequence

import numpy as np
from etils import epath

from llm.config import Config, key
from llm.core import UserError
from llm.runs import metrics
from llm.studies import emergence_report, frame, scaling_fits
from llm.studies.runs import Result, Run

DOUBLINGS = 4  # the shortest length of training is this many times half of the longest
LEARNED = 0.5  # exact match from which a model has learned a task
METRICS = ("loss", "accuracy", "exact_match")


@dataclasses.dataclass(frozen=True)
class Study(frame.Study):
  """tasks: names of made sources (data/made.py). sizes: LAYERSxWIDTH, smallest first. evaluations:
  of a run, at equal distances."""

  title = "Emergence"

  tasks: tuple = ("addition", "reversed_addition", "copying")
  sizes: tuple = ("1x32", "2x48", "2x64", "2x96", "3x128")
  evaluations: int = key(32, at_least=2**DOUBLINGS)
  seeds: int = key(5, at_least=1)

  def quick(self) -> "Study":
    return dataclasses.replace(
      self, tasks=("copying",), sizes=("1x16", "1x32", "2x48"), evaluations=16, seeds=2
    )

  def next_runs(self, base: Config, done: Sequence[Result], folder: epath.Path) -> list[Run]:
    scaling_fits.need(len(set(self.sizes)), 3, "a curve", "sizes (config.study.sizes)")
    if base.training.steps < self.evaluations:
      raise UserError(
        f"config.run.training.steps={base.training.steps} must be at least "
        f"config.study.evaluations={self.evaluations}"
      )
    return [
      self._run(base, task, size, seed)
      for task in self.tasks
      for size in self.sizes
      for seed in range(self.seeds)
    ]

  def _run(self, base: Config, task: str, size: str, seed: int) -> Run:
    model = frame.sized(base.model, size)
    every = base.training.steps // self.evaluations
    training = dataclasses.replace(
      base.training, steps=every * self.evaluations, epochs=0.0, seed=seed, eval_every=every
    )
    data = dataclasses.replace(
      base.data, train=f"made:{task}[train]", eval=f"made:{task}[validation]"
    )
    config = dataclasses.replace(base, model=model, training=training, data=data)
    facts = {"task": task, "size": size, "seed": seed}
    return Run(f"{task}-{size}-{seed}", config, facts, cost=model.num_layers * model.width + 60)

  def report(self, done: Sequence[Result], folder: epath.Path) -> tuple[dict[str, Any], str]:
    curves = {task: self._curves(task, done, folder) for task in self.tasks}
    tasks = {task: _of_task(of_task) for task, of_task in curves.items()}
    emergence_report.draw(curves, folder)
    return {"tasks": tasks}, emergence_report.in_words(tasks)

  def _curves(self, task: str, done: Sequence[Result], folder: epath.Path) -> "Curves":
    """Raises UserError where a size has no run that did not diverge."""
    parameters, evaluations, steps, flops = [], [], [], []
    for size in self.sizes:
      of_size = [
        result
        for result in done
        if (result.run.facts["task"], result.run.facts["size"]) == (task, size)
        and not result.diverged
      ]
      scaling_fits.need(len(of_size), 1, f"{task}, {size}", "runs that did not diverge")
      logged = [result.evaluations(folder) for result in of_size]
      parameters.append(of_size[0].figures["parameters"])
      flops.append(of_size[0].figures["flops"])
      steps = [line["step"] for line in logged[0]]
      evaluations.append(
        {name: np.array([[e[name] for e in lines] for lines in logged]) for name in METRICS}
      )
    return Curves(self.sizes, np.array(parameters), np.array(flops), np.array(steps), evaluations)


@dataclasses.dataclass(frozen=True)
class Curves:
  """All evaluations of a task. steps: of each evaluation. flops: of a whole run of each size.

  evaluations: for each size, metric -> seeds x evaluations.
  """

  sizes: tuple[str, ...]
  parameters: np.ndarray
  flops: np.ndarray
  steps: np.ndarray
  evaluations: list[dict[str, np.ndarray]]

  def by_size(self, name: str) -> list[np.ndarray]:
    """At the end of training, the values of the seeds of each size."""
    return [of_size[name][:, -1] for of_size in self.evaluations]

  def by_length(self, name: str, size: int) -> np.ndarray:
    """Seeds x lengths of training that double, of a size."""
    count = len(self.steps)
    doubled = [count // 2**power - 1 for power in reversed(range(DOUBLINGS + 1))]
    return self.evaluations[size][name][:, doubled]


def largest_step(values_SxP: np.ndarray) -> np.ndarray:
  """For each seed, the largest change between neighbouring points, of that from worst to best.

  It is 1 / (P - 1) for a straight line through P points, and 1 for a jump. values_SxP: better is
  higher. NaN where nothing changes.
  """
  whole = np.ptp(values_SxP, axis=1)
  steps = np.diff(values_SxP, axis=1).max(1)
  return np.divide(steps, whole, out=np.full(len(whole), np.nan), where=whole > 0)


def interval_of_mean(values: np.ndarray) -> tuple[float, float, float]:
  """(mean, low, high) of shares: Student's 95% interval within [0, 1], NaN where one is left."""
  values = values[np.isfinite(values)]
  mean = float(values.mean()) if len(values) else float("nan")
  low, high = np.clip(metrics.seeds_interval(values[None]), 0, 1)
  return mean, float(low), float(high)


def jump(points: int) -> float:
  """The largest step from which a curve jumps: halfway from that of a straight line to all."""
  return (1 + 1 / (points - 1)) / 2


def verdict(exact: Sequence[float], loss: Sequence[float], match_SxP: np.ndarray) -> str:
  """What the curves of exact match of S seeds through P points are.

  exact, loss: the largest steps of exact match and of the loss, (share, low, high).
  """
  seeds, points = match_SxP.shape
  if seeds < 2:
    return "one seed"
  if (match_SxP.max(1) >= LEARNED).mean() < 0.5:
    return "not learned"
  if match_SxP.mean(0).min() >= LEARNED:
    return "no threshold here"
  if not exact[0] >= jump(points):
    return "no jump"
  if loss[1] >= jump(points):
    return "a jump in both"
  return "a sharp metric" if loss[2] < jump(points) else "undecided"


def _of_task(curves: Curves) -> dict[str, Any]:
  """The figures of a task: a row for each size, and both views on its curves."""
  rows = []
  for number, size in enumerate(curves.sizes):
    row: dict[str, Any] = {"size": size, "parameters": int(curves.parameters[number])}
    for name in METRICS:
      values = curves.by_size(name)[number]
      row[name] = (float(values.mean()), float(values.min()), float(values.max()))
    exact = curves.by_size("exact_match")[number]
    row["seeds"] = len(exact)
    row["learned"] = int((exact >= LEARNED).sum())
    row["flops"] = float(curves.flops[number])
    rows.append(row)
  best = int(np.argmax([row["exact_match"][0] for row in rows]))
  by_size = {name: _seeds_by_size(curves.by_size(name)) for name in METRICS}
  by_length = {name: curves.by_length(name, best) for name in METRICS}
  views = {"sizes": _view(by_size), f"lengths of {curves.sizes[best]}": _view(by_length)}
  return {"sizes": rows, "views": views}


def _seeds_by_size(values: Sequence[np.ndarray]) -> np.ndarray:
  """Seeds x sizes. Where runs were left out, the fewest seeds of a size."""
  seeds = min(len(of_size) for of_size in values)
  return np.stack([of_size[:seeds] for of_size in values], axis=1)


def _view(values: dict[str, np.ndarray]) -> dict[str, Any]:
  """values: by metric, seeds x points."""
  exact = interval_of_mean(largest_step(values["exact_match"]))
  loss = interval_of_mean(largest_step(-values["loss"]))
  points = values["loss"].shape[1]
  return {
    "points": points,
    "jump": jump(points),
    "largest_step_exact_match": exact,
    "largest_step_loss": loss,
    "verdict": verdict(exact, loss, values["exact_match"]),
  }
