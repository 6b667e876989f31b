"""Prompt and response: next-token prediction of the assistant's turns alone, end of turn included."""

import dataclasses
from typing import Callable, NamedTuple

import jinja2
import jinja2.sandbox
import numpy as np

from llm.core import UserError, first_line
from llm.data import packing
from llm.data.sources import Source
from llm.data.tokenizer import Tokenizer
from llm.objectives import base, causal_lm

ROLES = ("system", "user", "assistant")
END = (
  "\ue000"  # stands for the end token while a template renders: a private-use character, in no text
)

TEMPLATE = (
  "{% for message in messages %}"
  "{% if message.role == 'assistant' %}### Response:\n{{ message.content }}{{ eos_token }}\n\n"
  "{% elif message.role == 'user' %}### Instruction:\n{{ message.content }}\n\n"
  "{% else %}{{ message.content }}\n\n{% endif %}{% endfor %}"
  "{% if add_generation_prompt %}### Response:\n{% endif %}"
)


def conversation(record: dict) -> list[dict]:
  """[{"role", "content", "weight"}] of a record: `messages` (OpenAI's fine-tuning) or Alpaca's fields.

  Raises UserError naming what is wrong.
  """
  where = record.get("_where", "a record")
  if "messages" not in record:
    fields = [record.get(k, "") for k in ("instruction", "input", "output")]
    if (
      not all(isinstance(f, str) for f in fields) or not fields[0].strip() or not fields[2].strip()
    ):
      raise UserError(
        f"{where}: expected `messages`, or the texts `instruction`, `input` (may be empty) and `output`"
      )
    asked = fields[0] + (f"\n\n{fields[1]}" if fields[1].strip() else "")
    return [
      {"role": "user", "content": asked, "weight": 0},
      {"role": "assistant", "content": fields[2], "weight": 1},
    ]
  turns = []
  if not isinstance(record["messages"], list):
    raise UserError(f"{where}: messages must be a list of objects with role and content")
  for number, message in enumerate(record["messages"], 1):
    if not isinstance(message, dict) or not isinstance(message.get("content"), str):
      raise UserError(
        f"{where}: message {number} must be an object with the texts role and content"
      )
    if message.get("role") not in ROLES:
      raise UserError(
        f"{where}: message {number} has the unknown role {message.get('role')!r}; known: {', '.join(ROLES)}"
      )
    weight = message.get("weight", 1)
    if weight not in (0, 1):
      raise UserError(f"{where}: message {number} has weight {weight!r}; it must be 0 or 1")
    turns.append(
      {
        "role": message["role"],
        "content": message["content"],
        "weight": weight if message["role"] == "assistant" else 0,
      }
    )
  if not any(turn["weight"] for turn in turns):
    raise UserError(f"{where}: the conversation has no assistant turn to learn from")
  return turns


class Template:
  """A chat template in the Jinja form of tokenizer_config.json, rendered in a sandbox."""

  def __init__(self, source: str, bos: str = ""):
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.globals["raise_exception"] = _refuse  # as transformers gives it to templates
    self._bos = bos
    try:
      self._template = environment.from_string(source)
    except jinja2.TemplateError as error:
      raise UserError(f"config.objective.template is no Jinja template: {error}")

  def render(self, turns: list[dict], answering: bool = False) -> str:
    """The text of the turns; answering: up to where the assistant begins. Raises UserError."""
    try:
      return self._template.render(
        messages=turns, add_generation_prompt=answering, eos_token=END, bos_token=self._bos
      )
    except (
      Exception
    ) as error:  # a template may raise anything; the sandbox refuses what is not rendering
      raise UserError(
        f"config.objective.template does not render: {type(error).__name__}: {first_line(error)}"
      )

  def encode(self, text: str, tokenizer) -> list[int]:
    """Ids of a rendered text, with the end token where the template put it."""
    parts = tokenizer.encode(text.split(END))
    return [*parts[0], *(i for part in parts[1:] for i in (tokenizer.eos, *part))]

  def opening(self, turns: list[dict], tokenizer) -> list[int]:
    """Ids of the turns, up to where the assistant answers."""
    return self.encode(self.render(turns, answering=True), tokenizer)

  def tokens(self, turns: list[dict], tokenizer: Tokenizer) -> "Encoded":
    """A conversation as ids. Raises UserError where the assistant's tokens cannot be told apart."""
    whole = self.render(turns)
    ids, learned, at = [], [], 0

    def add(text: str, weight: int):
      more = self.encode(text, tokenizer)
      ids.extend(more)
      learned.extend([weight] * len(more))

    for number, turn in enumerate(turns):
      if not turn["weight"]:
        continue
      before, after = self.render(turns[:number], True), self.render(turns[: number + 1])
      if not whole.startswith(before) or not whole.startswith(after):
        raise UserError(
          "config.objective.template must render the turns one after another: what comes later "
          "changes what came before, so that the assistant's tokens cannot be told apart"
        )
      end = len(before) + _end_of_turn(whole[len(before) : len(after)], tokenizer)
      add(whole[at : len(before)], 0)
      add(whole[len(before) : end], 1)
      at = end
    add(whole[at:], 0)
    return Encoded(np.array(ids, np.int32), np.array(learned, np.float32))


def _end_of_turn(reply: str, tokenizer: Tokenizer) -> int:
  """Where a rendered turn ends: after its end token, the template's variable or spelled out."""
  marks = (END, tokenizer.pieces[tokenizer.eos])
  return max(
    (reply.rindex(mark) + len(mark) for mark in marks if mark in reply), default=len(reply)
  )


def _refuse(message: str):
  raise jinja2.TemplateError(message)


def template_of(objective: base.Objective, tokenizer: Tokenizer) -> str:
  """The template that a checkpoint was trained with or came with; empty where it has none."""
  return objective.chat_template() or tokenizer.template


class Encoded(NamedTuple):
  """One conversation: its ids, and whether each of them is learned."""

  ids: np.ndarray
  learned: np.ndarray

  @property
  def size(self) -> int:
    """Tokens of a row that it takes: the last id is a target only."""
    return len(self.ids) - 1


@dataclasses.dataclass(frozen=True)
class ChatRows:
  """Conversations packed into rows."""

  encoded: list[Encoded]
  packed: list[np.ndarray]  # row -> numbers of conversations
  length: int
  pad: int
  others: str  # what became of the conversations that are too long

  @property
  def tokens(self) -> int:
    return sum(conversation.size for conversation in self.encoded)

  @property
  def examples(self) -> int:
    return len(self)

  @property
  def note(self) -> str:
    fill = self.tokens / (len(self) * self.length)
    return f"{len(self.encoded)} conversations in {len(self)} rows, {fill:.1%} full; {self.others}"

  def __len__(self) -> int:
    return len(self.packed)

  def example(self, i, rng):
    conversations = [self.encoded[number] for number in self.packed[i]]
    examples = [
      {"tokens": ids[:-1], "targets": ids[1:], "weights": learned[1:]}
      for ids, learned in conversations
    ]
    return packing.lay_out(examples, self.length, self.pad)[0]


@dataclasses.dataclass(frozen=True)
class Objective(causal_lm.Objective):
  """Cross-entropy of the assistant's tokens (Ouyang et al. 2022, section 3.5: supervised fine-tuning).

  template: Jinja, with `messages`, `eos_token` and `add_generation_prompt`; it is kept with the
  checkpoint. Empty: that of the checkpoint that the run starts from, or TEMPLATE.
  """

  template: str = ""

  def __post_init__(self):
    super().__post_init__()
    Template(self.template)

  def chat_template(self):
    return self.template

  def fit(self, sources, tokenizer):
    return dataclasses.replace(self, template=self.template or tokenizer.template or TEMPLATE)

  def encoded(
    self, source: Source, tokenizer: Tokenizer, length: int, talks: Callable
  ) -> tuple[list[Encoded], str]:
    """Every conversation that fits a row, and what became of the others.

    talks: record -> the conversations that must fit a row together.
    """
    tokenizer.require("eos")
    template = Template(self.template, tokenizer.special.get("bos", ""))
    encoded, shortened, dropped = [], 0, 0
    for record in source.records():
      fitting, cut = fitted(talks(record), template, tokenizer, length)
      encoded += fitting
      shortened += cut and bool(fitting)
      dropped += not fitting
    return encoded, f"{shortened} lost their first turns, {dropped} left out as too long"

  def rows(self, source, tokenizer, data, model, length):
    encoded, others = self.encoded(source, tokenizer, length, lambda r: [conversation(r)])
    if not encoded:
      raise UserError(
        f"{source.spec}: no conversation fits config.training.sequence_length={length}"
      )
    packed = packing.best_fit_decreasing(np.array([c.size for c in encoded]), length)
    return ChatRows(encoded, packed, length, max(tokenizer.pad, 0), others)


def fitted(
  talks: list[list[dict]], template: Template, tokenizer: Tokenizer, room: int
) -> tuple[list[Encoded], bool]:
  """The talks encoded, all of them together in `room` tokens, and whether they lost their first turns.

  Talks begin alike. As long as they are too long, each loses its first exchange; [] where nothing to
  learn is left.
  """
  shortened = False
  while all(talks):
    encoded = [template.tokens(turns, tokenizer) for turns in talks]
    if sum(conversation.size for conversation in encoded) <= room:
      return encoded, shortened
    talks, shortened = [_later(turns) for turns in talks], True
  return [], shortened


def _later(turns: list[dict]) -> list[dict]:
  """The conversation without its first exchange; [] where no assistant turn to learn from is left."""
  kept, rest = ([turns[0]], turns[1:]) if turns[0]["role"] == "system" else ([], turns)
  after = next((n + 1 for n, turn in enumerate(rest) if turn["role"] == "assistant"), len(rest))
  rest = rest[after:]
  return kept + rest if any(turn["weight"] for turn in rest) else []
