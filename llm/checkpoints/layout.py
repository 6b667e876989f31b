"""What is read of a folder of transformers beside config.json and weights: index and tokenizer."""

import dataclasses
import pathlib
from typing import Annotated, Mapping

import msgspec
import tokenizers

from llm import reading
from llm.core import UserError
from llm.data import probing
from llm.data.tokenizer import (
  SPECIAL,
  HuggingFaceTokenizer,
  SentencePieceTokenizer,
  Tokenizer,
  WordPieceTokenizer,
)


@dataclasses.dataclass(frozen=True)
class Index:
  """The content of model.safetensors.index.json: the file of each tensor."""

  weight_map: dict[str, str]


@dataclasses.dataclass(frozen=True)
class AddedToken:
  """A token of tokenizer_config.json in its long form."""

  content: str


@dataclasses.dataclass(frozen=True)
class NamedTemplate:
  """One of several chat templates."""

  name: str
  template: str


Token = str | AddedToken | None


@dataclasses.dataclass(frozen=True)
class TokenizerSettings:
  """What is read of tokenizer_config.json. extra_ids: T5's sentinels."""

  pad_token: Token = None
  unk_token: Token = None
  cls_token: Token = None
  sep_token: Token = None
  mask_token: Token = None
  eos_token: Token = None
  bos_token: Token = None
  do_lower_case: bool = True
  extra_ids: Annotated[int, msgspec.Meta(ge=0, le=10_000)] | None = None
  chat_template: str | list[NamedTemplate] | None = None

  def template(self) -> str:
    """The chat template; of several, the default one. "" where there is none."""
    if isinstance(self.chat_template, list):
      return next((t.template for t in self.chat_template if t.name == "default"), "")
    return self.chat_template or ""

  def special_pieces(self) -> dict[str, str]:
    """pad, unk, ... -> piece, for those that are named."""
    pieces = {}
    for name in (*SPECIAL, "bos"):
      token = getattr(self, f"{name}_token")
      if token:
        pieces[name] = token if isinstance(token, str) else token.content
    return pieces


def read_tokenizer(path: pathlib.Path, sentinels: int = 0) -> Tokenizer:
  """The tokenizer of a folder, with its chat template where it has one, or of one file.

  sentinels: those that follow the pieces of a SentencePiece file, where no setting says so. Raises
  UserError where there is no tokenizer.
  """
  if not path.is_dir():
    return _of_file(path, sentinels)
  settings = TokenizerSettings()
  if (path / "tokenizer_config.json").is_file():
    settings = reading.read_json(path / "tokenizer_config.json", TokenizerSettings)
  try:
    tokenizer = _of_folder(path, settings, sentinels)
  except UserError as error:
    raise UserError(f"{path}: {error}")
  tokenizer.template = settings.template()
  if (path / "chat_template.jinja").is_file():
    tokenizer.template = reading.file_text(path / "chat_template.jinja")
  return tokenizer


def _of_file(path: pathlib.Path, sentinels: int) -> Tokenizer:
  """The tokenizer of a tokenizer.json, a vocab.txt or a SentencePiece model, by its ending."""
  content = reading.file_bytes(path)
  if path.suffix == ".json":
    return _of_definition(content)
  if path.suffix == ".txt":
    return WordPieceTokenizer(content)
  if path.suffix == ".model":
    return SentencePieceTokenizer(content, extra=sentinels)
  raise UserError(f"{path} is no tokenizer: its name must end in .json, .txt or .model")


def _of_definition(definition: bytes, special: Mapping[str, str] = {}) -> Tokenizer:
  """The tokenizer of a tokenizer.json, which is tried in a process of its own first."""
  if fault := probing.fault(definition):
    raise UserError(f"tokenizer.json cannot be used: {fault}")
  return HuggingFaceTokenizer(definition, special=special)


def _of_folder(folder: pathlib.Path, settings: TokenizerSettings, sentinels: int) -> Tokenizer:
  """Reads the first of tokenizer.json, vocab.txt, vocab.json with merges.txt, and spiece.model."""

  def has(*names: str) -> bool:
    return all((folder / name).is_file() for name in names)

  if has("tokenizer.json"):
    definition = reading.file_bytes(folder / "tokenizer.json")
    return _of_definition(definition, settings.special_pieces())
  if has("vocab.txt"):
    return WordPieceTokenizer(reading.file_bytes(folder / "vocab.txt"), settings.do_lower_case)
  if has("vocab.json", "merges.txt"):
    return _byte_level_bpe(folder)
  if has("spiece.model"):
    extra = sentinels if settings.extra_ids is None else settings.extra_ids
    return SentencePieceTokenizer(reading.file_bytes(folder / "spiece.model"), extra=extra)
  raise UserError(
    "there is no tokenizer (tokenizer.json, vocab.txt, vocab.json with merges.txt, or "
    "spiece.model): convert it with `python -m llm.convert from_hf --tokenizer=PATH`"
  )


def _byte_level_bpe(folder: pathlib.Path) -> Tokenizer:
  """That of GPT-2, in two files."""
  reading.read_json(folder / "vocab.json", dict[str, int])
  try:
    fast = tokenizers.ByteLevelBPETokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"))
  except Exception as error:  # the package raises nothing narrower
    raise UserError(f"merges.txt does not fit vocab.json: {error}")
  fast.add_special_tokens([t for t in ("<|endoftext|>",) if fast.token_to_id(t) is not None])
  return HuggingFaceTokenizer(fast.to_str().encode())
