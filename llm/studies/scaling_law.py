"""How the loss falls with parameters, tokens and compute, and whether the law predicts larger runs.

A grid of sizes and lengths of training, each run with its own schedule to its end. The learning
rate is that of training/recipe.py, which follows width, batch and tokens. The laws are fitted on
the grid alone. Then the larger runs are predicted, and only then trained.
"""

import dataclasses
import functools
import json
from typing import Any, Callable, Container, Mapping, Sequence

import numpy as np
from etils import epath

from llm import storage
from llm.config import Config, key
from llm.core import UserError
from llm.studies import frame, scaling_fits, scaling_report
from llm.studies.runs import Result, Run, is_done
from llm.studies.scaling_fits import Parametric
from llm.training import recipe

RESAMPLED = 200  # times, for the intervals
PREDICTION = "prediction.json"
# Budgets whose best N and D are told where config.study.budgets names none, in the grid's largest.
BEYOND = (1, 10, 100)
DISTINCT = 3  # sizes and lengths that a law needs
SMALLEST = 3e4  # parameters below which a step takes no less time


@dataclasses.dataclass(frozen=True)
class Study(frame.Study):
  """sizes: LAYERSxWIDTH of the grid. tokens: of training. held_out: LAYERSxWIDTH:TOKENS of the runs
  that are predicted before they are trained. budgets: FLOPs, as 6 N D, whose best sizes and
  lengths the report tells; () is 1, 10 and 100 times the largest of the grid."""

  title = "Scaling law"

  sizes: tuple = ("2x32", "2x48", "3x64", "4x96", "4x128")
  tokens: tuple = ("5e5", "1e6", "2e6", "4e6")
  held_out: tuple = ("6x128:4e6", "4x128:8e6", "6x160:8e6")
  seeds: int = key(2, at_least=1)
  budgets: tuple = ()

  def quick(self) -> "Study":
    return dataclasses.replace(
      self,
      sizes=("1x32", "2x48", "2x64"),
      tokens=("1e5", "2e5", "4e5"),
      held_out=("3x96:8e5",),
      seeds=1,
    )

  def next_runs(self, base: Config, done: Sequence[Result], folder: epath.Path) -> list[Run]:
    scaling_fits.need(
      len(set(self.sizes)), DISTINCT, "the parametric law", "sizes (config.study.sizes)"
    )
    scaling_fits.need(
      len(set(self.tokens)), DISTINCT, "the parametric law", "lengths (config.study.tokens)"
    )
    if not base.data.eval:
      raise UserError("a scaling law is one of held-out text: set config.run.data.eval")
    held_out = self._held_out(base)
    self._budgets(1.0)
    grid = [
      _run(base, size, tokens, seed, "grid")
      for size in self.sizes
      for tokens in self.tokens
      for seed in range(self.seeds)
    ]
    if len(done) < len(grid):
      return grid
    measured = {_cell(run) for run in held_out if is_done(run, folder)}
    _predict(Points(_usable(done, "grid")), held_out, measured, folder / PREDICTION)
    return [*grid, *held_out]

  def _held_out(self, base: Config) -> list[Run]:
    runs = []
    for entry in self.held_out:
      size, colon, tokens = entry.partition(":")
      if not colon:
        raise UserError(f"config.study.held_out: {entry!r} is not LAYERSxWIDTH:TOKENS")
      runs += [_run(base, size, tokens, seed, "held out") for seed in range(self.seeds)]
    return runs

  def report(self, done: Sequence[Result], folder: epath.Path) -> tuple[dict[str, Any], str]:
    grid = Points(_usable(done, "grid"))
    predicted = json.loads((folder / PREDICTION).read_text())
    law, *samples = (Parametric(*numbers) for numbers in predicted["laws"])
    later = _by_name(_usable(done, "held out"))
    held_out = [_compared(predicted["runs"][name], runs) for name, runs in later.items()]
    fits = _fits(grid, law, samples)
    largest = float((6 * grid.n * grid.d).max())
    optimal = [_optimal(budget, law, samples) for budget in self._budgets(largest)]
    scaling_report.draw(grid, law, held_out, folder)
    figures = {"fits": fits, "held_out": held_out, "optimal": optimal}
    return figures, scaling_report.in_words(grid, fits, held_out, optimal, largest)

  def _budgets(self, largest: float) -> list[float]:
    """FLOPs. largest: of the grid. Raises UserError on what is no number of them."""
    try:
      budgets = [float(budget) for budget in self.budgets]
    except ValueError:
      budgets = [0.0]
    if not all(budget > 0 for budget in budgets):
      raise UserError(f"config.study.budgets={self.budgets}: expected FLOPs, e.g. ('1e15', '1e16')")
    return budgets or [times * largest for times in BEYOND]


def _run(base: Config, size: str, tokens: str, seed: int, role: str) -> Run:
  """The run of a size and a length."""
  model = frame.sized(base.model, size)
  try:
    steps = round(float(tokens) / (base.training.batch_size * base.training.sequence_length))
  except ValueError:
    raise UserError(f"config.study: {tokens!r} is no number of tokens")
  training = dataclasses.replace(
    base.training, steps=max(1, steps), epochs=0.0, seed=seed, eval_every=0
  )
  trained = training.steps * training.batch_size * training.sequence_length
  config = dataclasses.replace(base, model=model, training=training)
  rate = config.optimizer.learning_rate
  facts = {
    "size": size,
    "layers": model.num_layers,
    "width": model.width,
    "tokens": trained,
    "seed": seed,
    "learning_rate": recipe.learning_rate(config) if rate == -1 else rate,
    "by_the_rule": rate == -1,
    "role": role,
  }
  name = f"{size}-{float(tokens):g}-{seed}"
  return Run(name, config, facts, cost=(_parameters(facts) + SMALLEST) * trained)


def _usable(results: Sequence[Result], role: str) -> list[Result]:
  """The results of the grid, or of the larger runs, that did not diverge."""
  return [r for r in results if r.run.facts["role"] == role and not r.diverged]


def _parameters(facts: Mapping[str, Any]) -> float:
  """Of the layers of a model, without embeddings, biases and norms."""
  return 12.0 * facts["layers"] * facts["width"] ** 2


class Points:
  """Runs as arrays. n: parameters without embeddings; n_all: with them; d: tokens; c: FLOPs as
  counted in the traced program. passes: over the text that was read most often."""

  def __init__(self, results: Sequence[Result]):
    self.results = results
    facts = [result.run.facts for result in results]
    self.n = np.array([_parameters(f) for f in facts])
    self.n_all = np.array([float(result.figures["parameters"]) for result in results])
    self.d = np.array([float(f["tokens"]) for f in facts])
    self.c = np.array([result.figures["flops"] for result in results])
    self.loss = np.array([result.evaluated("loss") for result in results])
    self.passes = np.array([_passes(result) for result in results])
    self.seeds = len({f["seed"] for f in facts})
    self.rates = sorted({f["learning_rate"] for f in facts})
    self.by_the_rule = all(f["by_the_rule"] for f in facts)

  @functools.cached_property
  def draws(self) -> list[np.ndarray]:
    """Resampled runs, as numbers of runs: sizes and lengths are drawn, then seeds of each."""
    rng = np.random.default_rng(0)
    cells: dict[tuple[float, float], list[int]] = {}
    for number, cell in enumerate(zip(self.n, self.d)):
      cells.setdefault(cell, []).append(number)
    members = list(cells.values())
    draws: list[np.ndarray] = []
    while len(draws) < RESAMPLED:
      cells_drawn = [members[cell] for cell in rng.integers(0, len(members), len(members))]
      drawn = np.concatenate([rng.choice(cell, len(cell)) for cell in cells_drawn])
      if min(len(np.unique(self.n[drawn])), len(np.unique(self.d[drawn]))) >= DISTINCT:
        draws.append(drawn)  # too few sizes or lengths would fit no law
    return draws


def _cell(run: Run) -> str:
  """The name of a size and length: that of its runs, without the seed."""
  return run.name.rpartition("-")[0]


def _passes(result: Result) -> float:
  return max((source["epochs"] for source in result.figures.get("data", {}).values()), default=0.0)


def _resampled(grid: Points, law: Parametric) -> list[Parametric]:
  """The law fitted on resampled runs."""
  return [
    scaling_fits.parametric(grid.n[drawn], grid.d[drawn], grid.loss[drawn], near=law)
    for drawn in grid.draws
  ]


def _interval(values: Sequence[float]) -> tuple[float, float]:
  """The middle 95%."""
  low, high = np.percentile(values, [2.5, 97.5])
  return float(low), float(high)


def _by_name(results: Sequence[Result]) -> dict[str, list[Result]]:
  groups: dict[str, list[Result]] = {}
  for result in results:
    groups.setdefault(_cell(result.run), []).append(result)
  return groups


def _predict(
  grid: Points, held_out: Sequence[Run], measured: Container[str], path: epath.Path
) -> None:
  """Writes what the grid says of the larger runs, before they are trained.

  What was written of the same grid stays, and so does what was predicted of a run that is measured
  by now. laws: that of the grid, then those of resampled runs. The interval is that of a run: each
  of these laws has the error of one run of the grid.
  """
  names = sorted(result.run.name for result in grid.results)
  saved = json.loads(path.read_text()) if path.exists() else {"grid": [], "laws": [], "runs": {}}
  of_this_grid = saved["grid"] == names
  kept = saved["runs"]
  if not of_this_grid:
    kept = {name: prediction for name, prediction in kept.items() if name in measured}
  wanted = {_cell(run): run for run in held_out if _cell(run) not in kept}
  if of_this_grid and not wanted:
    return
  if of_this_grid:
    law, *samples = (Parametric(*numbers) for numbers in saved["laws"])
  else:
    law = scaling_fits.parametric(grid.n, grid.d, grid.loss)
    samples = _resampled(grid, law)
  errors = np.log(grid.loss) - np.log(law(grid.n, grid.d))
  rng = np.random.default_rng(1)
  runs = dict(kept)
  for name, run in wanted.items():
    n, d = _parameters(run.facts), float(run.facts["tokens"])
    drawn = [float(sample(n, d) * np.exp(rng.choice(errors))) for sample in samples]
    low, high = _interval(drawn)
    prediction = {"predicted": float(law(n, d)), "low": low, "high": high}
    runs[name] = {"name": name, "parameters": n, "tokens": d, **prediction}
    runs[name]["before"] = name not in measured
  laws = [dataclasses.astuple(fitted) for fitted in (law, *samples)]
  storage.write_whole(path, json.dumps({"grid": names, "laws": laws, "runs": runs}, indent=1))


def _compared(prediction: Mapping[str, Any], runs: Sequence[Result]) -> dict[str, Any]:
  """What was predicted for a larger run, and what its seeds measured."""
  measured = Points(runs)
  return {
    **prediction,
    "measured": float(measured.loss.mean()),
    "seeds": [float(loss) for loss in measured.loss],
    "flops": float(measured.c.mean()),
    "seconds": sum(result.wall for result in runs),
    "passes": float(measured.passes.max()),
  }


def _optimal(flops: float, law: Parametric, samples: Sequence[Parametric]) -> dict[str, Any]:
  """The size and length with the least loss of a budget of C = 6 N D, and their intervals."""
  n, d = law.optimal(np.array(flops))
  drawn = [sample.optimal(np.array(flops)) for sample in samples]
  return {
    "flops": flops,
    "parameters": float(n),
    "parameters_interval": _interval([float(size) for size, _ in drawn]),
    "tokens": float(d),
    "tokens_interval": _interval([float(length) for _, length in drawn]),
    "loss": float(law(n, d)),
  }


def _power_law(grid: Points, x: np.ndarray, choose: Callable) -> dict[str, Any]:
  """The exponent of the loss over x, its interval and scale; None if there are too few runs.

  choose: which of so many runs, given by their numbers, are on the line.
  """

  def fitted(numbers: np.ndarray) -> scaling_fits.PowerLaw | None:
    chosen = numbers[choose(numbers)]
    try:
      return scaling_fits.power_law(x[chosen], grid.loss[chosen])
    except UserError:
      return None

  every = np.arange(len(x))
  law = fitted(every)
  count = int(choose(every).sum())
  if law is None:
    return {"exponent": None, "scale": None, "runs": count}
  drawn = [sample.exponent for draw in grid.draws if (sample := fitted(draw))]
  interval = _interval(drawn or [law.exponent])
  figures = {"exponent": law.exponent, "exponent_interval": interval, "scale": law.scale}
  return {**figures, "runs": count}


def _on_envelope(grid: Points, numbers: np.ndarray) -> np.ndarray:
  """Which runs have the least loss of their compute."""
  c, loss = grid.c[numbers], grid.loss[numbers]
  lowest = scaling_fits.envelope(c, grid.n[numbers], loss)
  return np.isin(c, [point[0] for point in lowest]) & np.isin(loss, [point[2] for point in lowest])


def _fits(grid: Points, law: Parametric, samples: Sequence[Parametric]) -> dict[str, Any]:
  """All fits by name, with their intervals."""

  def longest(numbers: np.ndarray) -> np.ndarray:
    return grid.d[numbers] == grid.d.max()

  def largest(numbers: np.ndarray) -> np.ndarray:
    return grid.n[numbers] == grid.n.max()

  budgets = np.geomspace(grid.n.min() * grid.d.max() * 6, grid.n.max() * grid.d.min() * 6, 5)
  lowest = scaling_fits.envelope(grid.c, grid.n, grid.loss)
  parabolas = scaling_fits.iso_flops(grid.n, grid.d, grid.loss, sorted(budgets))
  return {
    "kaplan_parameters": _power_law(grid, grid.n, longest),
    "kaplan_parameters_with_embeddings": _power_law(grid, grid.n_all, longest),
    "kaplan_tokens": _power_law(grid, grid.d, largest),
    "kaplan_compute": _power_law(grid, grid.c, lambda numbers: _on_envelope(grid, numbers)),
    "approach_1": {"exponent_of_parameters": scaling_fits.exponent(lowest), "points": lowest},
    "approach_2": {"exponent_of_parameters": scaling_fits.exponent(parabolas), "points": parabolas},
    "approach_3": _approach_3(law, samples),
    "approach_3_with_embeddings": _approach_3(
      scaling_fits.parametric(grid.n_all, grid.d, grid.loss), ()
    ),
  }


def _approach_3(law: Parametric, samples: Sequence[Parametric]) -> dict[str, Any]:
  """The parameters of the law and the exponent of the best N, with intervals by `samples`."""
  figures: dict[str, Any] = {
    **dataclasses.asdict(law),
    "exponent_of_parameters": law.beta / (law.alpha + law.beta),
  }
  if not samples:
    return figures
  figures["intervals"] = {
    name: _interval([getattr(sample, name) for sample in samples])
    for name in ("E", "A", "B", "alpha", "beta")
  }
  exponents = [sample.beta / (sample.alpha + sample.beta) for sample in samples]
  return {**figures, "exponent_interval": _interval(exponents)}
