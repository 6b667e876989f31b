"""Prompt and response: next-token prediction of the assistant's turns and their ends alone."""

import dataclasses
from typing import Callable, Iterator, NamedTuple

import numpy as np

from llm import bounded
from llm.core import UserError, warn
from llm.data import packing, templates
from llm.data.sources import Source
from llm.data.tokenizer import Tokenizer
from llm.objectives import base, causal_lm

ROLES = ("system", "user", "assistant")

# Stands for the end token while a template renders: a private-use character. It is taken out of
# messages, or a text could end a turn. One that spells out the end token of a tokenizer.json still
# can, as in transformers.
END = "\ue000"

TEMPLATE = (
  "{% for message in messages %}"
  "{% if message.role == 'assistant' %}### Response:\n{{ message.content }}{{ eos_token }}\n\n"
  "{% elif message.role == 'user' %}### Instruction:\n{{ message.content }}\n\n"
  "{% else %}{{ message.content }}\n\n{% endif %}{% endfor %}"
  "{% if add_generation_prompt %}### Response:\n{% endif %}"
)


def conversation(record: dict) -> list[dict]:
  """The turns of a record, as [{"role", "content", "weight"}]. Weight 1 marks a turn to learn.

  A record has `messages`, as OpenAI's fine-tuning takes them, or the fields of Alpaca. Raises
  UserError if it has neither, or no assistant turn to learn from.
  """
  where = record.get("_where", "a record")
  if "messages" not in record:
    return _alpaca_turns(record, where)
  if not isinstance(record["messages"], list):
    raise UserError(f"{where}: messages must be a list of objects with role and content")
  turns = [
    turn_of(message, f"{where}: message {number}")
    for number, message in enumerate(record["messages"], 1)
  ]
  if not any(turn["weight"] for turn in turns):
    raise UserError(f"{where}: the conversation has no assistant turn to learn from")
  return turns


def _alpaca_turns(record: dict, where: str) -> list[dict]:
  """The two turns of a record with Alpaca's fields. Raises UserError if one is missing."""
  fields = [record.get(name, "") for name in ("instruction", "input", "output")]
  are_texts = all(isinstance(field, str) for field in fields)
  if not are_texts or not fields[0].strip() or not fields[2].strip():
    raise UserError(
      f"{where}: expected `messages`, or the texts `instruction`, `input` (may be empty) and "
      "`output`"
    )
  instruction, context, output = fields
  prompt = f"{instruction}\n\n{context}" if context.strip() else instruction
  return [
    {"role": "user", "content": prompt, "weight": 0},
    {"role": "assistant", "content": output, "weight": 1},
  ]


def turn_of(message: object, where: str) -> dict:
  """One of `messages` as a turn. Raises UserError if it is none."""
  if not isinstance(message, dict) or not isinstance(message.get("content"), str):
    raise UserError(f"{where} must be an object with the texts role and content")
  role = message.get("role")
  if role not in ROLES:
    raise UserError(f"{where} has the unknown role {role!r}; known: {', '.join(ROLES)}")
  weight = message.get("weight", 1)
  if weight not in (0, 1):
    raise UserError(f"{where} has weight {weight!r}; it must be 0 or 1")
  return {
    "role": role,
    "content": message["content"],
    "weight": weight if role == "assistant" else 0,
  }


class Template:
  """A chat template in Jinja, as in tokenizer_config.json (data/templates.py renders it).

  source: the template. bos: the text of the token that opens a conversation. Raises UserError if
  the source is no template.
  """

  def __init__(self, source: str, bos: str = ""):
    self._source = source
    self._bos = bos
    if fault := templates.fault(source):
      raise UserError(f"config.objective.template is no Jinja template: {fault}")

  def render(self, turns: list[dict], answering: bool = False) -> str:
    """The text of the turns. Raises UserError if the template fails.

    answering: the text goes on to where the assistant begins its answer.
    """
    return self._rendered([(turns, answering)])[0]

  def _rendered(self, conversations: list[tuple[list[dict], bool]]) -> list[str]:
    """The text of each of some (turns, whether it goes on to where the assistant answers).

    Raises UserError if the template fails, or takes too long or too much memory.
    """
    contexts = [
      {
        "messages": [{**turn, "content": turn["content"].replace(END, "")} for turn in turns],
        "add_generation_prompt": answering,
        "eos_token": END,
        "bos_token": self._bos,
      }
      for turns, answering in conversations
    ]
    try:
      return templates.render(self._source, contexts)
    except bounded.Failed as error:
      raise UserError(f"config.objective.template does not render: {error}")

  def encode(self, text: str, tokenizer: Tokenizer) -> list[int]:
    """The ids of a rendered text, with the end token in the place of END."""
    first, *others = tokenizer.encode(text.split(END))
    ids = list(first)
    for part in others:
      ids += [tokenizer.eos, *part]
    return ids

  def opening(self, turns: list[dict], tokenizer: Tokenizer) -> list[int]:
    """The ids of the turns, up to where the assistant begins its answer."""
    return self.encode(self.render(turns, answering=True), tokenizer)

  def tokens(self, turns: list[dict], tokenizer: Tokenizer) -> "Encoded":
    """The ids of a conversation, and which of them are learned.

    Raises UserError if the template mixes the assistant's text with that of other turns.
    """
    ids = []
    learned = []
    for text, weight in self._parts(turns, tokenizer):
      encoded = self.encode(text, tokenizer)
      ids += encoded
      learned += [weight] * len(encoded)
    return Encoded(np.array(ids, np.int32), np.array(learned, np.float32))

  def _parts(self, turns: list[dict], tokenizer: Tokenizer) -> Iterator[tuple[str, int]]:
    """The rendered conversation in parts: (text, 1 if it is learned, else 0)."""
    learned = [number for number, turn in enumerate(turns) if turn["weight"]]
    asked = [(turns, False)]
    for number in learned:
      asked += [(turns[:number], True), (turns[: number + 1], False)]
    whole, *others = self._rendered(asked)
    done = 0  # characters of `whole`
    for before, after in zip(others[::2], others[1::2]):
      if not whole.startswith(before) or not whole.startswith(after):
        raise UserError(
          "config.objective.template must render the turns one after another: here a later turn "
          "changes the text of an earlier one, so that the assistant's tokens cannot be told apart"
        )
      end = len(before) + _end_of_turn(whole[len(before) : len(after)], tokenizer)
      yield whole[done : len(before)], 0
      yield whole[len(before) : end], 1
      done = end
    yield whole[done:], 0


def _end_of_turn(reply: str, tokenizer: Tokenizer) -> int:
  """The characters of a rendered turn up to its last end token, or all if it has none.

  A template writes the end token as END, its variable, or as text.
  """
  ends = [
    reply.rindex(end) + len(end) for end in (END, tokenizer.pieces[tokenizer.eos]) if end in reply
  ]
  return max(ends, default=len(reply))


def template_of(objective: base.Objective, tokenizer: Tokenizer) -> str:
  """The template that a checkpoint was trained with or came with; "" if it has none."""
  return objective.chat_template() or tokenizer.template


class Encoded(NamedTuple):
  """One conversation: its ids, and for each of them 1 if it is learned, else 0."""

  ids: np.ndarray
  learned: np.ndarray

  @property
  def size(self) -> int:
    """The tokens that it takes in a row. The last id is a target only."""
    return len(self.ids) - 1


@dataclasses.dataclass(frozen=True)
class ChatRows:
  """Conversations packed into rows of `length` tokens.

  packed: the numbers of the conversations of each row. others: a note about those that are too
  long.
  """

  encoded: list[Encoded]
  packed: list[np.ndarray]
  length: int
  pad: int
  others: str

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
  """Cross-entropy of the assistant's tokens, in nats.

  It is the supervised fine-tuning of Ouyang et al. 2022, section 3.5. template: Jinja, with
  `messages`, `eos_token` and `add_generation_prompt`; the checkpoint keeps it. "" takes that of the
  checkpoint that the run starts from, or else TEMPLATE.
  """

  labelled = True

  template: str = ""

  def __post_init__(self):
    super().__post_init__()
    Template(self.template)

  def chat_template(self):
    return self.template

  def following(self, before):
    if self.template:
      return self
    return dataclasses.replace(self, template=base.build(before).chat_template())

  def fit(self, sources, tokenizer):
    return dataclasses.replace(self, template=self.template or tokenizer.template or TEMPLATE)

  def encoded(
    self,
    source: Source,
    tokenizer: Tokenizer,
    length: int,
    talks: Callable[[dict], list[list[dict]]],
  ) -> tuple[list[Encoded], str]:
    """(the conversations of a source that fit into rows, a note about the others).

    talks: gives the conversations of a record that must share a row.
    """
    tokenizer.require("eos")
    template = Template(self.template, tokenizer.special.get("bos", ""))
    encoded = []
    shortened = 0
    dropped = 0
    nothing_to_learn = 0
    with_empty = []
    for record in source.records():
      of_record = talks(record)
      fitting, was_shortened = fitted(of_record, template, tokenizer, length)
      if any(not turn["content"].strip() for turns in of_record for turn in turns):
        with_empty.append(record.get("_where", source.spec))
      encoded += fitting
      nothing_to_learn += sum(not talk.learned[1:].any() for talk in fitting)
      if not fitting:
        dropped += 1
      elif was_shortened:
        shortened += 1
    if with_empty:
      warn(f"{with_empty[0]}: a message is empty; {len(with_empty):,} records have such")
    _check_learned(nothing_to_learn, len(encoded), source.spec)
    return encoded, f"{shortened} lost their first turns, {dropped} left out as too long"

  def rows(self, source, tokenizer, data, model, length):
    encoded, others = self.encoded(source, tokenizer, length, lambda record: [conversation(record)])
    if not encoded:
      raise UserError(
        f"{source.spec}: no conversation fits config.training.sequence_length={length}"
      )
    packed = packing.best_fit_decreasing(np.array([c.size for c in encoded]), length)
    return ChatRows(encoded, packed, length, max(tokenizer.pad, 0), others)


def _check_learned(nothing: int, count: int, spec: str) -> None:
  """Raises UserError where no conversation has a token to learn; warns where some have none."""
  if not nothing:
    return
  message = f"{spec}: {nothing:,} of {count:,} conversations have no token to learn"
  if nothing == count:
    raise UserError(f"{message}: config.objective.template does not render what an assistant says")
  warn(message)


def fitted(
  talks: list[list[dict]], template: Template, tokenizer: Tokenizer, room: int
) -> tuple[list[Encoded], bool]:
  """(conversations that fit into `room` tokens together, whether they were shortened).

  The conversations begin with the same turns. While they are too long, each loses its first
  exchange. The list is empty if no turn to learn is left.
  """
  shortened = False
  while all(talks):
    encoded = [template.tokens(turns, tokenizer) for turns in talks]
    if sum(conversation.size for conversation in encoded) <= room:
      return encoded, shortened
    talks = [_without_first_exchange(turns) for turns in talks]
    shortened = True
  return [], shortened


def _without_first_exchange(turns: list[dict]) -> list[dict]:
  """The turns without those up to the first answer; a system turn stays.

  The list is empty if no turn to learn is left.
  """
  system = turns[:1] if turns[0]["role"] == "system" else []
  turns = turns[len(system) :]
  answers = [number for number, turn in enumerate(turns) if turn["role"] == "assistant"]
  later = turns[answers[0] + 1 :] if answers else []
  return system + later if any(turn["weight"] for turn in later) else []
