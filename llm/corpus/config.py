"""The config of `llm.prepare`: what is read, the steps, the tokenizer, the shards."""

import dataclasses
from typing import Any, Callable, Mapping

import ml_collections

from llm import config as config_lib
from llm.config import TokenizerConfig, key
from llm.core import UserError
from llm.corpus import readers, web, wikipedia
from llm.corpus.inputs import Piece
from llm.corpus.readers import Items
from llm.corpus.steps import STEPS


@dataclasses.dataclass(frozen=True)
class Tokenizer(TokenizerConfig):
  """The tokenizer of the shards: that of a checkpoint, one in a file, or one that is trained.

  Its keys are those of a run's tokenizer, two of them with other bounds, and two more.
  """

  name: str = key("sentencepiece", choices=("sentencepiece", "wordpiece", "huggingface", "bytes"))
  vocab_size: int = key(8192, above=0)
  # A workdir of llm.train, whose tokenizer is taken; "": none.
  checkpoint: str = ""
  # Characters of cleaned text that one is trained on: 50 million take 1.4 GiB.
  sample: int = key(50_000_000, above=0)


@dataclasses.dataclass(frozen=True)
class Shards:
  """The token shards."""

  # split and lines keep where sentences begin, which next-sentence prediction needs; none does not.
  sentences: str = key("split", choices=("split", "lines", "none"))


@dataclasses.dataclass(frozen=True)
class Prepare:
  """One corpus. steps: names of `STEPS`, or module:function, in the order in which they are done.

  settings: step -> its dataclass.
  """

  input: str
  reader: str
  steps: tuple[str, ...]
  settings: Mapping[str, Any]
  tokenizer: Tokenizer
  shards: Shards


GROUPS: dict[str, Any] = {**STEPS, "tokenizer": Tokenizer, "shards": Shards}
KEYS = ("input", "reader", "steps")
# How config.reader reads a piece of a file, and the endings of the files that a folder stands for.
READERS: dict[str, tuple[Callable[[Piece], Items], tuple[str, ...]]] = {
  "wikipedia": (wikipedia.articles, wikipedia.ENDINGS),
  "web": (web.pages, web.ENDINGS),
  "text": (readers.text_files, tuple(readers.TEXT_FILES)),
}


def defaults(reader: str, steps: tuple[str, ...]) -> Any:
  """An ml_collections.ConfigDict for files in configs/, with the thresholds of the steps."""
  used = {name: dataclasses.asdict(GROUPS[name]()) for name in GROUPS}
  return ml_collections.ConfigDict({"input": "", "reader": reader, "steps": steps, **used})


def check_key(key: str):
  """Raises UserError, naming the nearest key, if no config of a corpus has `key`."""
  group, *names = key.split(".")
  if group in KEYS and not names:
    return
  if group not in GROUPS:
    raise config_lib.unknown_key("config", group, [*KEYS, *GROUPS])
  config_lib.check_name(group, names, GROUPS[group])


def freeze(config: Mapping[str, Any]) -> Prepare:
  """ConfigDict or plain dict -> Prepare. Raises UserError on a bad key, value or step."""
  plain = config.to_dict() if isinstance(config, ml_collections.ConfigDict) else dict(config)
  for name in plain:
    if name not in (*KEYS, *GROUPS):
      raise config_lib.unknown_key("config", name, [*KEYS, *GROUPS])
  if not plain.get("input"):
    raise UserError("config.input is not set: give files, a pattern or a folder")
  if plain.get("reader") not in READERS:
    raise UserError(f"config.reader={plain.get('reader')!r}: expected one of {', '.join(READERS)}")
  steps = plain.get("steps", ())
  steps = (steps,) if isinstance(steps, str) else tuple(steps)
  for step in steps:
    if not isinstance(step, str) or step not in STEPS and ":" not in step:
      raise UserError(
        f"config.steps: there is no step {step!r}; the steps are {', '.join(STEPS)}, or a function "
        "of your own as module:function"
      )
  if twice := {step for step in steps if steps.count(step) > 1}:
    raise UserError(f"config.steps names {', '.join(sorted(twice))} twice")
  groups = {
    name: config_lib.build(cls, plain.get(name, {}), f"config.{name}")
    for name, cls in GROUPS.items()
  }
  settings = {name: groups[name] for name in STEPS}
  return Prepare(
    plain["input"], plain["reader"], steps, settings, groups["tokenizer"], groups["shards"]
  )


def thaw(config: Prepare) -> dict[str, Any]:
  """Prepare -> plain dict, for JSON: what `freeze` takes, without steps that are not used."""
  used = {k: dataclasses.asdict(v) for k, v in config.settings.items() if k in config.steps}
  return {
    "input": config.input,
    "reader": config.reader,
    "steps": list(config.steps),
    **used,
    "tokenizer": dataclasses.asdict(config.tokenizer),
    "shards": dataclasses.asdict(config.shards),
  }
