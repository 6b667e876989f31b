"""The nine tasks of GLUE from any checkpoint, by the published protocol.

For each task, all learning rates and epochs are run with one seed, and what is best on the
validation split is run with the other seeds; the figure is their median (Devlin et al. 2019,
section 4.1, and the README of google-research/bert for the small models). The small tasks may start
from the checkpoint that learned MNLI (Liu et al. 2019, section 5.1).
"""

import dataclasses
from typing import Any, Mapping, Sequence

import jax
import matplotlib.pyplot as plt
import numpy as np
import tabulate
from etils import epath

from llm import sharding
from llm.checkpoints import manager
from llm.config import Config, DataConfig, MeshConfig, key
from llm.core import UserError, round_up
from llm.data import batches, glue, sources
from llm.studies import frame, plots
from llm.studies.runs import Result, Run
from llm.studies.scored import Scored
from llm.training import evaluation, experiment

# GLUE's test set, in the order of glue.TASKS: MNLI as matched/mismatched, others with two figures
# in the order of their metrics, and - for what was not published. The small ones are of the README
# of google-research/bert, base and large of Devlin et al. 2019 (table 1).
PUBLISHED = {
  "BERT tiny": "0.0 83.2 81.1/71.1 74.3/73.6 62.2/83.4 70.2/70.3 81.5 57.2 62.3",
  "BERT mini": "0.0 85.9 81.1/71.8 75.4/73.3 66.4/86.2 74.8/74.3 84.1 57.9 62.3",
  "BERT small": "27.8 89.7 83.4/76.2 78.8/77.0 68.1/87.0 77.6/77.0 86.4 61.8 62.3",
  "BERT medium": "38.0 89.6 86.6/81.6 80.4/78.4 69.6/87.9 80.0/79.1 87.7 62.2 62.3",
  "BERT base": "52.1 93.5 88.9/- -/85.8 71.2/- 84.6/83.4 90.5 66.4 -",
  "BERT large": "60.5 94.9 89.3/- -/86.5 72.1/- 86.7/85.9 92.7 70.1 -",
}
NOTE = (
  "Figures here are of the validation split, on which rate and epochs were chosen; those that are "
  "published are of the test split, which only GLUE's server scores. The average is that of Devlin "
  "et al. 2019: both figures of MNLI, F1 of QQP and MRPC, Spearman's correlation of STS-B, without "
  "WNLI.\n"
)


@dataclasses.dataclass(frozen=True)
class Study(frame.Study):
  """data: a source with {task} and {split}, whose labels are those of GLUE. fields: whether its
  records have the fields of GLUE, or text, text_pair and label. rates: learning rates. epochs:
  numbers of epochs. seeds: runs of each task. from_mnli: tasks that start from MNLI's checkpoint.
  """

  title = "GLUE"
  diverged_are = "counted as the worst"

  data: str = "tfds:glue/{task}[{split}]"
  fields: str = key("glue", choices=("glue", "ours"))
  tasks: tuple = tuple(glue.TASKS)
  rates: tuple = ("3e-4", "1e-4", "5e-5", "3e-5")
  epochs: tuple = ("4",)
  seeds: int = key(5, at_least=1)
  from_mnli: tuple = ()

  def quick(self) -> "Study":
    small = tuple(name for name in ("cola", "mrpc", "stsb", "rte") if name in self.tasks)
    return dataclasses.replace(
      self,
      tasks=small or self.tasks[:1],
      rates=self.rates[:2],
      epochs=self.epochs[:1],
      seeds=2,
      from_mnli=(),
    )

  def next_runs(self, base: Config, done: Sequence[Result], folder: epath.Path) -> list[Run]:
    self._check(base)
    if not done:
      self._check_sources(base)
    runs = []
    for task in sorted(self.tasks, key=lambda task: task in self.from_mnli):
      start = base.transfer.checkpoint
      if task in self.from_mnli:
        if (first := self._best("mnli", done)) is None:
          continue
        start = str(folder / "runs" / first.run.name)
      runs += [
        self._run(base, task, start, rate, epochs, 0)
        for rate in self.rates
        for epochs in self.epochs
      ]
      if best := self._best(task, done):
        facts = best.run.facts
        runs += [
          self._run(base, task, start, facts["rate"], facts["epochs"], seed)
          for seed in range(1, self.seeds)
        ]
    return runs

  def _check(self, base: Config):
    """Raises UserError on tasks, rates or epochs that are none, and without a checkpoint."""
    if unknown := [task for task in (*self.tasks, *self.from_mnli) if task not in glue.TASKS]:
      raise UserError(
        f"config.study: there is no task {unknown[0]!r}; the tasks are {', '.join(glue.TASKS)}"
      )
    if not self.tasks or self.from_mnli and "mnli" not in self.tasks:
      raise UserError("config.study.tasks must name a task, and mnli where from_mnli names one")
    if "mnli" in self.from_mnli or not set(self.from_mnli) <= set(self.tasks):
      raise UserError("config.study.from_mnli: give other tasks than mnli, of config.study.tasks")
    if not all(part in self.data for part in ("{task}", "{split}")):
      raise UserError(
        f"config.study.data={self.data!r} must have {{task}} and {{split}}, e.g. "
        "'jsonl:glue/{task}_{split}.jsonl'"
      )
    if not base.transfer.checkpoint:
      raise UserError("give what is fine-tuned: --config.run.transfer.checkpoint=CHECKPOINT")

  def _check_sources(self, base: Config):
    """Raises UserError where a split is missing, before anything is trained."""
    for task in self.tasks:
      splits = ["train", glue.TASKS[task].validation]
      for split in [*splits, glue.MISMATCHED] if task == "mnli" else splits:
        data = self._data(base, task, split)
        next(sources.parse_one(data.train, data).records())

  def _data(self, base: Config, task: str, split: str) -> DataConfig:
    """A split to train on."""
    fields = glue.TASKS[task].fields if self.fields == "glue" else base.data.fields
    return dataclasses.replace(base.data, train=self.source(task, split), fields=fields)

  def source(self, task: str, split: str) -> str:
    return self.data.replace("{task}", task).replace("{split}", split)

  def _run(self, base: Config, task: str, start: str, rate: str, epochs: str, seed: int) -> Run:
    facts = glue.TASKS[task]
    try:
      optimizer = dataclasses.replace(base.optimizer, learning_rate=float(rate))
      training = dataclasses.replace(
        base.training, steps=0, epochs=float(epochs), seed=seed, eval_every=0, keep_best="", keep=1
      )
    except ValueError:
      raise UserError(f"config.study: {rate!r} is no learning rate, or {epochs!r} no epochs")
    data = dataclasses.replace(
      self._data(base, task, "train"), eval=self.source(task, facts.validation)
    )
    objective = {**base.objective, "num_classes": int(facts.regression), "baseline": False}
    config = dataclasses.replace(
      base,
      data=data,
      optimizer=optimizer,
      training=training,
      objective=objective,
      transfer=dataclasses.replace(base.transfer, checkpoint=start),
    )
    name = f"{task}-{rate}-{epochs}-{seed}"
    about = {"task": task, "rate": rate, "epochs": epochs, "seed": seed}
    if task == "mnli":
      return WithMismatched(name, config, about, source=self.source(task, glue.MISMATCHED))
    return Run(name, config, about)

  def _best(self, task: str, done: Sequence[Result]) -> Result | None:
    """The run of the search that is best on validation; None before its end.

    Raises UserError where all of them diverged.
    """
    search = [r for r in done if r.run.facts["task"] == task and r.run.facts["seed"] == 0]
    if len(search) < len(self.rates) * len(self.epochs):
      return None
    if all(result.diverged for result in search):
      raise UserError(f"{task} diverged at every rate: {', '.join(self.rates)}; give lower ones")
    return max(search, key=lambda result: _value(result, glue.TASKS[task].metric))

  def report(self, done: Sequence[Result], folder: epath.Path) -> tuple[dict[str, Any], str]:
    tasks = {}
    for task in glue.TASKS:
      if task in self.tasks and (best := self._best(task, done)):
        tasks[task] = self._figures(task, best, done)
    _draw(tasks, folder / "glue")
    return {"tasks": tasks, "published": PUBLISHED}, self._in_words(tasks)

  def _figures(self, task: str, best: Result, done: Sequence[Result]) -> dict[str, Any]:
    """Median, lowest and highest seed of each figure of a task, and what was chosen."""
    chosen = {name: best.run.facts[name] for name in ("rate", "epochs")}
    runs = [
      result
      for result in done
      if {name: result.run.facts[name] for name in chosen} == chosen
      and result.run.facts["task"] == task
    ]
    names = [*glue.TASKS[task].metrics]
    if task == "mnli":
      names.append("mismatched")
    figures = {}
    for name in names:
      values = [_value(result, name) for result in runs]
      figures[name] = {
        "median": float(np.median(values)),
        "low": float(min(values)),
        "high": float(max(values)),
      }
    edge = len(self.rates) > 2 and chosen["rate"] in (self.rates[0], self.rates[-1])
    return {"figures": figures, **chosen, "seeds": len(runs), "at_edge": edge}

  def _in_words(self, tasks: Mapping[str, Mapping]) -> str:
    here = [_cell(tasks[task]["figures"]) if task in tasks else "-" for task in glue.TASKS]
    rows = [("here, validation", *here, _average(here))]
    for name, text in PUBLISHED.items():
      rows.append((f"{name}, test", *text.split(), _average(text.split())))
    headers = ("", *(_heading(task) for task in glue.TASKS), "average")
    details = [
      (task, name, _median(figure, entry), entry["seeds"], entry["rate"], entry["epochs"])
      for task, entry in tasks.items()
      for name, figure in entry["figures"].items()
    ]
    detail_headers = ("task", "figure", "median [lowest, highest]", "seeds", "rate", "epochs")
    edges = [task for task, entry in tasks.items() if entry["at_edge"]]
    started = f"Started from MNLI's checkpoint: {', '.join(self.from_mnli)}.\n"
    at_edge = f"The best rate is the first or last one for {', '.join(edges)}: widen the rates.\n"
    return "\n".join(
      [
        tabulate.tabulate(rows, headers, "github", disable_numparse=True) + "\n",
        "![figures beside the published rows](glue.png)\n",
        tabulate.tabulate(details, detail_headers, "github", disable_numparse=True) + "\n",
        *([started] if self.from_mnli else []),
        *([at_edge] if edges else []),
        NOTE,
      ]
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class WithMismatched(Scored):
  """A run of MNLI that is also scored on the split of other genres. source: of that split."""

  source: str

  def score(self, workdir: epath.Path) -> dict[str, float]:
    step = manager.find(workdir)
    bundle = experiment.load(step)
    saved = experiment.from_checkpoint(step)
    length = self.config.training.sequence_length
    source = sources.parse_one(self.source, self.config.data)
    rows = saved.objective.rows(
      source, saved.tokenizer, self.config.data, saved.config.model, length
    )
    mesh = sharding.make_mesh(MeshConfig())
    size = batches.rows_a_batch(self.config.training.batch_size, 1, [rows], [1.0])
    size = round_up(size, mesh.size)
    with jax.set_mesh(mesh):
      figures, _ = evaluation.of_checkpoint(bundle, saved.objective, rows, length, size, mesh)
    return {"mismatched": figures["accuracy"]}


def _value(result: Result, name: str) -> float:
  """A figure of a run; 0 where it diverged, or is undefined for a constant prediction."""
  value = 0.0 if result.diverged else result.evaluated(name)
  return 0.0 if np.isnan(value) else value


def _heading(task: str) -> str:
  names = ("matched", "mismatched") if task == "mnli" else glue.TASKS[task].metrics
  return f"{task}, {'/'.join(names)}"


def _cell(figures: Mapping[str, Mapping]) -> str:
  return "/".join(f"{100 * figure['median']:.1f}" for figure in figures.values())


def _median(figure: Mapping[str, float], entry: Mapping[str, Any]) -> str:
  """The median with the lowest and the highest seed. entry: of the task."""
  median, low, high = (100 * figure[name] for name in ("median", "low", "high"))
  return f"{median:.1f}" if entry["seeds"] < 2 else f"{median:.1f} [{low:.1f}, {high:.1f}]"


def _average(cells: Sequence[str]) -> str:
  """The mean of nine figures, as Devlin et al. 2019 take it; empty where one is missing."""
  by_task = dict(zip(glue.TASKS, cells))
  del by_task["wnli"]
  numbers = []
  for task, cell in by_task.items():
    first, *second = cell.split("/")
    if task == "mnli":
      numbers += [first, *second]
    else:
      numbers += second if task == "stsb" else [first]
  if len(numbers) < 9 or "-" in numbers:
    return ""
  return f"{np.mean([float(number) for number in numbers]):.1f}"


def _draw(tasks: Mapping[str, Mapping], path: epath.Path) -> None:
  """The main figure of each task beside the published ones."""
  figure, axes = plt.subplots(figsize=(8, 4.2), layout="constrained")
  names = list(tasks)
  for model, text in PUBLISHED.items():
    cells = dict(zip(glue.TASKS, (cell.split("/")[0] for cell in text.split())))
    values = [float(cells[name]) if cells[name] != "-" else np.nan for name in names]
    axes.plot(values, "_", markersize=16, label=f"{model}, test")
  main = [entry["figures"][glue.TASKS[name].metric] for name, entry in tasks.items()]
  medians = np.array([100 * of["median"] for of in main])
  error = [[100 * (of["median"] - of["low"]) for of in main]]
  error.append([100 * (of["high"] - of["median"]) for of in main])
  axes.errorbar(range(len(names)), medians, error, fmt="k*", capsize=3, label="here, validation")
  axes.set_xticks(range(len(names)), [f"{name}\n{glue.TASKS[name].metric}" for name in names])
  axes.legend(frameon=False, fontsize=7, ncols=2)
  plots.save(figure, path)
