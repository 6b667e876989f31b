"""A search over the keys of a config: grid or random, with successive halving, and what matters.

With several rungs, every trial trains for a short part of its steps, and the best third goes on
from its checkpoints for three times as long, until the last ones end (Jamieson and Talwalkar 2016).
The schedule is that of the whole run, so a trial that ends early is compared in the middle of it.
"""

import dataclasses
import itertools
from typing import Any, Sequence

import numpy as np
import scipy.stats
from etils import epath

from llm import config as config_lib
from llm.config import Config, key
from llm.core import UserError
from llm.objectives import base as base_lib
from llm.studies import frame, search_report
from llm.studies.runs import Result, Run
from llm.studies.search_space import Dimension, parse

LEAST = 6  # trials from which the report says what matters
SHUFFLES = 500  # for what a key would explain by chance


@dataclasses.dataclass(frozen=True)
class Study(frame.Study):
  """keys: GROUP.KEY=VALUES, where VALUES is a|b|c, uniform(low,high) or log(low,high).

  how: grid takes all combinations, with `points` of each range; random draws `trials`. metric:
  min:NAME or max:NAME of the evaluation; "" is that of the objective. rungs: of successive halving,
  1 is none. reduction: one of so many trials goes on to the next rung, for as many times the steps.
  """

  title = "Search"
  diverged_are = "counted as the worst"

  keys: tuple = ("optimizer.learning_rate=log(3e-4,3e-2)", "optimizer.warmup_steps=5|50|150")
  how: str = key("random", choices=("grid", "random"))
  trials: int = key(18, at_least=2)
  points: int = key(3, at_least=2)
  seeds: int = key(1, at_least=1)
  metric: str = ""
  rungs: int = key(3, at_least=1)
  reduction: int = key(3, at_least=2)

  def quick(self) -> "Study":
    return dataclasses.replace(self, trials=min(self.trials, 9), points=2, rungs=min(self.rungs, 2))

  def next_runs(self, base: Config, done: Sequence[Result], folder: epath.Path) -> list[Run]:
    if self.rungs > 1 and not base.training.steps:
      raise UserError(
        f"config.study.rungs={self.rungs} needs config.run.training.steps: a run goes on after a "
        "share of them; config.study.rungs=1 trains every trial to its end"
      )
    trials = self.values()
    runs = self._rung(base, trials, range(len(trials)), 0)
    for rung in range(1, self.rungs):
      if len(done) < len(runs):
        break
      runs += self._rung(base, trials, self._best(done, rung), rung)
    return runs

  def values(self) -> list[dict[str, Any]]:
    """Key -> value of each trial. More trials leave those before them as they are."""
    dimensions = [parse(text) for text in self.keys]
    if not dimensions:
      raise UserError("config.study.keys names no key, e.g. optimizer.learning_rate=log(1e-4,1e-2)")
    names = [dimension.key for dimension in dimensions]
    if "training.seed" in names:
      raise UserError("config.study.keys: training.seed is not searched; set config.study.seeds")
    if self.how == "grid":
      combinations = itertools.product(*(d.points(self.points) for d in dimensions))
      return [dict(zip(names, combination)) for combination in combinations]
    rngs = [np.random.default_rng((number, 7)) for number in range(self.trials)]
    return [{dimension.key: dimension.draw(rng) for dimension in dimensions} for rng in rngs]

  def _rung(
    self, base: Config, trials: Sequence[dict], numbers: Sequence[int], rung: int
  ) -> list[Run]:
    """The runs of the trials that are in a rung, all seeds of each."""
    return [
      self._run(base, trials[number], number, seed, rung)
      for number in numbers
      for seed in range(self.seeds)
    ]

  def _run(self, base: Config, values: dict[str, Any], number: int, seed: int, rung: int) -> Run:
    config = _changed(base, {**values, "training.seed": base.training.seed + seed})
    rounded = {key: _value(config, key) for key in values}
    self._check_rounded(values, rounded)
    share = self.reduction ** (self.rungs - 1 - rung)
    until = max(1, config.training.steps // share) if self.rungs > 1 else 0
    facts = {
      "trial": number,
      "rung": rung,
      "seed": seed,
      "values": rounded,
      "goal": self._goal(base),
    }
    workdir = f"{number:03}-{seed}"
    name = f"{workdir}-rung{rung}" if self.rungs > 1 else workdir
    cost = (until or 1) * (1.0 if rung == 0 else 1 - 1 / self.reduction)
    return Run(name, config, facts, workdir=workdir, until=until, cost=cost)

  def _check_rounded(self, values: dict[str, Any], rounded: dict[str, Any]):
    """Raises UserError where a whole number is rounded to what its key does not draw from."""
    for dimension in map(parse, self.keys):
      value = rounded[dimension.key]
      if dimension.choices and value not in dimension.choices or dimension.log and value <= 0:
        raise UserError(
          f"config.study.keys: {dimension.key} is a whole number: {values[dimension.key]} becomes "
          f"{value}; give whole numbers, and a logarithm from 1 on"
        )

  def _goal(self, base: Config) -> str:
    """min:NAME or max:NAME. Raises UserError on another form, or where nothing is evaluated."""
    goal = self.metric or base_lib.build(base.objective).goal
    if not goal.startswith(("min:", "max:")):
      raise UserError(f"config.study.metric={goal}: expected min:NAME or max:NAME, e.g. min:loss")
    if not base.data.eval:
      raise UserError("a search needs config.run.data.eval: it chooses by what is held out")
    return goal

  def _best(self, done: Sequence[Result], rung: int) -> list[int]:
    """The trials that go on to a rung, by the one before it. The best is first."""
    scored = scores(done, rung - 1)
    ranked = sorted(scored, key=lambda number: (np.mean(scored[number]), number))
    return ranked[: max(1, -(-len(ranked) // self.reduction))]

  def report(self, done: Sequence[Result], folder: epath.Path) -> tuple[dict[str, Any], str]:
    dimensions = [parse(text) for text in self.keys]
    trials = _rows(done)
    of_first_rung = scores(done, 0)
    values = {result.run.facts["trial"]: result.run.facts["values"] for result in done}
    matters = what_matters(dimensions, values, of_first_rung)
    search_report.draw(dimensions, trials, matters, folder)
    goal = done[0].run.facts["goal"]
    figures = {"goal": goal, "best": trials[0], "trials": trials, "what_matters": matters}
    return figures, search_report.in_words(goal, trials, matters)


def _changed(base: Config, values: dict[str, Any]) -> Config:
  """The config with other values of its keys. Raises UserError on one that it cannot have."""
  plain = config_lib.thaw(base)
  for name, value in values.items():
    group, _, rest = name.partition(".")
    if group not in plain or rest not in plain[group]:
      known = [f"{group}.{key}" for group, keys in plain.items() for key in keys]
      raise config_lib.unknown_key("config.run", name, known)
    if type(plain[group][rest]) is int and isinstance(value, float):
      value = round(value)
    plain[group] = {**plain[group], rest: value}
  config = config_lib.freeze(plain)
  base_lib.build(config.objective)
  return config


def _value(config: Config, key: str) -> Any:
  """Of GROUP.KEY."""
  group, _, name = key.partition(".")
  return config_lib.thaw(config)[group][name]


def score(result: Result) -> float:
  """The metric of a run, lower is better; infinite where it diverged or the metric has no value.

  Raises UserError where the evaluations lack it.
  """
  sign, _, name = result.run.facts["goal"].partition(":")
  if result.diverged:
    return np.inf
  figures = result.figures["eval"]
  if name not in figures:
    raise UserError(
      f"config.study.metric: evaluations have no {name}; they have {', '.join(sorted(figures))}"
    )
  value = result.evaluated(name)
  if np.isnan(value):
    return np.inf
  return value if sign == "min" else -value


def scores(done: Sequence[Result], rung: int) -> dict[int, list[float]]:
  """Trial -> the scores of its seeds in a rung."""
  by_trial: dict[int, list[float]] = {}
  for result in done:
    if result.run.facts["rung"] == rung:
      by_trial.setdefault(result.run.facts["trial"], []).append(score(result))
  return by_trial


def _rows(done: Sequence[Result]) -> list[dict[str, Any]]:
  """A row for each trial at its last rung: those that came further first, then the better.

  metric: of each seed, None where it diverged.
  """
  sign = 1 if done[0].run.facts["goal"].startswith("min:") else -1
  rows = {}
  for rung in sorted({result.run.facts["rung"] for result in done}):
    for number, of_seeds in scores(done, rung).items():
      runs = [r for r in done if (r.run.facts["trial"], r.run.facts["rung"]) == (number, rung)]
      rows[number] = {
        "trial": number,
        "values": runs[0].run.facts["values"],
        "rung": rung,
        "step": max((r.figures.get("step", 0) for r in runs), default=0),
        "metric": [sign * value if np.isfinite(value) else None for value in of_seeds],
        "order": float(np.mean(of_seeds)),
        "flops": sum(r.figures.get("flops", 0.0) for r in runs),
        "runs": [r.run.name for r in runs],
      }
  ranked = sorted(
    rows.values(), key=lambda row: (not np.isfinite(row["order"]), -row["rung"], row["order"])
  )
  return [{name: value for name, value in row.items() if name != "order"} for row in ranked]


def what_matters(
  dimensions: Sequence[Dimension],
  values: dict[int, dict[str, Any]],
  of_rung: dict[int, list[float]],
) -> list[dict[str, Any]]:
  """Each key, with the share of the variation of ranks that it explains alone, and that by chance.

  values: of each trial. of_rung: its scores in the first rung, where all took equal shares of their
  steps. A range is fitted by a parabola, choices by their means. chance: the 95th percentile of the
  share where the ranks are shuffled. [] where there are fewer than LEAST trials.
  """
  if len(of_rung) < LEAST:
    return []
  ranks = scipy.stats.rankdata([np.mean(of_seeds) for of_seeds in of_rung.values()])
  rng = np.random.default_rng(0)
  rows = []
  for dimension in dimensions:
    design = dimension.design([values[number][dimension.key] for number in of_rung])
    shuffled = [_explained(design, rng.permutation(ranks)) for _ in range(SHUFFLES)]
    chance = float(np.percentile(shuffled, 95))
    rows.append({"key": dimension.key, "share": _explained(design, ranks), "chance": chance})
  return sorted(rows, key=lambda row: -row["share"])


def _explained(design: np.ndarray, ranks: np.ndarray) -> float:
  """The share of the variance of ranks that least squares on `design` explain."""
  if not np.var(ranks):
    return 0.0
  fitted = design @ np.linalg.lstsq(design, ranks, rcond=None)[0]
  return float(1 - np.var(ranks - fitted) / np.var(ranks))
