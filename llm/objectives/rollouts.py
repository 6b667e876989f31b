"""Prompts as rows, and the answers that a model writes to them: what GRPO learns from."""

import dataclasses
import zlib
from typing import Any, NamedTuple, Sequence

import numpy as np

from llm.core import UserError
from llm.data import packing
from llm.data.tokenizer import Tokenizer
from llm.objectives import base, chat

EPSILON = 1e-4  # is added to the standard deviation of a group


def opening(record: dict) -> list[dict]:
  """The turns before the answer. A record has `messages`, of which the user has the last, or
  `prompt`. Raises UserError if it has neither."""
  where = record.get("_where", "a record")
  messages = record.get("messages", record.get("prompt"))
  if isinstance(messages, str):
    messages = [{"role": "user", "content": messages}]
  if not isinstance(messages, list) or not messages:
    raise UserError(f"{where}: expected `prompt`, a text, or `messages`, a list of messages")
  turns = [chat.turn_of(message, f"{where}: message {n}") for n, message in enumerate(messages, 1)]
  if turns[-1]["role"] != "user":
    raise UserError(f"{where}: the last message must be the user's: the model writes the answer")
  return turns


class Prompt(NamedTuple):
  """The ids of a prompt, and the record that it is made of."""

  ids: np.ndarray
  record: dict


@dataclasses.dataclass(frozen=True)
class PromptRows:
  """Prompts, one a row. What is learned are the answers, which the model writes in training.

  spec: of the source. length: of a row. dropped: how many were too long.
  """

  spec: str
  prompts: list[Prompt]
  tokenizer: Tokenizer
  length: int
  dropped: int
  has_reference: bool

  @property
  def number(self) -> int:
    """Of the source. A batch names its prompts by it and by their number in the source."""
    return zlib.crc32(self.spec.encode()) >> 1

  @property
  def tokens(self) -> int:
    return sum(len(prompt.ids) for prompt in self.prompts)

  @property
  def examples(self) -> int:
    return len(self)

  @property
  def note(self) -> str:
    return f"{len(self)} prompts, {self.dropped} left out as too long"

  def __len__(self) -> int:
    return len(self.prompts)

  def example(self, i, rng):
    nothing = base.Answer(np.zeros(0, np.int32), np.zeros(0, np.float32), False)
    row = self.row([Written(self.prompts[i].ids, nothing, 0.0, 0.0)])
    return {**row, "record": np.array([self.number, i + 1], np.int32)}

  def row(self, written: Sequence["Written"]) -> dict[str, np.ndarray]:
    """The arrays of a row of prompts with their answers, each a segment."""
    examples = [one.arrays(self.has_reference) for one in written]
    return packing.lay_out(examples, self.length, max(self.tokenizer.pad, 0))[0]


class Written(NamedTuple):
  """An answer to a prompt, to be learned. weight: of each of its tokens."""

  prompt: np.ndarray
  answer: base.Answer
  advantage: float
  weight: float

  @property
  def size(self) -> int:
    """The tokens that it takes in a row. The last id is a target only."""
    return len(self.prompt) + len(self.answer.ids) - 1

  def arrays(self, has_reference: bool) -> dict[str, np.ndarray]:
    """One value a token: of the prompt, which is not learned, then of the answer."""
    ids = np.r_[self.prompt, self.answer.ids]
    before = np.zeros(len(self.prompt) - 1, np.float32)
    learned = np.r_[before, np.ones(len(self.answer.ids), np.float32)]
    arrays = {
      "tokens": ids[:-1],
      "targets": ids[1:],
      "weights": learned * np.float32(self.weight),
      "advantages": learned * np.float32(self.advantage),
      "sampled_losses": np.r_[before, self.answer.losses],
    }
    return {**arrays, "reference_losses": 0 * learned} if has_reference else arrays


class Group(NamedTuple):
  """The answers to one prompt. rewards: NaN where an answer has none, and its fault says why."""

  prompt: Prompt
  answers: list[base.Answer]
  texts: list[str]
  rewards: np.ndarray
  faults: list[str]

  @property
  def has_signal(self) -> bool:
    """Whether its answers differ in their rewards: else it teaches nothing."""
    graded = self.rewards[~np.isnan(self.rewards)]
    return len(graded) > 1 and graded.min() < graded.max()

  def advantages(self, scale: str) -> np.ndarray:
    """How much better than the others each answer is; 0 where it has no reward.

    The reward less the mean of the group, for `std` over the standard deviation of its sample
    (Shao et al. 2024, section 4.1.2). Without the division: Liu et al. 2025, section 3.2.
    """
    if not self.has_signal:
      return np.zeros(len(self.rewards))
    centred = self.rewards - np.nanmean(self.rewards)
    if scale == "std":
      centred /= np.nanstd(self.rewards, ddof=1) + EPSILON
    return np.nan_to_num(centred)

  def sample(self, tokenizer: Tokenizer) -> dict[str, Any]:
    """The group as a record to look at."""
    answers = [
      {"text": text, "tokens": len(answer.ids), "ended": answer.ended, **_graded(reward, fault)}
      for text, answer, reward, fault in zip(self.texts, self.answers, self.rewards, self.faults)
    ]
    return {"prompt": tokenizer.decode(self.prompt.ids), "answers": answers}


def _graded(reward: float, fault: str) -> dict[str, Any]:
  return {"fault": fault} if np.isnan(reward) else {"reward": float(reward)}
