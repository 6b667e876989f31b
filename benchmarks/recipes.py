"""Is the default learning rate near the best one? Short runs at several widths and depths.

  python benchmarks/recipes.py pretrain [--output=recipes.jsonl] [--families=bert,gpt,t5,llama]
      [--widths=64,128,256] [--depths=2,4,8] [--steps=300]
  python benchmarks/recipes.py finetune --checkpoint=DIR NAME=TRAIN.jsonl,EVAL.jsonl ..

Each run is repeated at the default rate (training/recipe.py), at half of it and at twice it, from
the same weights and with the same batches. While the best is the lowest or the highest rate, the
next one beyond it is tried. The loss is that of held-out text; fine-tuning shows accuracy too.
Prints a table and appends every run to the output, which a later call takes as done.
"""

import argparse
import importlib
import json
import math
import pathlib
import sys
import tempfile
from typing import Any, Mapping

import jax
import numpy as np
import tabulate
import tqdm
from jax.sharding import Mesh

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from llm import command, sharding
from llm import config as config_lib
from llm.config import Config, MeshConfig
from llm.training import evaluation, experiment, state
from llm.training import optimizer as optimizer_lib
from llm.training import plan as plan_lib
from llm.training import step as step_lib

# Of the default rate. The first are tried always, the others while the best has no neighbour.
FIRST = (1.0, 0.5, 2.0)
LOWEST = 1 / 16
HIGHEST = 16.0


def pretraining(family: str, width: int, depth: int, steps: int) -> Config:
  """The tiny config of a family at another width and depth, for few and short rows."""
  config = importlib.import_module(f"configs.pretrain_{family}").get_config("tiny")
  config.model.update(
    num_layers=depth,
    width=width,
    num_heads=width // 64,
    num_kv_heads=0,  # as many as heads
    mlp_dim=4 * width,
    dropout=0.0,
  )
  config.tokenizer.vocab_size = 1024
  config.optimizer.warmup_steps = -1
  config.training.update(batch_size=16, sequence_length=64, steps=steps)
  return config_lib.freeze(config)


def fine_tuning(checkpoint: str, sources: str) -> Config:
  """The config of classification, for two files of labelled lines."""
  train, held_out = sources.split(",")
  config = importlib.import_module("configs.finetune_classification").get_config()
  config.data.update(train=f"jsonl:{train}", eval=f"jsonl:{held_out}")
  config.transfer.checkpoint = checkpoint
  config.objective.baseline = False
  return config_lib.freeze(config)


class Runs:
  """Runs of one config at several rates, by one compiled step."""

  def __init__(self, config: Config, workdir: pathlib.Path, mesh: Mesh):
    self.mesh = mesh
    self.experiment = experiment.prepare(config, say=lambda *_: None).on(self.mesh)
    self.config = self.experiment.config
    with jax.set_mesh(self.mesh):
      planned = plan_lib.of(self.experiment, self.mesh)
      first, _ = state.first_state(self.experiment, planned, None, workdir, lambda *_: None)
    self.masks = planned.frozen_masks
    self.trained = jax.tree.map(np.asarray, first.trained)
    self.frozen = first.frozen
    self.step = jax.jit(self._step, donate_argnums=0)
    self.eval_step = planned.eval_step

  def _optimizer(self, rate: Any):
    config = self.config
    return optimizer_lib.make(
      config.optimizer, self.trained, config.model.num_layers, config.training.steps, rate
    )

  def _step(self, state, batch, rate):
    return step_lib.train_step(
      self.experiment.model,
      self.experiment.objective,
      self._optimizer(rate),
      self.masks,
      1,
      state,
      batch,
      self.config.training.seed,
    )[0]

  @property
  def default_rate(self) -> float:
    """By the rule."""
    return self.config.optimizer.learning_rate

  def figures(self, rate: float) -> dict[str, float]:
    """The figures of held-out data after a run at a rate."""
    with jax.set_mesh(self.mesh):
      trained = jax.tree.map(jax.numpy.array, self.trained)
      run = step_lib.init_state(trained, self.frozen, self._optimizer(rate))
      for number in range(self.config.training.steps):
        run = jax.block_until_ready(self.step(run, self.experiment.batches[number], rate))
      return evaluation.evaluate(
        self.eval_step,
        run.trained,
        self.frozen,
        self.experiment.objective,
        self.experiment.eval_rows,
        self.experiment.batches.batch_size,
        self.mesh,
      )


def measured(name: str, config: Config, output: pathlib.Path, workdir: pathlib.Path) -> list[dict]:
  """The result of every factor that was tried, taken from the output where it is there."""
  done = [json.loads(line) for line in output.read_text().splitlines()] if output.exists() else []
  by_factor = {line["factor"]: line for line in done if line["run"] == name}
  runs = None
  while (factor := next_factor(by_factor)) is not None:
    runs = runs or Runs(config, workdir, sharding.make_mesh(MeshConfig()))
    rate = factor * runs.default_rate
    line = {"run": name, "factor": factor, "rate": rate, **runs.figures(rate)}
    by_factor[factor] = line
    with output.open("a") as file:
      file.write(json.dumps(line) + "\n")
  return [by_factor[factor] for factor in sorted(by_factor)]


def next_factor(by_factor: Mapping[float, Mapping[str, float]]) -> float | None:
  """The factor to try next; None where both neighbours of the best one are known."""
  for factor in FIRST:
    if factor not in by_factor:
      return factor
  # The lowest of those that are equally good, or that all diverged.
  best = min(by_factor, key=lambda factor: (finite_loss(by_factor[factor]), factor))
  for neighbour in (best / 2, best * 2):
    if neighbour not in by_factor and LOWEST <= neighbour <= HIGHEST:
      return neighbour
  return None


def finite_loss(figures: Mapping[str, float]) -> float:
  """The loss, infinite where the run diverged."""
  return figures["loss"] if np.isfinite(figures["loss"]) else math.inf


def table(results: dict[str, list[dict]], figure: str) -> str:
  """A line a run: the figure at every factor, the best factor, what the default loses to it."""
  factors = sorted({run["factor"] for runs in results.values() for run in runs})
  lines = []
  for name, runs in results.items():
    by_factor = {run["factor"]: run for run in runs}
    default = by_factor[1.0]
    if figure == "loss":
      best = min(runs, key=finite_loss)
      lost = finite_loss(default) / finite_loss(best) - 1
    else:
      best = max(runs, key=lambda run: run[figure])
      lost = best[figure] - default[figure]
    cells = [
      f"{by_factor[factor][figure]:.3f}" if factor in by_factor else "" for factor in factors
    ]
    lines.append((name, f"{default['rate']:.2g}", *cells, f"{best['factor']:g}", f"{lost:.1%}"))
  headers = ("run", "default rate", *(f"x {factor:g}" for factor in factors), "best", "lost")
  return tabulate.tabulate(lines, headers=headers, tablefmt="github", disable_numparse=True)


def main():
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("what", choices=("pretrain", "finetune"))
  parser.add_argument("sets", nargs="*")
  parser.add_argument("--output", default="recipes.jsonl")
  parser.add_argument("--families", default="bert,gpt,t5,llama")
  parser.add_argument("--widths", default="64,128,256")
  parser.add_argument("--depths", default="2,4,8")
  parser.add_argument("--steps", type=int, default=300)
  parser.add_argument("--checkpoint")
  arguments = parser.parse_intermixed_args()
  command.start_cpu()
  command.use_compilation_cache()
  output = pathlib.Path(arguments.output)
  configs = {}
  if arguments.what == "pretrain":
    for width in map(int, arguments.widths.split(",")):
      for depth in map(int, arguments.depths.split(",")):
        for family in arguments.families.split(","):
          configs[f"{family} {depth}L/{width}"] = pretraining(family, width, depth, arguments.steps)
  for item in arguments.sets:
    name, _, sources = item.partition("=")
    configs[name] = fine_tuning(arguments.checkpoint, sources)
  results = {}
  for name, config in tqdm.tqdm(configs.items(), unit=" models", disable=None):
    with tempfile.TemporaryDirectory() as workdir:  # a transfer leaves its audit there
      results[name] = measured(name, config, output, pathlib.Path(workdir))
  print(table(results, "loss"))
  if arguments.what == "finetune":
    print(table(results, "accuracy"))


if __name__ == "__main__":
  main()
