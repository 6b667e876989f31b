"""What a scaling law says, in words and a picture."""

from typing import Any, Sequence

import matplotlib.pyplot as plt
import numpy as np
import tabulate
from etils import epath

from llm.studies import plots
from llm.studies.scaling_fits import Parametric

_HELD_OUT = ("run", "parameters", "tokens", "predicted [95%]", "measured", "off", "passes")


def in_words(
  grid: Any,
  fits: dict[str, Any],
  held_out: Sequence[dict],
  optimal: Sequence[dict],
  largest: float,
) -> str:
  """The report. grid: scaling_law.Points. largest: 6 N D of the grid. The others are as in
  result.json."""
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
      f"{row['passes']:.1f}",
    )
    for row in held_out
  ]
  predicted = tabulate.tabulate(rows, _HELD_OUT, "github")
  return "\n".join(
    [
      f"{len(grid.loss)} runs: {grid.n.min():,.0f} to {grid.n.max():,.0f} parameters without "
      f"embeddings, {grid.d.min():,.0f} to {grid.d.max():,.0f} tokens, {grid.c.min():.2g} to "
      f"{grid.c.max():.2g} FLOPs, {grid.seeds} seeds, up to {grid.passes.max():.1f} passes over a "
      f"text. The learning rate is not searched: {_rule(grid)} Another rule would bend the law.\n",
      f"**{inside} of {len(held_out)} larger runs ended inside the interval that was predicted; "
      f"the largest error is {off:.1%}.** {_when(held_out)}\n",
      predicted + "\n",
      "![loss against compute, and predicted against measured](scaling_law.png)\n",
      _table_of_laws(fits) + "\n",
      *_doubts(third),
      "The least loss of a budget of 6 N D FLOPs, by approach 3:\n",
      *_outside(grid, optimal),
      _table_of_budgets(optimal, largest) + "\n",
      "Published: Hoffmann et al. 2022; for approach 3 the refit of Besiroglu et al. 2024 "
      "follows; Kaplan et al. 2020 for L. Intervals resample runs and seeds. Compute is counted in "
      "the traced program for Kaplan's law and approach 1; approaches 2 and 3 take 6 N D, with N "
      "without embeddings. Approach 2 shifts the optimum where its grid is not "
      "centred on it; approach 1 sees only the sizes of the grid.\n",
    ]
  )


def _rule(grid: Any) -> str:
  """Where the learning rates come from."""
  rates = f"{grid.rates[0]:.2g} to {grid.rates[-1]:.2g}"
  if not grid.by_the_rule:
    return f"it is set, {rates}."
  return f"it follows width, batch and tokens by the rule of docs/recipes.md, here from {rates}."


def _when(held_out: Sequence[dict]) -> str:
  """Which predictions were made before the runs."""
  after = [row["name"] for row in held_out if not row["before"]]
  if not after:
    return "All were predicted before they were trained."
  return f"What is said of {', '.join(after)} was computed after it was trained."


def _table_of_laws(fits: dict[str, Any]) -> str:
  third = fits["approach_3"]
  of_all = fits["approach_3_with_embeddings"]
  intervals = third["intervals"]
  laws = [
    ("alpha", f"{third['alpha']:.3f} {_span(intervals['alpha'])}", "0.34; 0.348"),
    ("beta", f"{third['beta']:.3f} {_span(intervals['beta'])}", "0.28; 0.366"),
    ("E", f"{third['E']:.3f} {_span(intervals['E'])}", "1.69; 1.817"),
    (
      "N ~ C^a, approach 3",
      f"{third['exponent_of_parameters']:.3f} {_span(third['exponent_interval'])}",
      "0.46; 0.51",
    ),
    ("N ~ C^a, approach 3, embeddings counted", f"{of_all['exponent_of_parameters']:.3f}", ""),
    ("N ~ C^a, approach 2", _number(fits["approach_2"]["exponent_of_parameters"]), "0.49"),
    ("N ~ C^a, approach 1", _number(fits["approach_1"]["exponent_of_parameters"]), "0.50"),
    ("L ~ N^-a", _exponent(fits["kaplan_parameters"]), "0.076"),
    ("L ~ N^-a, embeddings counted", _exponent(fits["kaplan_parameters_with_embeddings"]), ""),
    ("L ~ D^-a", _exponent(fits["kaplan_tokens"]), "0.095"),
    ("L ~ C^-a", _exponent(fits["kaplan_compute"]), "0.050"),
  ]
  return tabulate.tabulate(laws, ("", "here", "published"), "github", disable_numparse=True)


def _table_of_budgets(optimal: Sequence[dict], largest: float) -> str:
  """largest: 6 N D of the grid."""
  rows = [
    (
      f"{row['flops']:.2g}",
      f"{row['flops'] / largest:.3g}",
      f"{row['parameters']:.2g} {_span(row['parameters_interval'], '.2g')}",
      f"{row['tokens']:.2g} {_span(row['tokens_interval'], '.2g')}",
      f"{row['tokens'] / row['parameters']:.3g}",
      f"{row['loss']:.3f}",
    )
    for row in optimal
  ]
  heads = ("FLOPs", "times the grid", "parameters [95%]", "tokens [95%]", "D / N", "loss")
  return tabulate.tabulate(rows, heads, "github", disable_numparse=True)


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


def _outside(grid: Any, optimal: Sequence[dict]) -> list[str]:
  """A sentence where the optimum of the least budget lies beyond the sizes of the grid."""
  least = min(optimal, key=lambda row: row["flops"])
  if grid.n.min() <= least["parameters"] <= grid.n.max():
    return []
  smaller = least["parameters"] < grid.n.min()
  beyond, better = ("below", "more text") if smaller else ("above", "a larger model")
  return [
    f"**The best size for {least['flops']:.2g} FLOPs is {beyond} all of the grid**: {better} is "
    "worth more everywhere in it, and the table extrapolates.\n"
  ]


def _span(interval: Sequence[float], form: str = ".3f") -> str:
  low, high = interval
  return f"[{low:{form}}, {high:{form}}]"


def _exponent(fit: dict[str, Any]) -> str:
  if fit["exponent"] is None:
    return "too few points"
  return f"{fit['exponent']:.3f} {_span(fit['exponent_interval'])}"


def _number(value: float | None) -> str:
  return "too few points" if value is None else f"{value:.3f}"


def draw(grid: Any, law: Parametric, held_out: Sequence[dict], folder: epath.Path) -> None:
  """Draws the runs, the law and the predictions. The arguments are those of `in_words`."""
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
    (point,) = right.plot(row["measured"], row["predicted"], "o")
    right.vlines(row["measured"], row["low"], row["high"], color=point.get_color())
    right.annotate(row["name"], (row["measured"], row["predicted"]), fontsize=7)
  right.plot(grid.loss, law(grid.n, grid.d), "x", color="#adb5bd", markersize=4)
  span = [min(grid.loss.min(), *(r["measured"] for r in held_out), np.inf), grid.loss.max()]
  right.plot(span, span, "k:", linewidth=0.7)
  right.set(xlabel="measured", ylabel="by the law", title="predicted before they were trained")
  plots.save(figure, folder / "scaling_law")
