"""What helps what: labels of one task for another, from scratch and after pretraining.

A network learns a source task from all of its labels, then a target task from few (Pruksachatkun et
al. 2020 call the first an intermediate task). The gain is the accuracy beside that of the same
start without a source, over the same draws of the target's labels.
"""

import dataclasses
from typing import Any, Mapping, Sequence

import numpy as np
import tabulate
from etils import epath

from llm.config import Config, key
from llm.core import UserError
from llm.runs import metrics
from llm.studies import few_labels, frame, label_curve, plots
from llm.studies.few_labels import Arm, Cell
from llm.studies.runs import Result, Run

SCRATCH = "scratch"
STARTS = (SCRATCH, "pretrained")
NONE = "none"  # no source


@dataclasses.dataclass(frozen=True)
class Study(frame.Study):
  """tasks: NAME=SOURCE, each with {split} for train, validation and test. fields: as
  config.data.fields, for all of them. checkpoint: `here` is config.run, pretrained as a part of the
  study. starts: scratch, pretrained or both. seeds: runs of each source. source_epochs: of its
  labels. labels, rates, searched, length and batch_size: as of the study label_efficiency.
  """

  title = "Related tasks"

  tasks: tuple = (
    "films=embedded:reviews[{split}]",
    "products=embedded:products[{split}]",
    "editorials=embedded:editorials[{split}]",
    "tweets=embedded:tweets[{split}]",
  )
  fields: str = ""
  checkpoint: str = "here"
  starts: tuple = STARTS
  seeds: int = key(2, at_least=1)
  source_epochs: int = key(3, at_least=1)
  labels: tuple = ("32x6:20", "256x4:6", "1024x3:3")
  rates: tuple = ("1", "3")
  searched: int = key(1, at_least=1)
  length: int = key(40, at_least=4)
  batch_size: int = key(32, at_least=1)

  def quick(self) -> "Study":
    labels = ("32x4:20",)
    return dataclasses.replace(
      self, tasks=self.tasks[:3], seeds=1, labels=labels, rates=self.rates[:1]
    )

  def next_runs(self, base: Config, done: Sequence[Result], folder: epath.Path) -> list[Run]:
    tasks = self._tasks()
    settings = [few_labels.setting(text, self.searched, self.rates) for text in self.labels]
    if not done:
      for target in tasks.values():
        few_labels.check_target(target, self.fields, base.data.cache)
    pretraining = [few_labels.pretraining(base)] if self.checkpoint == few_labels.HERE else []
    if few_labels.missing(pretraining, done):
      return pretraining
    first = few_labels.checkpoint(self.checkpoint, folder)
    sources = [
      self._source(start, source, seed, self._arm(first, start == SCRATCH, tasks[source], base))
      for start in self.starts
      for source in tasks
      for seed in range(self.seeds)
    ]
    if few_labels.missing(sources, done):
      return [*pretraining, *sources]
    cells = [
      _cell(facts, self._arm(start, scratch, tasks[facts["target"]], base), setting)
      for facts, start, scratch in self._pairs(sources, first, folder)
      for setting in settings
    ]
    return [*pretraining, *sources, *cells]

  def _pairs(
    self, sources: Sequence[Run], first: str, folder: epath.Path
  ) -> list[tuple[dict[str, Any], str, bool]]:
    """(facts, the checkpoint to start from, whether from scratch) of each source and target.

    first: the checkpoint without a source.
    """
    pairs = []
    for target in self._tasks():
      for start in self.starts:
        facts = {"start": start, "source": NONE, "seed": 0, "target": target}
        pairs.append((facts, first, start == SCRATCH))
      for run in sources:
        if run.facts["source"] != target:
          facts = {name: run.facts[name] for name in ("start", "source", "seed")}
          pairs.append(({**facts, "target": target}, str(folder / "runs" / run.name), False))
    return pairs

  def _tasks(self) -> dict[str, str]:
    """Name -> source. Raises UserError on fewer than two, and on names that are taken."""
    named = [few_labels.named(text, "config.study.tasks") for text in self.tasks]
    tasks = dict(named)
    if len(tasks) < 2 or len(tasks) < len(named) or NONE in tasks:
      raise UserError(
        f"config.study.tasks={self.tasks}: transfer needs 2 tasks at least, each with its own "
        f"name, and none of them {NONE!r}"
      )
    if not self.starts or not set(self.starts) <= set(STARTS):
      raise UserError(f"config.study.starts must be of {', '.join(STARTS)}, not {self.starts}")
    return tasks

  def _arm(self, checkpoint: str, scratch: bool, target: str, base: Config) -> Arm:
    return Arm(
      checkpoint=checkpoint,
      scratch=scratch,
      target=target,
      fields=self.fields,
      cache=base.data.cache,
      length=self.length,
      batch_size=self.batch_size,
    )

  def _source(self, start: str, source: str, seed: int, arm: Arm) -> Run:
    """Learns a source task from all of its labels."""
    config = arm.config()
    training = dataclasses.replace(
      config.training, epochs=float(self.source_epochs), seed=seed, keep=1, eval_every=0
    )
    facts = {"role": "source", "start": start, "source": source, "seed": seed}
    name = f"{start}-{source}-{seed}"
    return Run(name, dataclasses.replace(config, training=training), facts)

  def report(self, done: Sequence[Result], folder: epath.Path) -> tuple[dict[str, Any], str]:
    rows = few_labels.result_rows(done)
    tasks = list(self._tasks())
    gains = _gains(rows)
    panels, marks = _matrices(gains, tasks)
    plots.gains(panels, marks, tasks, folder / "related_tasks")
    sources = [result for result in done if result.run.facts.get("role") == "source"]
    return {"gains": gains, "rows": rows}, _in_words(rows, gains, sources)


def _cell(facts: Mapping[str, Any], arm: Arm, setting: few_labels.Setting) -> Cell:
  name = "-".join(str(facts[part]) for part in ("start", "source", "seed"))
  name = few_labels.name_of(f"{name}-to-{facts['target']}", setting)
  more = {"role": "fine-tuning", "arm": name, "labels": setting.labels}
  return Cell(name, arm.config(), {**facts, **more}, arm=arm, setting=setting)


def _gains(rows: Sequence[Mapping]) -> list[dict[str, Any]]:
  """For each start, source, target and label count, what the source adds, with its interval."""
  plain = {
    (row["start"], row["target"], row["labels"]): np.array(row["accuracies"])
    for row in rows
    if row["source"] == NONE
  }
  groups: dict[tuple, list[np.ndarray]] = {}
  for row in rows:
    if row["source"] != NONE:
      without = plain[row["start"], row["target"], row["labels"]]
      key = (row["start"], row["source"], row["target"], row["labels"])
      groups.setdefault(key, []).append(np.array(row["accuracies"]) - without)
  gains = []
  for (start, source, target, labels), of_seeds in groups.items():
    gain_SxD = np.stack(of_seeds)
    # All sources share the draws of labels, so these are the columns.
    low, high = metrics.seeds_interval(gain_SxD)
    entry = {"start": start, "source": source, "target": target, "labels": labels}
    gains.append({**entry, "gain": float(gain_SxD.mean()), "low": low, "high": high})
  return gains


def _matrices(
  gains: Sequence[Mapping], tasks: list[str]
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
  """Title -> the gains in points, and whether they are told apart from 0: source x target."""
  panels = {}
  marks = {}
  for entry in gains:
    title = f"{entry['start']}, {entry['labels']:,} labels"
    at = tasks.index(entry["source"]), tasks.index(entry["target"])
    shape = (len(tasks), len(tasks))
    panels.setdefault(title, np.full(shape, np.nan))[at] = 100 * entry["gain"]
    marks.setdefault(title, np.zeros(shape, bool))[at] = entry["low"] > 0 or entry["high"] < 0
  return panels, marks


def _in_words(rows: Sequence[Mapping], gains: Sequence[Mapping], sources: Sequence[Result]) -> str:
  told_apart = [entry for entry in gains if entry["low"] > 0 or entry["high"] < 0]
  helps = sum(entry["low"] > 0 for entry in gains)
  by_gain = sorted(told_apart, key=lambda entry: -entry["gain"])
  shown = [*by_gain[:5], *by_gain[5:][-3:]]
  headers = ("start", "source", "target", "labels", "gain, points [95%]")
  table = tabulate.tabulate(
    [_cells(entry) for entry in gains], headers, "github", disable_numparse=True
  )
  plain = [row for row in rows if row["source"] == NONE]
  levels = [
    (row["start"], row["target"], f"{row['labels']:,}", f"{100 * row['accuracy_mean']:.1f}")
    for row in plain
  ]
  level_headers = ("start", "target", "labels", "accuracy, %")
  learned = [
    (result.run.name, f"{100 * result.figures['eval']['accuracy']:.1f}") for result in sources
  ]
  return "\n".join(
    [
      f"**Of {len(gains)} pairs of source and target, {helps} help and {len(told_apart) - helps} "
      f"harm; {len(gains) - len(told_apart)} are not told apart from no source.** By chance alone "
      f"about {0.05 * len(gains):.0f} would be.\n",
      *[f"- {_sentence(entry)}" for entry in shown],
      "",
      "![gain of a source for a target](related_tasks.png)\n",
      table + "\n",
      "Without a source:\n",
      tabulate.tabulate(levels, level_headers, "github", disable_numparse=True) + "\n",
      "How well the sources were learned, on their validation splits:\n",
      tabulate.tabulate(learned, ("run", "accuracy, %"), "github", disable_numparse=True) + "\n",
      *few_labels.remarks(rows),
      "A source gives the layers, not the head. Intervals are Student's: they take the runs of the "
      "source and the draws of the target's labels as drawn. All sources share the draws. A task "
      "whose classes are unequal has an accuracy over one half before anything is learned.\n",
    ]
  )


def _cells(entry: Mapping[str, Any]) -> tuple[str, ...]:
  gain = label_curve.in_points(entry["gain"], entry["low"], entry["high"])
  return entry["start"], entry["source"], entry["target"], f"{entry['labels']:,}", gain


def _sentence(entry: Mapping[str, Any]) -> str:
  start, source, target, labels, gain = _cells(entry)
  return f"{source} for {target}, {labels} labels, {start}: {gain}"
