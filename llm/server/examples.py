"""Training files, validated line by line, and rewritten as llm.train reads them."""

import json
import pathlib
from typing import Any, Callable, Iterator

from llm.core import UserError, first_line
from llm.data.record_files import MOST_CHARACTERS
from llm.objectives import chat, preference

SHOWN = 3  # problems that an error names
ROLES = {"developer": "system"}  # OpenAI's names -> ours
# OpenAI's client sends these back with an answer of ours. They are not supported: each must be
# empty.
EMPTY = ("annotations", "audio", "function_call", "name", "refusal", "tool_calls")


def content_of(content: Any, where: str) -> str:
  """The text of a message: a string, or a list of parts of type text. Raises UserError."""
  if isinstance(content, list):
    parts = content
    if all(isinstance(p, dict) and isinstance(p.get("text"), str) for p in parts):
      if all(p.get("type") == "text" for p in parts):
        content = "".join(part["text"] for part in parts)
  if not isinstance(content, str):
    raise UserError(f"{where}: content must be a text; images, audio and tools are not supported")
  try:
    content.encode("utf-8")
  except UnicodeEncodeError:
    raise UserError(f"{where}: content holds half a character (a lone surrogate)")
  return content


def messages_of(value: Any, where: str, *, learned: bool = True) -> list[dict]:
  """Messages of OpenAI as ours. Raises UserError, naming the first that is wrong.

  learned: whether they may be learned from, so that a message may have a weight.
  """
  known = {"role", "content", "weight"} if learned else {"role", "content"}
  if not isinstance(value, list) or not value:
    raise UserError(f"{where}: messages must be a list of objects with role and content")
  messages = []
  for number, message in enumerate(value, 1):
    place = f"{where}: message {number}"
    if not isinstance(message, dict):
      raise UserError(f"{place} must be an object with role and content")
    absent = {key for key in EMPTY if message.get(key) in (None, "", [], {})}
    if unsupported := sorted(set(message) - known - absent):
      raise UserError(f"{place}: {unsupported[0]} is not supported")
    role = message.get("role")
    role = ROLES.get(role, role) if isinstance(role, str) else role
    if role not in chat.ROLES:
      raise UserError(f"{place} has the unknown role {role!r}; known: {', '.join(chat.ROLES)}")
    ours = {"role": role, "content": content_of(message.get("content"), place)}
    if "weight" in message:
      ours["weight"] = message["weight"]
    messages.append(ours)
  return messages


def _only(record: dict, known: set[str], where: str):
  if unsupported := sorted(set(record) - known):
    raise UserError(
      f"{where}: {unsupported[0]} is not supported; known: {', '.join(sorted(known))}"
    )


def supervised(record: dict, where: str) -> dict:
  """{"messages"} with an assistant's turn to learn."""
  _only(record, {"messages"}, where)
  messages = messages_of(record.get("messages"), where)
  chat.conversation({"messages": messages, "_where": where})
  return {"messages": messages}


def dpo(record: dict, where: str) -> dict:
  """{"input": {"messages"}, "preferred_output", "non_preferred_output"}."""
  _only(record, {"input", "preferred_output", "non_preferred_output"}, where)
  prompt = record.get("input")
  if not isinstance(prompt, dict):
    raise UserError(f"{where}: input must be an object with messages")
  _only(prompt, {"messages"}, f"{where}: input")
  ours = {
    "messages": messages_of(prompt.get("messages"), where),
    "chosen": messages_of(record.get("preferred_output"), f"{where}: preferred_output"),
    "rejected": messages_of(record.get("non_preferred_output"), f"{where}: non_preferred_output"),
  }
  preference.talks({**ours, "_where": where})
  return ours


def reinforcement(record: dict, where: str) -> dict:
  """{"messages"} that end with the user's turn, and fields that a grader compares with."""
  messages = messages_of(record.get("messages"), where)
  if messages[-1]["role"] != "user":
    raise UserError(f"{where}: the last message must be the user's: the model writes the answer")
  return {**record, "messages": messages}


READERS: dict[str, Callable[[dict, str], dict]] = {
  "supervised": supervised,
  "dpo": dpo,
  "reinforcement": reinforcement,
}


def any_method(record: dict, where: str) -> dict:
  """A line of any method: which one it is for is known when a job is made."""
  if "input" in record:
    return dpo(record, where)
  messages = messages_of(record.get("messages"), where)
  if messages[-1]["role"] == "assistant":
    return supervised(record, where)
  return reinforcement(record, where)


def _lines(path: pathlib.Path) -> Iterator[tuple[int, bytes]]:
  """Numbers, from 1, and lines. A line of MOST_CHARACTERS bytes or more is cut there."""
  number = 0
  with open(path, "rb") as file:
    while line := file.readline(MOST_CHARACTERS):
      number += 1
      yield number, line
      is_cut = len(line) == MOST_CHARACTERS
      while is_cut and line and not line.endswith(b"\n"):
        line = file.readline(2**20)


def _records(path: pathlib.Path) -> Iterator[tuple[str, Any]]:
  """(where, record) of each line that is not empty; in place of a broken line, a UserError."""
  for number, line in _lines(path):
    if not line.strip():
      continue
    where = f"line {number}"
    if len(line) >= MOST_CHARACTERS:
      yield where, UserError(f"{where} has more than {MOST_CHARACTERS:,} bytes")
      continue
    try:
      record = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
    except (ValueError, RecursionError) as error:
      fault = getattr(error, "msg", None) or first_line(error)
      yield where, UserError(f"{where} is no JSON: {fault}")
      continue
    is_object = isinstance(record, dict)
    yield where, record if is_object else UserError(f"{where} must be a JSON object")


def read(path: pathlib.Path, reader: Callable[[dict, str], dict]) -> Iterator[dict]:
  """The lines of a file as `reader` makes them. Raises UserError that names the broken ones."""
  problems: list[str] = []  # the first of them: a file may have millions
  broken = 0
  count = 0
  for where, record in _records(path):
    count += 1
    try:
      if isinstance(record, UserError):
        raise record
      example = reader(record, where)
    except UserError as error:
      broken += 1
      if broken <= SHOWN:
        problems.append(first_line(error))
      continue
    if not broken:
      yield example
  if not count:
    raise UserError("the file has no line: give a JSON object a line")
  if broken:
    more = f", and {broken - SHOWN} more" if broken > SHOWN else ""
    raise UserError(f"invalid file format: {'; '.join(problems)}{more}")


def rewrite(source: pathlib.Path, reader: Callable[[dict, str], dict], target: pathlib.Path) -> int:
  """Writes the lines of a file as `reader` makes them, and says how many. Raises UserError."""
  scratch = target.with_suffix(".tmp")
  count = 0
  try:
    with open(scratch, "w", encoding="utf-8") as file:
      for example in read(source, reader):
        file.write(json.dumps(example) + "\n")
        count += 1
  except BaseException:
    scratch.unlink()
    raise
  scratch.replace(target)
  return count
