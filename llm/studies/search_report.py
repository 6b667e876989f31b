"""What a search says: a table, what matters, and a picture."""

from typing import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
import tabulate
from etils import epath

from llm.studies import plots
from llm.studies.search_space import Dimension


def in_words(goal: str, trials: Sequence[Mapping], matters: Sequence[Mapping]) -> str:
  """The report. The arguments are as in result.json."""
  best = trials[0]  # a trial that diverged is the last
  flags = " ".join(f"--config.{key}={value}" for key, value in best["values"].items())
  best_trial = (
    f"**The best is trial {best['trial']} ({_metric(best)} after {best['step']:,} steps):** "
    f"`{flags}`"
  )
  parts = [
    f"{len(trials)} trials by {goal}. "
    f"{'**Every trial diverged.**' if None in best['metric'] else best_trial}\n",
    _table(goal, trials) + "\n",
    "![the metric against each key](search.png)\n",
  ]
  if not matters:
    parts.append("Too few trials to say which key matters.\n")
    return "\n".join(parts)
  rows = [(row["key"], f"{row['share']:.0%}", f"{row['chance']:.0%}") for row in matters]
  heads = ("key", "explains of the ranks", "chance alone, at most (95%)")
  parts.append(tabulate.tabulate(rows, heads, "github", disable_numparse=True) + "\n")
  shown = [row["key"] for row in matters if row["share"] > row["chance"]]
  verdict = f"{', '.join(shown)} matters here" if shown else "no key is shown to matter"
  parts.append(
    f"**{verdict[0].upper()}{verdict[1:]}**: each key alone, in the first rung, where all trials "
    "have taken equal shares of their steps. In the middle of a schedule, lower rates look better "
    "than they end.\n"
  )
  return "\n".join(parts)


def _metric(trial: Mapping) -> str:
  """The mean of the seeds, and their range where there are several."""
  values = trial["metric"]
  if None in values:
    return "diverged"
  spread = f" ({min(values):.4g} to {max(values):.4g})" if len(values) > 1 else ""
  return f"{np.mean(values):.4g}{spread}"


def _table(goal: str, trials: Sequence[Mapping]) -> str:
  keys = list(trials[0]["values"])
  rows = [
    (t["trial"], *(t["values"][key] for key in keys), t["step"], _metric(t), f"{t['flops']:.2g}")
    for t in trials
  ]
  return tabulate.tabulate(rows, ("trial", *keys, "steps", goal, "FLOPs"), "github")


def draw(
  dimensions: Sequence[Dimension],
  trials: Sequence[Mapping],
  matters: Sequence[Mapping],
  folder: epath.Path,
):
  """A panel a key: the metric of each trial against its value; later rungs are darker."""
  figure, panels = plt.subplots(
    1, len(dimensions), figsize=(4.2 * len(dimensions), 3.8), layout="constrained", squeeze=False
  )
  finite = [trial for trial in trials if None not in trial["metric"]]
  shares = {row["key"]: f", explains {row['share']:.0%}" for row in matters}
  for dimension, axes in zip(dimensions, panels[0]):
    values = [trial["values"][dimension.key] for trial in finite]
    at = [dimension.choices.index(v) for v in values] if dimension.choices else values
    means = [np.mean(trial["metric"]) for trial in finite]
    axes.scatter(at, means, c=[trial["rung"] for trial in finite], cmap="Blues", edgecolor="k")
    axes.plot(at[:1], means[:1], "r*", markersize=13)
    if dimension.choices:
      axes.set_xticks(range(len(dimension.choices)), [str(c) for c in dimension.choices])
    elif dimension.log:
      axes.set_xscale("log")
    axes.set(xlabel=dimension.key, title=f"{dimension.key}{shares.get(dimension.key, '')}")
  plots.save(figure, folder / "search")
