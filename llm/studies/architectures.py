"""Encoder, decoder and encoder-decoder side by side, each with its own objective of pretraining.

All are pretrained with the same FLOPs on the same text and vocabulary, each at the best of as many
learning rates, and fine-tuned with equal search on three tasks (architecture_tasks.py). An
encoder-decoder stands at the layers of the others, with more parameters, and at half of them, with
about as many.
"""

import dataclasses
import functools
import json
from typing import Any, Mapping, Sequence

import jax
from etils import epath

from llm import cache, models
from llm import config as config_lib
from llm.config import Config, OptimizerConfig, key
from llm.core import UserError
from llm.objectives import base as objectives
from llm.performance import flops
from llm.studies import architecture_report, few_labels, frame
from llm.studies import architecture_tasks as tasks_lib
from llm.studies.runs import Result, Run
from llm.training import experiment as experiment_lib
from llm.training import step as step_lib

SENTINELS = 100  # of an encoder-decoder, as T5 has


@dataclasses.dataclass(frozen=True)
class Study(frame.Study):
  """models: NAME:LAYERS:OBJECTIVE, in the width of config.run. budget: FLOPs of a pretraining.
  rates: learning rates of pretraining; NAME=RATE is for one architecture, which then takes no
  others. tuning_rates: the same, of fine-tuning. adafactor: architectures that are trained with
  Adafactor, as T5 was, and not with config.run.optimizer. epochs: TASK=EPOCHS. seeds: pretrainings
  of each model, each fine-tuned once on each task. sentiment, questions, replies: the tasks,
  sources with {split}.
  """

  title = "Architectures"
  writes_files = True
  diverged_are = "never chosen, and left out of the means"

  models: tuple = (
    "bert:2:masked_lm",
    "electra:2:replaced_token",
    "gpt:2:causal_lm",
    "t5:2:span_corruption",
    "t5:1:span_corruption",
  )
  budget: str = "2e13"
  rates: tuple = ("1e-3", "3e-3", "t5=2e-2", "t5=4e-2")
  tuning_rates: tuple = ("3e-4", "1e-3", "3e-3", "t5=3e-3", "t5=1e-2", "t5=3e-2")
  adafactor: tuple = ("t5",)
  epochs: tuple = ("sentiment=3", "questions=10", "replies=3")
  seeds: int = key(3, at_least=1)
  sentiment: str = "embedded:reviews[{split}]"
  questions: str = "embedded:abstracts[{split}]"
  replies: str = "embedded:alpaca[{split}]"

  def quick(self) -> "Study":
    return dataclasses.replace(
      self,
      models=self.models[::2],
      budget=str(min(1e12, self._budget())),
      rates=_one_each(self.rates, -1),
      tuning_rates=_one_each(self.tuning_rates, 1),
      epochs=tuple(f"{task}={3 if task == 'questions' else 1}" for task in self._epochs()),
      seeds=2,
    )

  def next_runs(self, base: Config, done: Sequence[Result], folder: epath.Path) -> list[Run]:
    epochs = self._epochs()
    self._check_rates()
    if not base.data.eval:
      raise UserError("rates are chosen by held-out text: set config.run.data.eval")
    search = [
      self._pretraining(base, model, rate, 0)
      for model in self.models
      for rate in _rates_of(self.rates, model)
    ]
    files = self._files(folder)
    if not done:
      tasks_lib.write_files({task: getattr(self, task) for task in epochs}, base.data, files)
    if _missing(search, done):
      return search
    starts = {
      (model, seed): self._pretraining(base, model, self._best(done, model, ""), seed)
      for model in self.models
      for seed in range(self.seeds)
    }
    pretrained = [*search, *(run for (_, seed), run in starts.items() if seed)]
    if _missing(pretrained, done):
      return pretrained
    pairs = [
      (model, task)
      for model in self.models
      for task in epochs
      if tasks_lib.form(task, _parts(model)[0])
    ]
    tuned = [
      self._tuning(starts[model, 0], task, rate, 0, "validation", folder)
      for model, task in pairs
      for rate in _rates_of(self.tuning_rates, model)
    ]
    if _missing(tuned, done):
      return [*pretrained, *tuned]
    diverged = {result.run.name for result in done if result.diverged}
    final = [
      self._tuning(starts[model, seed], task, self._best(done, model, task), seed, "test", folder)
      for model, task in pairs
      for seed in range(self.seeds)
      if starts[model, seed].name not in diverged
    ]
    return [*pretrained, *tuned, *final]

  def _files(self, folder: epath.Path) -> epath.Path:
    """The folder of the tasks' files. Other sources have another one."""
    return folder / "data" / cache.digest(self.sentiment, self.questions, self.replies)[:8]

  def _check_rates(self):
    """Raises UserError where a rate is no number, or a model has fewer of them than others."""
    rates = (*self.rates, *self.tuning_rates)
    of_rates = {rate.rpartition("=")[0] for rate in rates if "=" in rate}
    if unknown := {*self.adafactor, *of_rates} - set(models.NAMES):
      raise UserError(
        f"config.study: {min(unknown)!r} is no architecture: they are {', '.join(models.NAMES)}"
      )
    for key_name, rates in (("rates", self.rates), ("tuning_rates", self.tuning_rates)):
      for rate in rates:
        try:
          float(rate.rpartition("=")[2])
        except ValueError:
          raise UserError(f"config.study.{key_name}: {rate!r} is no learning rate, e.g. 1e-3")
      counts = {model: len(_rates_of(rates, model)) for model in self.models}
      if len(set(counts.values())) > 1 or not min(counts.values()):
        each = ", ".join(f"{model} {count}" for model, count in counts.items())
        raise UserError(f"config.study.{key_name}: equal search needs as many for each: {each}")

  def _budget(self) -> float:
    try:
      budget = float(self.budget)
    except ValueError:
      budget = 0.0
    if budget <= 0:
      raise UserError(f"config.study.budget={self.budget!r} must be a number of FLOPs, e.g. 2e13")
    return budget

  def _epochs(self) -> dict[str, float]:
    """Task -> its epochs. Raises UserError on tasks or numbers that are none."""
    epochs = {}
    for text in self.epochs:
      task, number = few_labels.named(text, "config.study.epochs")
      if task not in tasks_lib.FORMS or not number.replace(".", "", 1).isdigit():
        raise UserError(
          f"config.study.epochs: {text!r} is not TASK=EPOCHS with TASK one of "
          f"{', '.join(tasks_lib.FORMS)}"
        )
      epochs[task] = float(number)
    for task in epochs:
      if not any(tasks_lib.form(task, _parts(model)[0]) for model in self.models):
        raise UserError(f"config.study.epochs: none of config.study.models can do {task}")
    return epochs

  def _pretraining(self, base: Config, model: str, rate: str, seed: int) -> Run:
    name, layers, objective = _parts(model)
    kind = models.facts_of(name).kind
    sentinels = SENTINELS if kind == "encoder_decoder" else 0
    if objective != base.objective["name"]:
      hyper_parameters: Mapping[str, Any] = objectives.defaults(objective)
    else:
      hyper_parameters = base.objective
    shared = dataclasses.replace(
      base,
      model=dataclasses.replace(base.model, name=name, num_layers=layers),
      objective=dict(hyper_parameters),
      tokenizer=dataclasses.replace(base.tokenizer, sentinels=sentinels),
      training=dataclasses.replace(base.training, steps=1, epochs=0.0),
    )
    steps = max(1, round(self._budget() / flops_a_step(json.dumps(config_lib.thaw(shared)))))
    config = dataclasses.replace(
      shared,
      optimizer=self._optimizer(shared, rate),
      training=dataclasses.replace(shared.training, steps=steps, seed=seed),
    )
    facts = {"role": "pretraining", "model": model, "rate": rate, "seed": seed, "split": ""}
    return Run(_name(model, "pretraining", rate, seed), config, facts)

  def _optimizer(self, config: Config, rate: str) -> OptimizerConfig:
    """The config's, or T5's (Raffel et al. 2020, section 3.1.2) with the same schedule."""
    optimizer = dataclasses.replace(config.optimizer, learning_rate=float(rate))
    if config.model.name not in self.adafactor:
      return optimizer
    return dataclasses.replace(optimizer, name="adafactor", weight_decay=0.0, grad_clip_norm=0.0)

  def _tuning(
    self, start: Run, task: str, rate: str, seed: int, split: str, folder: epath.Path
  ) -> Run:
    """Fine-tunes a pretraining on a task, and scores it on a split."""
    model = start.facts["model"]
    files = self._files(folder)
    checkpoint = str(folder / "runs" / start.name)
    config = tasks_lib.tuning_config(start.config, checkpoint, task, files, split)
    training = dataclasses.replace(
      config.training,
      steps=0,
      epochs=self._epochs()[task],
      seed=seed,
      keep=1,
      # What is scored is the last step: a test split would choose another one.
      eval_every=0,
      save_every=0,
      keep_best="",
      patience=0,
    )
    optimizer = self._optimizer(start.config, rate)
    config = dataclasses.replace(config, optimizer=optimizer, training=training)
    name = _name(model, task, rate, seed, split)
    facts = {"role": "fine-tuning", "model": model, "task": task, "rate": rate, "seed": seed}
    facts["split"] = split
    of_task = tasks_lib.form(task, _parts(model)[0])
    if of_task and of_task.writes:
      return tasks_lib.Writes(name, config, facts, path=files / f"{task}_{split}.jsonl")
    return Run(name, config, facts)

  def _best(self, done: Sequence[Result], model: str, task: str) -> str:
    """The rate that was best on held-out data with the first seed. task: "" is the pretraining.

    Raises UserError where all diverged.
    """
    split = "validation" if task else ""
    of_search = [
      result
      for result in done
      if not result.diverged
      and result.run.facts["model"] == model
      and result.run.facts.get("task", "") == task
      and result.run.facts["split"] == split
      and result.run.facts["seed"] == 0
    ]
    if not of_search:
      raise UserError(f"{model} {task} diverged at every rate: give lower ones")
    of_task = tasks_lib.form(task, _parts(model)[0]) if task else None
    metric, lower = (of_task.metric, of_task.lower) if of_task else ("loss", True)
    sign = -1 if lower else 1
    best = max(of_search, key=lambda result: sign * result.evaluated(metric))
    return best.run.facts["rate"]

  def report(self, done: Sequence[Result], folder: epath.Path) -> tuple[dict[str, Any], str]:
    rates = {model: self._best(done, model, "") for model in self.models}
    return architecture_report.report(done, rates, list(self._epochs()), folder)


def _parts(model: str) -> tuple[str, int, str]:
  """NAME:LAYERS:OBJECTIVE. Raises UserError where it is none."""
  name, _, rest = model.partition(":")
  layers, _, objective = rest.partition(":")
  if name not in models.NAMES or not layers.isdigit() or int(layers) < 1 or not objective:
    raise UserError(
      f"config.study.models: {model!r} is not NAME:LAYERS:OBJECTIVE, with NAME one of "
      f"{', '.join(models.NAMES)}, e.g. bert:2:masked_lm"
    )
  return name, int(layers), objective


def _by_name(rates: Sequence[str]) -> dict[str, list[str]]:
  """Architecture -> its entries of `rates`; "" has those that name none."""
  of_names: dict[str, list[str]] = {}
  for entry in rates:
    of_names.setdefault(entry.rpartition("=")[0], []).append(entry)
  return of_names


def _rates_of(rates: Sequence[str], model: str) -> list[str]:
  """The rates of the architecture of NAME:LAYERS:OBJECTIVE: those with its name, or with none."""
  of_names = _by_name(rates)
  entries = of_names.get(_parts(model)[0], of_names.get("", []))
  return [entry.rpartition("=")[2] for entry in entries]


def _one_each(rates: Sequence[str], place: int) -> tuple[str, ...]:
  """Of the entries of each architecture the one at a place, or the only one."""
  return tuple(entries[place % len(entries)] for entries in _by_name(rates).values())


def _name(model: str, task: str, rate: str, seed: int, split: str = "") -> str:
  name, layers, objective = _parts(model)
  return "-".join(filter(None, (name, str(layers), objective, task, rate, str(seed), split)))


@functools.cache
def flops_a_step(config_text: str) -> float:
  """FLOPs of a training step of a config in JSON, as runs count them; no data is read."""
  config = config_lib.freeze(json.loads(config_text))
  plan = experiment_lib.without_data(config).on_platform(jax.default_backend())
  row = plan.one_row()
  params = jax.eval_shape(lambda: step_lib.init_params(plan.model, row, jax.random.key(0)))
  of_row = flops.model_flops(plan.model, params, row, plan.config.model)
  return of_row * config.training.batch_size


def _missing(runs: Sequence[Run], done: Sequence[Result]) -> bool:
  names = {result.run.name for result in done}
  return any(run.name not in names for run in runs)
