"""Keys that another key makes idle. Whoever gives one on the command line expects it to count."""

import re
from typing import Callable, Collection, NamedTuple

from llm import core, models
from llm.config import Config


class Rule(NamedTuple):
  """keys: a regex of GROUP.NAME. is_idle: whether the rest of a config makes them idle, and why."""

  keys: str
  is_idle: Callable[[Config], bool]
  why: str


def _has_given_rate(config: Config) -> bool:
  return config.optimizer.learning_rate != -1


RULES = (
  Rule(
    r"optimizer\.decay_share",
    lambda config: config.optimizer.schedule != "wsd",
    "config.optimizer.schedule=wsd alone reads it",
  ),
  Rule(
    r"optimizer\.(beta1|beta2|epsilon|moment_dtype)",
    lambda config: config.optimizer.name == "adafactor",
    "config.optimizer.name=adafactor does not read it",
  ),
  Rule(
    r"model\.lora_(alpha|targets|dropout)",
    lambda config: not config.model.lora_rank,
    "there are no adapters: config.model.lora_rank=0",
  ),
  Rule(
    r"model\.(local_)?rope_theta",
    lambda config: bool(config.model.name) and not models.facts(config.model).rotary,
    "the architecture has no rotary positions",
  ),
  Rule(
    r"model\.embedding_start",
    lambda config: bool(config.transfer.checkpoint),
    "the table comes from config.transfer.checkpoint",
  ),
  Rule(
    r"model\.local_rope_theta",
    lambda config: config.model.global_every == 1,
    "no layer is local: config.model.global_every=1",
  ),
  Rule(
    r"tokenizer\.(vocab_size|lowercase)",
    lambda config: config.tokenizer.name == "bytes",
    "config.tokenizer.name=bytes has a fixed vocabulary",
  ),
  Rule(
    r"tokenizer\.vocab_size",
    lambda config: bool(config.tokenizer.path),
    "the tokenizer is not trained: config.tokenizer.path is set",
  ),
  Rule(
    r"transfer\.(skip|rename|adapt|vocabulary)",
    lambda config: not config.transfer.checkpoint,
    "nothing is transferred: config.transfer.checkpoint is not set",
  ),
  Rule(
    r"training\.(eval_every|eval_batches)",
    lambda config: not config.data.eval,
    "nothing is evaluated: config.data.eval is not set",
  ),
  Rule(
    r"recipe\.(?!epochs)\w+",
    _has_given_rate,
    "config.optimizer.learning_rate is set, so it does not follow from the recipe",
  ),
  Rule(
    r"data\.sentences|objective\.short_share",
    lambda config: not config.objective.get("next_sentence"),
    "the objective pairs no sentences",
  ),
  Rule(
    r"objective\.threshold",
    lambda config: not config.objective.get("no_answer", True),
    "every question has an answer: config.objective.no_answer=False",
  ),
)


def warn(config: Config, given: Collection[str]) -> None:
  """Warns of each key of the command line, as GROUP.NAME, that is idle."""
  for key in given:
    for rule in RULES:
      if re.fullmatch(rule.keys, key) and rule.is_idle(config):
        core.warn(f"config.{key} does nothing: {rule.why}")
        break
