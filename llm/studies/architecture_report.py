"""What the architectures' runs say: figures, words and a picture."""

from typing import Any, Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
import scipy.stats
import tabulate
from etils import epath

from llm.core import UserError
from llm.runs import metrics
from llm.runs.log import duration
from llm.studies import architecture_tasks as tasks_lib
from llm.studies import plots
from llm.studies.runs import Result

NOTE = (
  "Every model was pretrained with about the same FLOPs, on the same text with the same pieces, at "
  "the best of as many learning rates by its own held-out loss, and fine-tuned with as many on the "
  "validation split. The test split was scored once for each seed; a seed is a "
  "pretraining with its fine-tuning, so the intervals, Student's over the seeds, hold both. Losses "
  "of pretraining do not compare. An encoder writes no replies. Questions are answered by a span "
  "of the context (encoder), or in writing (the others); sentiment is a head on the mean of the "
  "states, or the likelier of two texts (encoder-decoder).\n"
)


def report(
  done: Sequence[Result], rates: Mapping[str, str], tasks: Sequence[str], folder: epath.Path
) -> tuple[dict[str, Any], str]:
  """(figures, text) of a study. rates: NAME:LAYERS:OBJECTIVE -> the rate that was chosen.

  Raises UserError on too few runs.
  """
  pretrained = {model: _pretrained(done, model, rate) for model, rate in rates.items()}
  of_tasks = {task: _of_task(done, task, list(rates)) for task in tasks}
  compared = {task: _compared(of_task) for task, of_task in of_tasks.items()}
  _draw(of_tasks, folder / "architectures")
  figures = {"pretraining": pretrained, "tasks": of_tasks, "compared": compared}
  return figures, _in_words(pretrained, of_tasks, compared)


def _pretrained(done: Sequence[Result], model: str, rate: str) -> dict[str, Any]:
  """What the pretrainings of a model were, by the last one at the rate that was chosen."""
  last = [
    result
    for result in done
    if result.run.facts["role"] == "pretraining"
    and (result.run.facts["model"], result.run.facts["rate"]) == (model, rate)
    and not result.diverged
  ][-1]
  return {
    "parameters": last.figures["parameters"],
    "flops": last.figures["flops"],
    "tokens": sum(source["tokens"] for source in last.figures["data"].values()),
    "seconds": last.figures["seconds"],
    "rate": last.run.facts["rate"],
  }


def _of_task(done: Sequence[Result], task: str, names: Sequence[str]) -> dict[str, dict[str, Any]]:
  """Model -> its test figures over the seeds, with the 95% interval of their mean."""
  results = {}
  for model in names:
    of_task = tasks_lib.form(task, model.partition(":")[0])
    if of_task is None:
      continue
    runs = [
      result
      for result in done
      if result.run.facts.get("task") == task
      and result.run.facts["model"] == model
      and result.run.facts["split"] == "test"
      and not result.diverged
    ]
    values = [result.figures["eval"][of_task.metric] for result in runs]
    if not values:
      raise UserError(f"every run of {model} on {task} diverged")
    low, high = metrics.seeds_interval(np.array([values]))
    results[model] = {
      "metric": of_task.metric,
      "values": values,
      "mean": float(np.mean(values)),
      "low": low,
      "high": high,
      "rate": runs[0].run.facts["rate"],
    }
  return results


def _compared(of_task: Mapping[str, Mapping]) -> list[dict[str, Any]]:
  """The best model minus each other one, with Welch's 95% interval."""
  lower = next(iter(of_task.values()))["metric"] == "loss"
  ordered = sorted(of_task, key=lambda model: of_task[model]["mean"], reverse=not lower)
  best, others = ordered[0], ordered[1:]
  entries = []
  for other in others:
    a, b = of_task[best]["values"], of_task[other]["values"]
    difference = float(np.mean(a) - np.mean(b))
    low = high = float("nan")
    if min(len(a), len(b)) > 1:
      interval = scipy.stats.ttest_ind(a, b, equal_var=False).confidence_interval(0.95)
      low, high = float(interval.low), float(interval.high)
    entry = {"best": best, "other": other, "difference": difference, "low": low, "high": high}
    entries.append({**entry, "told_apart": low > 0 or high < 0})
  return entries


def _in_words(
  pretrained: Mapping[str, Mapping],
  tasks: Mapping[str, Mapping[str, Mapping]],
  compared: Mapping[str, Sequence[Mapping]],
) -> str:
  first = [
    (
      model,
      f"{of['parameters']:,}",
      f"{of['flops']:.2e}",
      f"{of['tokens'] / 1e6:.1f} M",
      duration(of["seconds"]),
      of["rate"],
    )
    for model, of in pretrained.items()
  ]
  headers = ("model", "parameters", "FLOPs", "tokens read", "time", "rate")
  second = [(model, *(_cell(tasks[task].get(model)) for task in tasks)) for model in pretrained]
  task_headers = ("test, mean over seeds [95%]", *(_heading(task, tasks[task]) for task in tasks))
  return "\n".join(
    [
      *[f"- {_sentence(task, entries)}" for task, entries in compared.items() if entries],
      "",
      tabulate.tabulate(second, task_headers, "github", disable_numparse=True) + "\n",
      "![test figures of the models](architectures.png)\n",
      tabulate.tabulate(first, headers, "github", disable_numparse=True) + "\n",
      NOTE,
    ]
  )


def _heading(task: str, of_task: Mapping[str, Mapping]) -> str:
  metric = next(iter(of_task.values()))["metric"]
  unit = {"loss": "nats a token", "accuracy": "accuracy, %"}.get(metric, "F1, %")
  return f"{task}, {unit}"


def _scale(metric: str) -> float:
  """Shares are shown in hundredths."""
  return 1.0 if metric == "loss" else 100.0


def _cell(of_model: Mapping[str, Any] | None) -> str:
  if of_model is None:
    return "-"
  scale, digits = _scale(of_model["metric"]), 2 if of_model["metric"] == "loss" else 1
  mean, low, high = (scale * of_model[name] for name in ("mean", "low", "high"))
  if np.isnan(low):
    return f"{mean:.{digits}f} (one seed)"
  return f"{mean:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def _sentence(task: str, entries: Sequence[Mapping]) -> str:
  """Which model is best on a task, and from which others it is told apart."""
  apart = [entry["other"] for entry in entries if entry["told_apart"]]
  others = [entry["other"] for entry in entries if not entry["told_apart"]]
  sentence = f"**{task}: {entries[0]['best']} is best**"
  if apart:
    sentence += f", and is told apart from {', '.join(apart)}"
  if others:
    sentence += f"; it is not told apart from {', '.join(others)}"
  return f"{sentence}."


def _draw(tasks: Mapping[str, Mapping[str, Mapping]], path: epath.Path) -> None:
  figure, axes = plt.subplots(1, len(tasks), figsize=(4 * len(tasks), 3.8), layout="constrained")
  for axis, (task, of_task) in zip(np.atleast_1d(axes), tasks.items()):
    for place, of_model in enumerate(of_task.values()):
      scale = _scale(of_model["metric"])
      values = scale * np.array(of_model["values"])
      axis.plot([place] * len(values), values, "o", color="#adb5bd", markersize=4)
      half = np.nan_to_num(scale * (of_model["high"] - of_model["mean"]))
      axis.errorbar(place, values.mean(), half, fmt="D", color="#1b6ca8", capsize=4)
    names = [model.rpartition(":")[0] for model in of_task]
    axis.set_xticks(range(len(names)), names, rotation=30)
    axis.set(title=_heading(task, of_task))
  plots.save(figure, path)
