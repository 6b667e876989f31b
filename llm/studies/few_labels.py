"""Fine-tuning of one arm on one number of labels, many draws of them: a run of a study.

An arm is a start of the network: a checkpoint's backbone, or random parameters in its architecture.
Both see the same draws, batches and fresh head.
"""

import dataclasses
import functools
import json
import time
from typing import Any, Callable, Mapping, NamedTuple, Sequence

import jax
import numpy as np
import tqdm
from etils import epath

from llm import config as config_lib
from llm import sharding, storage
from llm.checkpoints import manager, transfer
from llm.config import Config, DataConfig, MeshConfig
from llm.core import Params, UserError
from llm.data import sources
from llm.objectives import base, classification
from llm.runs import workdir as workdir_lib
from llm.studies import fine_tuner, label_curve, runs
from llm.studies.fine_tuner import FineTuner, Split
from llm.studies.label_curve import Setting
from llm.training import experiment
from llm.training import step as step_lib

# A checkpoint that the study pretrains.
HERE = "here"
SPLITS = ("train", "validation", "test")
# The init_std of the head, and of all parameters that are fine-tuned from scratch. Labels alone are
# learned better from 0.02 than from what suits pretraining (validation accuracy of a small BERT on
# review sentences: 56 against 53 at 64 labels, 61 against 56 at 256). So each arm has the start
# that suits it.
INIT_STD = 0.02


@dataclasses.dataclass(frozen=True)
class Arm:
  """Where fine-tuning starts from, and what it learns.

  checkpoint: as config.transfer.checkpoint. scratch: only its architecture and tokenizer are taken.
  target: a source with {split} where its three splits differ. fields: as config.data.fields.
  length: tokens of a row. batch_size: of one run.
  """

  checkpoint: str
  scratch: bool
  target: str
  fields: str = ""
  cache: str = ""
  length: int = 40
  batch_size: int = 32

  def config(self) -> Config:
    """The config of llm.train that fine-tunes the arm, with the rate of docs/recipes.md."""
    config = config_lib.defaults(base.defaults("classification"))
    config.objective.update(pooling="mean", baseline=False)
    config.model.init_std = INIT_STD
    config.data.update(
      train=split_of(self.target, "train"),
      eval=split_of(self.target, "validation"),
      fields=self.fields,
      cache=self.cache,
    )
    skip = ("",) if self.scratch else (r"^(head|generator)/",)
    config.transfer.update(checkpoint=self.checkpoint, skip=skip)
    config.recipe.update(learning_rate=3e-5, width_power=2.0)
    config.training.update(
      epochs=-1.0, batch_size=self.batch_size, sequence_length=self.length, eval_every=-1
    )
    return config_lib.freeze(config)


def split_of(target: str, split: str) -> str:
  """The source of one split. Raises UserError where the target names no splits."""
  if "{split}" not in target:
    raise UserError(
      f"{target}: write {{split}} where {', '.join(SPLITS)} stand in the names of its sources, "
      "e.g. 'jsonl:data/{split}.jsonl' or 'embedded:reviews[{split}]'"
    )
  return target.replace("{split}", split)


class Prepared(NamedTuple):
  """An arm with its data. learning_rate: that of the recipe."""

  objective: classification.Objective
  model: config_lib.ModelConfig
  params: Params
  splits: dict[str, Split]
  learning_rate: float


@functools.lru_cache(maxsize=1)
def prepared(arm: Arm) -> Prepared:
  """Reads the splits and the checkpoint. Raises UserError on bad input of every kind."""
  config = arm.config()
  run = experiment.prepare(config, say=lambda *_: None)
  objective = run.objective
  assert isinstance(objective, classification.Objective) and run.start
  model = run.asked.model
  splits = {}
  for split in SPLITS:
    source = sources.parse_one(split_of(arm.target, split), config.data)
    splits[split] = fine_tuner.encode(objective, source, run.tokenizer, model, arm.length)
  network = experiment.build(objective, model)
  fresh = step_lib.init_params(network, run.one_row(), jax.random.key(1))
  fresh = jax.tree.map(np.asarray, fresh)
  params, _ = transfer.transfer(fresh, manager.restore(run.start, "params"), config.transfer)
  return Prepared(objective, model, params, splits, run.asked.optimizer.learning_rate)


@functools.lru_cache(maxsize=1)
def _tuner(arm: Arm) -> tuple[FineTuner, Prepared]:
  """The tuner of an arm, whose label counts follow one another."""
  start = prepared(arm)
  mesh = sharding.make_mesh(MeshConfig())
  starts = {"arm": start.params}
  return FineTuner(start.objective, start.model, starts, arm.batch_size, mesh), start


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cell(runs.Run):
  """An arm at one number of labels. setting: its rates are factors of the recipe's."""

  arm: Arm
  setting: Setting

  def take(self, workdir: epath.Path, use_devices: Callable | None) -> Mapping[str, Any]:
    if use_devices:
      use_devices(self.config.mesh)
    folder = storage.folder(workdir)
    with workdir_lib.locked(folder):
      workdir_lib.claim(folder, self.config, go_on=False)
      if (folder / "result.json").exists():
        return json.loads((folder / "result.json").read_text())
      started = time.time()
      workdir_lib.write_json(folder / "run.json", workdir_lib.run_record())
      figures = {**self.measured(), "seconds": time.time() - started}
      workdir_lib.write_json(folder / "result.json", figures)
    return figures

  def measured(self) -> dict[str, Any]:
    """rows: of label_curve.measure. eval: the mean accuracy on the test split."""
    tuner, start = _tuner(self.arm)
    rates = tuple(factor * start.learning_rate for factor in self.setting.learning_rates)
    setting = dataclasses.replace(self.setting, learning_rates=rates)
    train, validation, test = (start.splits[split] for split in SPLITS)
    with _bar(label_curve.count_fits(setting, 1)) as bar:
      (row,) = label_curve.measure(tuner, setting, train, validation, test, bar)
    steps = label_curve.total_steps(setting, row, self.arm.batch_size)
    return {
      "rows": [row],
      "eval": {"accuracy": row["accuracy_mean"]},
      "flops": steps * tuner.flops_a_step(train),
    }


@dataclasses.dataclass(frozen=True)
class Classical(Cell):
  """The classical models at one number of labels of the arm's target."""

  def measured(self) -> dict[str, Any]:
    start = prepared(self.arm)
    train, validation, test = (start.splits[split] for split in SPLITS)
    with _bar(label_curve.count_classical_fits(self.setting)) as bar:
      rows = label_curve.measure_classical(self.setting, train, validation, test, bar)
    best = max(row["accuracy_mean"] for row in rows)
    return {"rows": rows, "eval": {"accuracy": best}, "flops": 0.0}


def _bar(total: int) -> tqdm.tqdm:
  return tqdm.tqdm(desc="fine-tuning", total=total, unit=" runs", disable=None, leave=False)


def setting(text: str, searched: int, factors: Sequence[str]) -> Setting:
  """LABELSxDRAWS:EPOCHS, such as 64x20:20 or 0x3:2,4; 0 labels are all. Raises UserError.

  searched: draws that the search runs on. factors: of the recipe's learning rate.
  """
  try:
    size, epochs = text.split(":")
    labels, draws = (int(number) for number in size.split("x"))
    choices = tuple(int(number) for number in epochs.split(","))
    rates = tuple(float(factor) for factor in factors)
  except ValueError:
    raise UserError(
      f"config.study: {text!r} is not LABELSxDRAWS:EPOCHS, e.g. 64x20:20 (0 labels are all), or "
      f"config.study.rates={tuple(factors)} are no numbers"
    )
  if labels < 0 or draws < 1 or min((*choices, *rates)) <= 0:
    raise UserError(f"config.study: draws, epochs and rates of {text!r} must be positive")
  return Setting(labels, draws, min(searched, draws), rates, choices)


def name_of(arm: str, of: Setting) -> str:
  """The name of a cell. Other draws, epochs or rates have another name, and are other runs."""
  labels = str(of.labels or "all")
  epochs = "_".join(str(number) for number in of.epochs)
  rates = "_".join(f"{rate:g}" for rate in of.learning_rates)
  return f"{arm}-{labels}x{of.draws}-epochs{epochs}-rates{rates}-searched{of.searched}"


def named(text: str, of: str) -> tuple[str, str]:
  """NAME=VALUE as (NAME, VALUE). Raises UserError. of: the key and what the value is."""
  name, equals, value = text.partition("=")
  if not (equals and name and value) or not name.replace("_", "").isalnum():
    raise UserError(f"{of}: {text!r} is not NAME=VALUE, with letters and digits in NAME")
  return name, value


def check_target(target: str, fields: str, cache: str):
  """Raises UserError where a target lacks a split, before hours of pretraining."""
  data = DataConfig(fields=fields, cache=cache)
  for split in SPLITS:
    source = sources.parse_one(split_of(target, split), data)
    next(source.records())


def pretraining(base: Config) -> runs.Run:
  """The run that pretrains config.run."""
  return runs.Run("pretrained", base, {"role": "pretraining"})


def checkpoint(value: str, folder: epath.Path) -> str:
  """A checkpoint as config.transfer.checkpoint names it. value: `here` is that of `pretraining`."""
  return str(folder / "runs" / "pretrained") if value == HERE else value


def missing(wanted: Sequence[runs.Run], done: Sequence[runs.Result]) -> bool:
  """Whether one of these runs is not done. Raises UserError where one diverged."""
  results = {result.run.name: result for result in done}
  for run in wanted:
    if run.name in results and results[run.name].diverged:
      raise UserError(f"the run {run.name} diverged, and others start from it: give another rate")
  return any(run.name not in results for run in wanted)


def result_rows(done: Sequence[runs.Result]) -> list[dict[str, Any]]:
  """The rows of all cells. model: the arm. network: whether it is one."""
  results = []
  for result in done:
    if not isinstance(result.run, Cell) or result.diverged:
      continue
    is_network = not isinstance(result.run, Classical)
    for row in result.figures["rows"]:
      model = result.run.facts["arm"] if is_network else row["model"]
      results.append({**row, **result.run.facts, "labels": row["labels"], "model": model})
      results[-1]["network"] = is_network
  return results


def remarks(rows: Sequence[Mapping]) -> list[str]:
  """A sentence where runs diverged."""
  search = sum(row["chosen"].get("diverged", 0) for row in rows)
  final = sum(row.get("diverged", 0) for row in rows)
  if not search + final:
    return []
  return [f"{search} runs of searches diverged and were not chosen; {final} others count as 0.\n"]
