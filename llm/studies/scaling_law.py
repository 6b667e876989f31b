"""How the loss falls with parameters, tokens and compute, and whether the law predicts larger runs.

A grid of sizes and lengths of training, each run with its own schedule to its end. The learning
rate is that of training/recipe.py, which follows width, batch and tokens. The laws are fitted on
the grid alone. Then the larger runs are predicted, and only then trained.
"""

import dataclasses
import json
import pathlib
from typing import Any, Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
import tabulate

from llm.config import Config, key
from llm.core import UserError
from llm.studies import frame, scaling_fits
from llm.studies.frame import Result, Run

RESAMPLED = 200  # times, for the intervals
PREDICTION = "prediction.json"


@dataclasses.dataclass(frozen=True)
class Study(frame.Study):
  """sizes: LAYERSxWIDTH of the grid. tokens: of training. held_out: LAYERSxWIDTH:TOKENS of the runs
  that are predicted before they are trained."""

  title = "Scaling law"

  sizes: tuple = ("2x32", "2x48", "3x64", "4x96", "4x128")
  tokens: tuple = ("5e5", "1e6", "2e6", "4e6")
  held_out: tuple = ("6x128:4e6", "4x128:8e6", "6x160:8e6")
  seeds: int = key(2, at_least=1)

  def quick(self) -> "Study":
    return dataclasses.replace(
      self,
      sizes=("1x32", "2x48", "2x64"),
      tokens=("1e5", "2e5", "4e5"),
      held_out=("3x96:8e5",),
      seeds=1,
    )

  def next_runs(self, base: Config, done: Sequence[Result], folder: pathlib.Path) -> list[Run]:
    scaling_fits.need(len(set(self.sizes)), 3, "the parametric law", "sizes (config.study.sizes)")
    scaling_fits.need(
      len(set(self.tokens)), 3, "the parametric law", "lengths (config.study.tokens)"
    )
    grid = [
      _run(base, size, tokens, seed, "grid")
      for size in self.sizes
      for tokens in self.tokens
      for seed in range(self.seeds)
    ]
    if len(done) < len(grid):
      return grid
    held_out = self._held_out(base)
    _predict(Points(_usable(done, "grid")), held_out, folder / PREDICTION)
    return [*grid, *held_out]

  def _held_out(self, base: Config) -> list[Run]:
    runs = []
    for entry in self.held_out:
      size, colon, tokens = entry.partition(":")
      if not colon:
        raise UserError(f"config.study.held_out: {entry!r} is not LAYERSxWIDTH:TOKENS")
      runs += [_run(base, size, tokens, seed, "held out") for seed in range(self.seeds)]
    return runs

  def report(self, done: Sequence[Result], folder: pathlib.Path) -> tuple[dict[str, Any], str]:
    grid = Points(_usable(done, "grid"))
    predicted = json.loads((folder / PREDICTION).read_text())["runs"]
    later = _by_name(_usable(done, "held out"))
    held_out = [_compared(predicted[name], runs) for name, runs in later.items()]
    law = scaling_fits.parametric(grid.n, grid.d, grid.loss)
    samples = _resampled(grid, law)
    fits = _fits(grid, law, samples)
    _draw(grid, law, held_out, folder)
    figures = {"fits": fits, "held_out": held_out}
    return figures, _in_words(grid, fits, held_out)


def _run(base: Config, size: str, tokens: str, seed: int, role: str) -> Run:
  """The run of a size and a length."""
  try:
    layers, width = (int(number) for number in size.split("x"))
    steps = round(float(tokens) / (base.training.batch_size * base.training.sequence_length))
  except ValueError:
    raise UserError(
      f"config.study: {size!r} is not LAYERSxWIDTH, or {tokens!r} no number of tokens"
    )
  model = dataclasses.replace(
    base.model,
    num_layers=layers,
    width=width,
    num_heads=max(1, width // 32),
    mlp_dim=4 * width,
  )
  training = dataclasses.replace(
    base.training, steps=max(1, steps), epochs=0.0, seed=seed, eval_every=0
  )
  trained = training.steps * training.batch_size * training.sequence_length
  facts = {"size": size, "layers": layers, "width": width, "tokens": trained, "seed": seed}
  config = dataclasses.replace(base, model=model, training=training)
  return Run(f"{size}-{float(tokens):g}-{seed}", config, {**facts, "role": role})


def _usable(results: Sequence[Result], role: str) -> list[Result]:
  """The results of the grid, or of the larger runs, that did not diverge."""
  return [r for r in results if r.run.facts["role"] == role and not r.diverged]


def _parameters(facts: Mapping[str, Any]) -> float:
  """Of the layers of a model, without embeddings, biases and norms."""
  return 12.0 * facts["layers"] * facts["width"] ** 2


class Points:
  """Runs as arrays. n: parameters without embeddings; n_all: with them; d: tokens; c: FLOPs as
  counted in the traced program."""

  def __init__(self, results: Sequence[Result]):
    self.results = results
    facts = [result.run.facts for result in results]
    self.n = np.array([_parameters(f) for f in facts])
    self.n_all = np.array([float(result.figures["parameters"]) for result in results])
    self.d = np.array([float(f["tokens"]) for f in facts])
    self.c = np.array([result.figures["flops"] for result in results])
    self.loss = np.array([result.figures["eval"]["loss"] for result in results])


def _resampled(grid: Points, law: scaling_fits.Parametric) -> list[scaling_fits.Parametric]:
  """The law fitted on resampled runs: sizes and lengths are drawn, then a seed of each.

  Draws that leave too few distinct sizes or lengths are left out.
  """
  rng = np.random.default_rng(0)
  cells: dict[tuple[float, float], list[int]] = {}
  for number, cell in enumerate(zip(grid.n, grid.d)):
    cells.setdefault(cell, []).append(number)
  members = list(cells.values())
  samples = []
  for _ in range(RESAMPLED):
    drawn = [int(rng.choice(members[cell])) for cell in rng.integers(0, len(members), len(members))]
    n, d, loss = grid.n[drawn], grid.d[drawn], grid.loss[drawn]
    try:
      samples.append(scaling_fits.parametric(n, d, loss, near=law))
    except UserError:
      continue
  return samples


def _interval(values: Sequence[float]) -> tuple[float, float]:
  """The middle 95%."""
  low, high = np.percentile(values, [2.5, 97.5])
  return float(low), float(high)


def _by_name(results: Sequence[Result]) -> dict[str, list[Result]]:
  groups: dict[str, list[Result]] = {}
  for result in results:
    groups.setdefault(result.run.name.rpartition("-")[0], []).append(result)
  return groups


def _predict(grid: Points, held_out: Sequence[Run], path: pathlib.Path) -> None:
  """Writes what the grid says of the larger runs, before they are trained.

  What was written of the same grid stays. The interval is that of a run: the laws of resampled
  runs, each with the error of one run of the grid.
  """
  names = sorted(result.run.name for result in grid.results)
  if path.exists() and json.loads(path.read_text())["grid"] == names:
    return
  law = scaling_fits.parametric(grid.n, grid.d, grid.loss)
  samples = _resampled(grid, law)
  errors = np.log(grid.loss) - np.log(law(grid.n, grid.d))
  rng = np.random.default_rng(1)
  runs = {}
  for one_run in held_out:
    n, d = _parameters(one_run.facts), float(one_run.facts["tokens"])
    drawn = [float(sample(n, d) * np.exp(rng.choice(errors))) for sample in samples]
    low, high = _interval(drawn)
    name = one_run.name.rpartition("-")[0]
    prediction = {"predicted": float(law(n, d)), "low": low, "high": high}
    runs[name] = {"name": name, "parameters": n, "tokens": d, **prediction}
  path.write_text(json.dumps({"grid": names, "runs": runs}, indent=1))


def _compared(prediction: Mapping[str, Any], runs: Sequence[Result]) -> dict[str, Any]:
  """What was predicted for a larger run, and what its seeds measured."""
  return {**prediction, "measured": float(Points(runs).loss.mean())}


def _power_law(x: np.ndarray, loss: np.ndarray) -> dict[str, float | None]:
  """The exponent and scale of a power law; None where too few runs are left for it."""
  try:
    law = scaling_fits.power_law(x, loss)
  except UserError:
    return {"exponent": None, "scale": None}
  return {"exponent": law.exponent, "scale": law.scale}


def _fits(
  grid: Points, law: scaling_fits.Parametric, samples: Sequence[scaling_fits.Parametric]
) -> dict[str, Any]:
  """All fits by name, with their intervals."""
  longest, largest = grid.d == grid.d.max(), grid.n == grid.n.max()
  budgets = np.geomspace(grid.n.min() * grid.d.max() * 6, grid.n.max() * grid.d.min() * 6, 5)
  lowest = scaling_fits.envelope(grid.c, grid.n, grid.loss)
  parabolas = scaling_fits.iso_flops(grid.n, grid.d, grid.loss, sorted(budgets))
  compute, _, best = np.array(lowest).T
  fits: dict[str, Any] = {
    "kaplan_parameters": _power_law(grid.n[longest], grid.loss[longest]),
    "kaplan_parameters_with_embeddings": _power_law(grid.n_all[longest], grid.loss[longest]),
    "kaplan_tokens": _power_law(grid.d[largest], grid.loss[largest]),
    "kaplan_compute": _power_law(compute, best),
    "approach_1": {"exponent_of_parameters": scaling_fits.exponent(lowest), "points": lowest},
    "approach_2": {"exponent_of_parameters": scaling_fits.exponent(parabolas), "points": parabolas},
  }
  exponents = [s.beta / (s.alpha + s.beta) for s in samples]
  fits["approach_3"] = {
    **dataclasses.asdict(law),
    "intervals": {
      name: _interval([getattr(sample, name) for sample in samples])
      for name in ("E", "A", "B", "alpha", "beta")
    },
    "exponent_of_parameters": law.beta / (law.alpha + law.beta),
    "exponent_interval": _interval(exponents),
  }
  return fits


def _in_words(grid: Points, fits: dict[str, Any], held_out: list[dict]) -> str:
  third = fits["approach_3"]
  inside = sum(row["low"] <= row["measured"] <= row["high"] for row in held_out)
  off = max((abs(r["predicted"] / r["measured"] - 1) for r in held_out), default=float("nan"))
  rows = [
    (
      row["name"],
      f"{row['parameters']:,.0f}",
      f"{row['tokens']:,.0f}",
      f"{row['predicted']:.3f} [{row['low']:.3f}, {row['high']:.3f}]",
      f"{row['measured']:.3f}",
      f"{row['predicted'] / row['measured'] - 1:+.1%}",
    )
    for row in held_out
  ]
  predicted = tabulate.tabulate(
    rows, ("run", "parameters", "tokens", "predicted [95%]", "measured", "off"), "github"
  )
  laws = [
    ("alpha", f"{third['alpha']:.3f} {_span(third['intervals']['alpha'])}", "0.34; 0.348"),
    ("beta", f"{third['beta']:.3f} {_span(third['intervals']['beta'])}", "0.28; 0.366"),
    ("E", f"{third['E']:.3f} {_span(third['intervals']['E'])}", "1.69; 1.817"),
    (
      "N ~ C^a, approach 3",
      f"{third['exponent_of_parameters']:.2f} {_span(third['exponent_interval'])}",
      "0.46; 0.51",
    ),
    ("N ~ C^a, approach 2", _number(fits["approach_2"]["exponent_of_parameters"]), "0.49"),
    ("N ~ C^a, approach 1", _number(fits["approach_1"]["exponent_of_parameters"]), "0.50"),
    ("L ~ N^-a", _number(fits["kaplan_parameters"]["exponent"]), "0.076"),
    (
      "L ~ N^-a, embeddings counted",
      _number(fits["kaplan_parameters_with_embeddings"]["exponent"]),
      "",
    ),
    ("L ~ D^-a", _number(fits["kaplan_tokens"]["exponent"]), "0.095"),
    ("L ~ C^-a", _number(fits["kaplan_compute"]["exponent"]), "0.050"),
  ]
  return "\n".join(
    [
      f"{len(grid.loss)} runs: {grid.n.min():,.0f} to {grid.n.max():,.0f} parameters without "
      f"embeddings, {grid.d.min():,.0f} to {grid.d.max():,.0f} tokens, {grid.c.min():.2g} to "
      f"{grid.c.max():.2g} FLOPs.\n",
      f"**{inside} of {len(held_out)} larger runs ended inside the interval that was predicted "
      f"before; the largest error is {off:.1%}.**\n",
      predicted + "\n",
      "![loss against compute, and predicted against measured](scaling_law.png)\n",
      tabulate.tabulate(laws, ("", "here", "published"), "github", disable_numparse=True) + "\n",
      *_doubts(third),
      "Published: Hoffmann et al. 2022; for approach 3 the refit of Besiroglu et al. 2024 "
      "follows; Kaplan et al. 2020 for L. Intervals resample runs and seeds. Compute is counted in "
      "the traced program; approach 2 takes 6 N D, and shifts the optimum where its grid is not "
      "centred on it; approach 1 sees only the sizes of the grid.\n",
    ]
  )


def _doubts(third: dict[str, Any]) -> list[str]:
  """A sentence where the grid does not determine an exponent."""
  vague = [
    name
    for name in ("alpha", "beta")
    if not 0.05 < third[name] < 2 or np.ptp(third["intervals"][name]) > 0.5
  ]
  if not vague:
    return []
  return [
    f"**The grid does not determine {' and '.join(vague)}**: its losses hardly differ along that "
    "axis, beside the noise of a run. Take a wider grid or more seeds.\n"
  ]


def _span(interval: Sequence[float]) -> str:
  return f"[{interval[0]:.3f}, {interval[1]:.3f}]"


def _number(value: float | None) -> str:
  return "too few points" if value is None else f"{value:.3f}"


def _draw(
  grid: Points, law: scaling_fits.Parametric, held_out: list[dict], folder: pathlib.Path
) -> None:
  figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4.2), layout="constrained")
  for size in np.unique(grid.n):
    of_size = grid.n == size
    lengths = np.unique(grid.d[of_size])
    means = [grid.loss[of_size & (grid.d == length)].mean() for length in lengths]
    (line,) = left.plot(6 * size * lengths, means, "o", label=f"{size:,.0f}")
    smooth = np.geomspace(lengths[0], lengths[-1], 50)
    left.plot(6 * size * smooth, law(size, smooth), "-", color=line.get_color(), linewidth=0.8)
  for row in held_out:
    left.plot(6 * row["parameters"] * row["tokens"], row["measured"], "k*", markersize=9)
  left.set_xscale("log")
  left.set(
    xlabel="6 N D, FLOPs", ylabel="nats a token, held out", title="runs, law, larger runs (*)"
  )
  left.legend(title="parameters", frameon=False, fontsize=7)
  for row in held_out:
    error = [[row["predicted"] - row["low"]], [row["high"] - row["predicted"]]]
    right.errorbar(row["measured"], row["predicted"], yerr=error, fmt="o", capsize=3)
    right.annotate(row["name"], (row["measured"], row["predicted"]), fontsize=7)
  right.plot(grid.loss, law(grid.n, grid.d), "x", color="#adb5bd", markersize=4)
  span = [min(grid.loss.min(), *(r["measured"] for r in held_out), np.inf), grid.loss.max()]
  right.plot(span, span, "k:", linewidth=0.7)
  right.set(xlabel="measured", ylabel="by the law", title="predicted before they were trained")
  for suffix in ("png", "svg"):
    figure.savefig(folder / f"scaling_law.{suffix}", dpi=150)
  plt.close(figure)
