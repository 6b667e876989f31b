"""Prompt and response: next-token prediction of the assistant's turns alone, end of turn included."""

import dataclasses
from typing import Callable, Mapping

import jinja2
import jinja2.sandbox
import numpy as np

from llm.core import UserError, first_line
from llm.data import packing
from llm.objectives import causal_lm

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

  def tokens(self, turns: list[dict], tokenizer) -> tuple[list[int], list[int]]:
    """(ids, whether each is learned) of a conversation."""
    whole, ids, learned, at = self.render(turns), [], [], 0

    def add(text: str, weight: int):
      more = self.encode(text, tokenizer)
      ids.extend(more)
      learned.extend([weight] * len(more))

    for number, turn in enumerate(turns):
      if not turn["weight"]:
        continue
      start, stop = len(self.render(turns[:number], True)), len(self.render(turns[: number + 1]))
      if not whole.startswith(self.render(turns[:number], True)) or not whole.startswith(
        self.render(turns[: number + 1])
      ):
        raise UserError(
          "config.objective.template must render the turns one after another: what comes later changes what "
          "came before, so that the assistant's tokens cannot be told"
        )
      reply = whole[start:stop]
      # The turn ends with the end token: as the template's variable, or spelled out in it.
      ends = [
        reply.rindex(mark) + len(mark)
        for mark in (END, tokenizer.pieces[tokenizer.eos])
        if mark in reply
      ]
      end = start + max(ends, default=len(reply))
      add(whole[at:start], 0)
      add(whole[start:end], 1)
      at = end
    add(whole[at:], 0)
    return ids, learned


def _refuse(message: str):
  raise jinja2.TemplateError(message)


def source_of(objective: Mapping, tokenizer) -> str:
  """The template that a checkpoint was trained with or came with; empty where it has none."""
  return (
    objective["template"] if objective["name"] in ("chat", "preference") else tokenizer.template
  )


def template_of(objective: Mapping, tokenizer) -> Template:
  """The same, ready to render."""
  return Template(source_of(objective, tokenizer), tokenizer.special.get("bos", ""))


@dataclasses.dataclass(frozen=True)
class ChatRows:
  """Conversations packed into rows."""

  encoded: list[tuple[np.ndarray, np.ndarray]]  # ids and whether each is learned
  packed: list[np.ndarray]
  length: int
  pad: int
  note: str

  @property
  def tokens(self) -> int:
    return sum(len(ids) - 1 for ids, _ in self.encoded)

  @property
  def examples(self) -> int:
    return len(self)

  def __len__(self) -> int:
    return len(self.packed)

  def __getitem__(self, i: int):
    return self, [self.encoded[n] for n in self.packed[i]]


@dataclasses.dataclass(frozen=True)
class Objective(causal_lm.Objective):
  """Cross-entropy of the assistant's tokens (Ouyang et al. 2022, section 3.5: supervised fine-tuning).

  template: Jinja, with `messages`, `eos_token` and `add_generation_prompt`; it is kept with the checkpoint. Empty:
  the one of the checkpoint that the run starts from, or TEMPLATE.
  """

  template: str = ""

  def __post_init__(self):
    Template(self.template)

  def fit(self, sources, tokenizer):
    return dataclasses.replace(self, template=self.template or tokenizer.template or TEMPLATE)

  def encoded(self, source, tokenizer, model, length: int, talks: Callable) -> tuple[list, str]:
    """(ids, learned) of every conversation that fits a row, and what became of the others. talks(record): those that must fit
    it together."""
    tokenizer.require("eos")
    if model.name not in ("gpt", "llama"):
      raise UserError(f"conversations need a decoder, model.name=gpt or llama, not {model.name}")
    template = Template(self.template, tokenizer.special.get("bos", ""))
    encoded, shortened, dropped = [], 0, 0
    for record in source.records():
      found, lost = fitted(talks(record), template, tokenizer, length)
      encoded += found
      shortened, dropped = shortened + (lost and bool(found)), dropped + (not found)
    return encoded, f"{shortened} lost their first turns, {dropped} left out as too long"

  def rows(self, source, tokenizer, data, model, length):
    encoded, others = self.encoded(
      source, tokenizer, model, length, lambda record: [conversation(record)]
    )
    if not encoded:
      raise UserError(
        f"{source.spec}: no conversation fits config.training.sequence_length={length}"
      )
    packed = packing.best_fit_decreasing(np.array([len(ids) - 1 for ids, _ in encoded]), length)
    fill = sum(len(ids) - 1 for ids, _ in encoded) / (len(packed) * length)
    return ChatRows(
      encoded,
      packed,
      length,
      max(tokenizer.pad, 0),
      f"{len(encoded)} conversations in {len(packed)} rows, {fill:.1%} full; {others}",
    )

  def example(self, row, rng):
    rows, conversations = row
    out = {
      "tokens": np.full(rows.length, rows.pad, np.int32),
      "weights": np.zeros(rows.length, np.float32),
    }
    out |= {k: np.zeros(rows.length, np.int32) for k in ("segments", "positions", "targets")}
    at = 0
    for number, (ids, learned) in enumerate(conversations, 1):
      here = slice(at, at + len(ids) - 1)
      out["tokens"][here], out["targets"][here], out["weights"][here] = (
        ids[:-1],
        ids[1:],
        learned[1:],
      )
      out["segments"][here], out["positions"][here] = number, np.arange(len(ids) - 1)
      at = here.stop
    return out


def fitted(talks: list[list[dict]], template: Template, tokenizer, room: int) -> tuple[list, bool]:
  """((ids, learned) of each talk, whether they lost their first turns), all of them together in `room` tokens.

  Talks begin alike. As long as they are too long, each loses its first exchange; [] where nothing to learn is left.
  """
  lost = False
  while all(talks):
    encoded = [template.tokens(turns, tokenizer) for turns in talks]
    if sum(len(ids) - 1 for ids, _ in encoded) <= room:
      return [
        (np.array(ids, np.int32), np.array(learned, np.float32)) for ids, learned in encoded
      ], lost
    talks, lost = [_later(turns) for turns in talks], True
  return [], lost


def _later(turns: list[dict]) -> list[dict]:
  """The conversation without its first exchange; [] where no assistant turn to learn from is left."""
  kept, rest = ([turns[0]], turns[1:]) if turns[0]["role"] == "system" else ([], turns)
  after = next((n + 1 for n, turn in enumerate(rest) if turn["role"] == "assistant"), len(rest))
  rest = rest[after:]
  return kept + rest if any(turn["weight"] for turn in rest) else []
