"""Plots of the studies."""

import pathlib

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.figure import Figure

# Model -> its name in the legend, its colour, its marker and line.
STYLES = {
  "pretrained": ("pretrained, then fine-tuned", "#1b6ca8", "o-"),
  "scratch": ("same architecture from scratch", "#d1495b", "s-"),
  "published_bert": ("a published BERT, then fine-tuned", "#2a9d5c", "D-"),
  "nbsvm": ("NBSVM", "#6c757d", "^--"),
  "tfidf_lr": ("TF-IDF + logistic regression", "#adb5bd", "v--"),
}


def label_curve(rows: list[dict], path: pathlib.Path, title: str):
  """Writes a PNG of accuracy against the number of labels: mean and standard deviation over draws.

  rows: results of `label_efficiency.run`.
  """
  figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
  for model, (label, colour, style) in STYLES.items():
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
  counts = sorted({row["labels"] for row in rows})
  axes.set_xscale("log")
  axes.set_xticks(counts, [f"{count:,}" for count in counts])
  axes.minorticks_off()
  axes.axhline(50, color="black", linewidth=0.5, linestyle=":")
  axes.set(xlabel="labels", ylabel="test accuracy, %", title=title)
  axes.legend(frameon=False)
  figure.savefig(path, dpi=150)
  plt.close(figure)


def reply_loss(curves: dict[str, list[tuple[int, float]]], path: pathlib.Path):
  """Writes a PNG of the loss of held-out replies against the steps of fine-tuning.

  curves: (step, nats a token) of each evaluation, by the name of the model.
  """
  figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
  for (name, points), colour in zip(curves.items(), ("#1b6ca8", "#d1495b")):
    axes.plot(*zip(*points), "o-", color=colour, label=name)
  axes.set(xlabel="steps of fine-tuning", ylabel="nats a token", title="Held-out replies")
  axes.legend(frameon=False)
  figure.savefig(path, dpi=150)
  plt.close(figure)


def save(figure: Figure, path: pathlib.Path):
  """Writes a figure as PATH.png and PATH.svg."""
  for ending in ("png", "svg"):
    figure.savefig(path.with_name(f"{path.name}.{ending}"), dpi=150)
  plt.close(figure)
