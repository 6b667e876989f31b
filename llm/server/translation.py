"""A job of the API as a command line of llm.train.

"auto" leaves a setting to the config of the method, or to its recipe (training/recipe.py).
"""

import importlib.util
import pathlib
import sys
from typing import Any

import jax

from llm.core import round_up

CONFIGS = pathlib.Path(__file__).resolve().parents[2] / "configs"
FILES = {
  "supervised": "finetune_chat.py",
  "dpo": "finetune_preference.py",
  "reinforcement": "finetune_grpo.py",
}
STEPS_AN_EPOCH = 8  # at least, where the data allow it
POINTS = 200  # steps of which a job reports figures, about
UNSAVED = 50  # steps with rewards, which take long, at most between two checkpoints


def config_of(method: str) -> Any:
  """The config of a method, with its defaults."""
  path = CONFIGS / FILES[method]
  spec = importlib.util.spec_from_file_location(path.stem, path)
  assert spec and spec.loader
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module.get_config()


def overrides(
  method: dict[str, Any], seed: int, base: str, max_length: int, folder: pathlib.Path, examples: int
) -> dict[str, Any]:
  """The keys of the config that a job sets.

  method: its type and its settings. base: the checkpoint that it starts from. max_length: the
  positions of that model. folder: of the job, with train.jsonl and perhaps eval.jsonl. examples:
  the lines of train.jsonl.
  """
  kind = method["type"]
  config = config_of(kind)
  asked = {
    name: value for name, value in method[kind]["hyperparameters"].items() if value != "auto"
  }
  batch_size = asked.get("batch_size") or _batch_size(config.training.batch_size, examples)
  keys: dict[str, Any] = {
    "transfer.checkpoint": base,
    "data.train": f"jsonl:{folder / 'train.jsonl'}",
    "training.seed": seed,
    "training.batch_size": batch_size,
    "training.sequence_length": min(config.training.sequence_length, max_length),
    "training.save_every": -1,
    "training.keep": 3,
  }
  if (folder / "eval.jsonl").exists():
    keys["data.eval"] = f"jsonl:{folder / 'eval.jsonl'}"
    keys |= {"training.eval_every": -1, "training.keep_best": "auto"}
  keys |= _length(kind, config, asked)
  if "learning_rate_multiplier" in asked:
    keys |= _rate(config, asked["learning_rate_multiplier"])
  if "beta" in asked:
    keys["objective.beta"] = asked["beta"]
  if kind == "reinforcement":
    keys["objective.reward"] = "llm.server.graders:reward"
    keys["training.save_every"] = min(UNSAVED, -(-examples // batch_size))
  epochs = asked.get("n_epochs", config.training.epochs or 1)
  steps = config.training.steps if "training.epochs" not in keys else epochs * examples / batch_size
  keys["training.log_every"] = max(1, int(steps / POINTS))
  return keys


def _batch_size(most: int, examples: int) -> int:
  """The batch of the config, or less where it would be a large part of the data."""
  wanted = min(most, max(1, examples // STEPS_AN_EPOCH))
  return round_up(wanted, jax.local_device_count())


def _length(kind: str, config: Any, asked: dict[str, Any]) -> dict[str, Any]:
  """How long the run is. The recipe goes through small data more often than its epochs say."""
  if "n_epochs" in asked:
    return {"training.epochs": float(asked["n_epochs"]), "training.steps": 0}
  if kind == "supervised":
    return {"training.epochs": -1.0}
  return {"training.epochs": config.training.epochs} if config.training.epochs else {}


def _rate(config: Any, multiplier: float) -> dict[str, Any]:
  """The rate of the config, or of its recipe where the recipe says it, times `multiplier`."""
  if config.optimizer.learning_rate == -1:
    return {"recipe.learning_rate": config.recipe.learning_rate * multiplier}
  return {"optimizer.learning_rate": config.optimizer.learning_rate * multiplier}


def command(kind: str, keys: dict[str, Any], workdir: pathlib.Path) -> list[str]:
  """The command line of the run."""
  return [
    sys.executable,
    "-m",
    "llm.train",
    f"--config={CONFIGS / FILES[kind]}",
    f"--workdir={workdir}",
    *(f"--config.{name}={value}" for name, value in keys.items()),
  ]
