"""What the study of emergence says, in words and a picture."""

from typing import Any, Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
import tabulate
from etils import epath
from matplotlib.ticker import NullFormatter

from llm.studies import plots

MEANING = {
  "one seed": "one seed tells nothing of others",
  "not learned": "most seeds never reach 50% exact match, so there is no threshold to look at: "
  "nothing is shown",
  "no threshold here": "every point has 50% exact match on average, so a threshold lies before the "
  "first one, if anywhere",
  "no jump": "exact match does not jump",
  "a jump in both": "the loss of a token jumps with exact match: the model changes there, "
  "whichever metric one takes",
  "a sharp metric": "exact match jumps where the loss of a token does not: a smooth curve under a "
  "sharp metric",
  "undecided": "exact match jumps, and the loss of a token may or may not: these seeds do not tell "
  "a jump of the model from one of the metric",
}


def in_words(tasks: Mapping[str, Any]) -> str:
  """The report. tasks: as in result.json."""
  parts = ["![exact match and loss against scale and each other](emergence.png)\n"]
  for task, figures in tasks.items():
    parts += [f"## {task.replace('_', ' ')}\n", _table(figures["sizes"]) + "\n"]
    parts += [_sentence(name, view) + "\n" for name, view in figures["views"].items()]
  parts.append(
    "In the tables, the mean of the seeds stands before the lowest and the highest; intervals of "
    "the largest step are Student's. A seed has learned a task where its exact match is "
    "50% or more. The largest step is the largest change between neighbouring points, of the "
    "change from the worst to the best; lengths of training double from point to point. Every "
    "length is an evaluation of the same run, whose rate is constant after the warm-up. Exact "
    "match is that of greedy decoding.\n"
  )
  return "\n".join(parts)


def _table(rows: Sequence[dict]) -> str:
  cells = [
    (
      row["size"],
      f"{row['parameters']:,}",
      _interval(row["loss"], ".3f"),
      _interval(row["accuracy"], ".1%"),
      _interval(row["exact_match"], ".1%"),
      f"{row['learned']} of {row['seeds']}",
      f"{row['flops']:.2g}",
    )
    for row in rows
  ]
  heads = (
    "size",
    "parameters",
    "nats a token [of the seeds]",
    "right tokens",
    "exact match",
    "seeds that learned",
    "FLOPs",
  )
  return tabulate.tabulate(cells, heads, "github", disable_numparse=True)


def _interval(values: Sequence[float], form: str) -> str:
  mean, low, high = values
  return f"{mean:{form}} [{low:{form}}, {high:{form}}]"


def _sentence(name: str, view: Mapping[str, Any]) -> str:
  """What one view shows."""
  return (
    f"**Over {view['points']} {name}: {view['verdict']}.** The largest step has "
    f"{_interval(view['largest_step_exact_match'], '.0%')} of the change of exact match and "
    f"{_interval(view['largest_step_loss'], '.0%')} of that of the loss. A straight line has "
    f"{1 / (view['points'] - 1):.0%}, a jump {view['jump']:.0%} or more: "
    f"{MEANING[view['verdict']]}."
  )


def draw(curves: Mapping[str, Any], folder: epath.Path):
  """A row a task: exact match and loss against size, exact match against steps, and against loss.

  curves: task -> emergence.Curves.
  """
  figure, axes = plt.subplots(
    len(curves), 4, figsize=(15, 3.4 * len(curves)), layout="constrained", squeeze=False
  )
  for (task, of_task), (exact, loss, length, beside) in zip(curves.items(), axes):
    _against_size(exact, of_task, "exact_match", f"{task.replace('_', ' ')}: exact match")
    _against_size(loss, of_task, "loss", "nats a token")
    for size, metrics in zip(of_task.sizes, of_task.evaluations):
      (line,) = length.plot(of_task.steps, metrics["exact_match"].mean(0), label=size)
      for seed in metrics["exact_match"]:
        length.plot(of_task.steps, seed, color=line.get_color(), linewidth=0.4, alpha=0.6)
      beside.plot(metrics["loss"].ravel(), metrics["exact_match"].ravel(), ".", markersize=3)
    length.set(xscale="log", xlabel="steps", ylabel="exact match")
    length.xaxis.set_minor_formatter(NullFormatter())
    length.legend(frameon=False, fontsize=7)
    beside.invert_xaxis()
    beside.set(xlabel="nats a token", ylabel="exact match")
  plots.save(figure, folder / "emergence")


def _against_size(axes: Any, curves: Any, metric: str, label: str):
  """The seeds of each size as points, their mean as a line."""
  values = curves.by_size(metric)
  for parameters, of_size in zip(curves.parameters, values):
    axes.plot([parameters] * len(of_size), of_size, "o", color="#adb5bd", markersize=4)
  axes.plot(curves.parameters, [np.mean(of_size) for of_size in values], "k-", linewidth=1)
  axes.set(xscale="log", xlabel="size, by parameters", ylabel=label)
  axes.set_xticks(curves.parameters, curves.sizes)
  axes.xaxis.set_minor_formatter(NullFormatter())
