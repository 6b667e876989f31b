"""Plots of the studies."""

import io
from typing import Any

import matplotlib
from etils import epath

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

# Model -> its name in the legend, its colour, its marker and line.
STYLES = {
  "pretrained": ("pretrained, then fine-tuned", "#1b6ca8", "o-"),
  "scratch": ("same architecture from scratch", "#d1495b", "s-"),
  "published_bert": ("a published BERT, then fine-tuned", "#2a9d5c", "D-"),
  "nbsvm": ("NBSVM", "#6c757d", "^--"),
  "tfidf_lr": ("TF-IDF + logistic regression", "#adb5bd", "v--"),
}


COLOURS = ("#e9a23b", "#7b5ea7", "#17becf", "#8c564b")


def _style(model: str, others: list[str]) -> tuple[str, str, str]:
  """The name, colour and line of a model. others: those without a style, in order."""
  if model in STYLES:
    return STYLES[model]
  return model, COLOURS[others.index(model) % len(COLOURS)], "o-"


def label_curve(rows: list[dict], path: epath.PathLike, title: str):
  """Writes accuracy against the number of labels: mean and standard deviation over draws.

  rows: results of `label_curve.run`. path: without its ending.
  """
  figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
  models = list(dict.fromkeys([*STYLES, *(row["model"] for row in rows)]))
  for model in models:
    label, colour, style = _style(model, models[len(STYLES) :])
    points = [row for row in rows if row["model"] == model]
    points.sort(key=lambda row: row["labels"])
    if points:
      axes.errorbar(
        [row["labels"] for row in points],
        [100 * row["accuracy_mean"] for row in points],
        yerr=[100 * row["accuracy_std"] for row in points],
        fmt=style,
        color=colour,
        capsize=3,
        label=label,
      )
  _over_labels(axes, sorted({row["labels"] for row in rows}))
  axes.set(xlabel="labels", ylabel="test accuracy, %", title=title)
  axes.legend(frameon=False)
  save(figure, path)


def worth(points: list[dict], path: epath.PathLike):
  """Writes how many labels from scratch equal the labels of each arm, with intervals.

  points: dicts of arm, labels, equal, low and high. path: as of `label_curve`.
  """
  figure, axes = plt.subplots(figsize=(6, 4.5), layout="constrained")
  arms = list(dict.fromkeys([*STYLES, *(point["arm"] for point in points)]))
  for arm in arms:
    label, colour, style = _style(arm, arms[len(STYLES) :])
    of_arm = [point for point in points if point["arm"] == arm]
    if of_arm:
      below = [point["equal"] - point["low"] for point in of_arm]
      above = [point["high"] - point["equal"] for point in of_arm]
      axes.errorbar(
        [point["labels"] for point in of_arm],
        [point["equal"] for point in of_arm],
        yerr=np.maximum([below, above], 0),
        fmt=style,
        color=colour,
        capsize=3,
        label=label,
      )
  counts = sorted({point["labels"] for point in points})
  axes.plot(counts, counts, "k:", linewidth=0.7)
  axes.set_yscale("log")
  _over_labels(axes, counts)
  axes.set(xlabel="labels", ylabel="labels from scratch that are worth the same")
  axes.legend(frameon=False)
  save(figure, path)


def gains(
  panels: dict[str, np.ndarray],
  marks: dict[str, np.ndarray],
  names: list[str],
  path: epath.PathLike,
):
  """Writes matrices of source x target, in points of accuracy; NaN is left white.

  panels: title -> the gains. marks: title -> whether each is told apart from 0, in bold.
  """
  columns = 2 if len(panels) > 1 else 1
  rows = -(-len(panels) // columns)
  figure, axes = plt.subplots(
    rows, columns, figsize=(4.5 * columns, 3.8 * rows), layout="constrained", squeeze=False
  )
  largest = max(np.nanmax(np.abs(gain)) for gain in panels.values()) or 1.0
  for axis in axes.flat[len(panels) :]:
    axis.set_axis_off()
  for axis, (title, gain) in zip(axes.flat, panels.items()):
    axis.imshow(gain, cmap="RdBu", vmin=-largest, vmax=largest)
    for (source, target), value in np.ndenumerate(gain):
      if np.isfinite(value):
        weight = "bold" if marks[title][source, target] else "normal"
        axis.text(target, source, f"{value:+.1f}", ha="center", va="center", weight=weight)
    axis.set_xticks(range(len(names)), names, rotation=20)
    axis.set_yticks(range(len(names)), names)
    axis.set(xlabel="target", ylabel="source", title=title)
  save(figure, path)


def _over_labels(axes: Any, counts: list[int]):
  """A logarithmic axis of label counts."""
  axes.set_xscale("log")
  axes.set_xticks(counts, [f"{count:,}" for count in counts])
  axes.minorticks_off()


def reply_loss(curves: dict[str, list[tuple[int, float]]], path: epath.PathLike):
  """Writes the loss of held-out replies against the steps of fine-tuning.

  curves: (step, nats a token) of each evaluation, by the name of the model. path: without its
  ending.
  """
  figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
  for (name, points), colour in zip(curves.items(), ("#1b6ca8", "#d1495b")):
    axes.plot(*zip(*points), "o-", color=colour, label=name)
  axes.set(xlabel="steps of fine-tuning", ylabel="nats a token", title="Held-out replies")
  axes.legend(frameon=False)
  save(figure, path)


def save(figure: Figure, path: epath.PathLike):
  """Writes a figure as PATH.png and PATH.svg."""
  for ending in ("png", "svg"):
    picture = io.BytesIO()
    figure.savefig(picture, dpi=150, format=ending)
    epath.Path(f"{path}.{ending}").write_bytes(picture.getvalue())
  plt.close(figure)
