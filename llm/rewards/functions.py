"""Rewards of what a model writes: functions (answer, record) -> number.

answer: the text that the model wrote. record: the record that its prompt came from, with all of its
fields.
"""

import importlib
import re
from typing import Any, Callable

from llm.core import UserError, first_line

Reward = Callable[[str, dict], float]

# Names for config.objective.reward: "NAME" or "NAME:ARGUMENT" -> a function that takes the argument
# and gives the reward.
READY = {
  "exact_match": "llm.rewards.functions:exact_match",
  "regex": "llm.rewards.functions:regex",
  "reasoning_gym": "llm.rewards.functions:reasoning_gym",
  "classifier": "llm.inference.judging:classifier",
}


def exact_match(argument: str) -> Reward:
  """1 where the answer is the record's `answer`, or one of them, but for white space around it.

  argument: the field, in place of `answer`.
  """
  field = argument or "answer"

  def reward(answer: str, record: dict) -> float:
    expected = record[field]
    texts = expected if isinstance(expected, list) else [expected]
    return float(answer.strip() in [str(text).strip() for text in texts])

  return reward


def regex(argument: str) -> Reward:
  """1 where the pattern is in the answer, and its first group, if it has one, is the record's
  `answer`."""
  pattern = re.compile(argument)

  def reward(answer: str, record: dict) -> float:
    match = pattern.search(answer)
    if match and pattern.groups:
      return float((match[1] or "").strip() == str(record["answer"]).strip())
    return float(bool(match))

  return reward


def reasoning_gym(argument: str) -> Reward:
  """The score that a task of reasoning-gym gives the answer to one of its entries (the record)."""
  try:
    import reasoning_gym as gym  # pyright: ignore[reportMissingImports] (of the extra rewards)
  except ImportError:
    raise UserError("a reward of reasoning_gym needs the extra: pip install -e '.[rewards]'")
  score: Any = gym.get_score_answer_fn(argument)
  return lambda answer, record: score(answer=answer, entry=record)


def resolve(spec: str) -> Reward:
  """The function that config.objective.reward names. Raises UserError where there is none."""
  name, _, argument = spec.partition(":")
  if ready := READY.get(name):
    make = _imported(ready, spec)
    try:
      return make(argument)
    except UserError:
      raise
    except Exception as error:
      raise UserError(
        f"config.objective.reward={spec}: {type(error).__name__}: {first_line(error)}"
      )
  return _imported(spec, spec)


def prepare(reward: Reward, spec: str):
  """Lets a reward with a method `prepare` get ready, which no answer's time has to pay.

  Raises UserError where that fails.
  """
  get_ready = getattr(reward, "prepare", None)
  if get_ready is None:
    return
  try:
    get_ready()
  except Exception as error:  # a module may raise anything
    raise UserError(
      f"config.objective.reward={spec} cannot be prepared: {type(error).__name__}: "
      f"{first_line(error)}"
    )


def _imported(path: str, spec: str) -> Any:
  """The function of MODULE:FUNCTION. Raises UserError where it cannot be imported."""
  module, colon, name = path.partition(":")
  if not colon or not module or not name:
    raise UserError(
      f"config.objective.reward={spec!r} must be module:function, or one of "
      f"{', '.join(READY)}; these take an argument after a colon"
    )
  try:
    function = getattr(importlib.import_module(module), name)
  except Exception as error:  # a module may raise anything
    raise UserError(
      f"config.objective.reward={spec} cannot be imported: {type(error).__name__}: "
      f"{first_line(error)}; Python must find the module, e.g. by PYTHONPATH"
    )
  if not callable(function):
    raise UserError(
      f"config.objective.reward={spec} is no function but of type {type(function).__name__}"
    )
  return function
