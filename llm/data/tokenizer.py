"""Text to ids and back.

A tokenizer is a SentencePiece model, a WordPiece vocabulary, the tokenizer.json of a published
checkpoint, or bytes. All have the attributes of `Tokenizer`.
"""

import dataclasses
import functools
import json
import pathlib
import re
from typing import Annotated, Iterable, Literal, Mapping, Sequence

import msgspec
import numpy as np
import sentencepiece
import tokenizers
from etils import epath
from tokenizers.implementations.base_tokenizer import BaseTokenizer

from llm import cache, reading
from llm.core import UserError, first_line

META = "tokenizer_config.json"
MOST_PIECES = 2**24
# A piece of a single byte, where a vocabulary falls back to bytes.
FALLBACK = re.compile("<0x([0-9A-F]{2})>")
# Of a token. Published vocabularies have pieces of up to 128. So a text of more than this times a
# model's positions is too long, which need not be found by encoding megabytes.
MOST_CHARACTERS = 256
SPECIAL = ("pad", "unk", "cls", "sep", "mask", "eos")

Folder = pathlib.Path | epath.Path


class Tokenizer:
  """The attributes and methods of every tokenizer.

  pad, unk, cls, sep, mask, eos: the id of the special piece, or -1 where the vocabulary has none.
  pieces: the V strings of the vocabulary. starts_word_V: bool, whether a piece begins a word.
  files: file name -> content, as `save` writes them.
  """

  name: str
  pieces: list[str]
  starts_word_V: np.ndarray
  files: dict[str, bytes]
  lowercase: bool = False
  special: dict[str, str] = {}  # pad, unk, ... -> piece, where a checkpoint names its own
  extra: int = 0  # the number of sentinels after the pieces of the file
  template: str = ""  # the checkpoint's template of conversations (Jinja), if it has one
  pad = unk = cls = sep = mask = eos = -1

  def encode(self, texts: Sequence[str]) -> list[list[int]]:
    """The ids of each text, without special ones."""
    raise NotImplementedError

  def encode_spans(self, texts: Sequence[str]) -> list[tuple[list[int], np.ndarray]]:
    """The N ids of each text and their places in it: Nx2 characters, from and to."""
    raise NotImplementedError

  def decode(self, ids: Iterable[int]) -> str:
    """The text of the ids. Special ones are left out."""
    raise NotImplementedError

  def shown(self, token: int) -> str:
    """A piece as people read it."""
    return self.pieces[token]

  def bytes_of(self, token: int) -> bytes:
    """The bytes of a piece, which may be a part of a character."""
    byte = FALLBACK.fullmatch(self.pieces[token])
    return bytes.fromhex(byte[1]) if byte else self.pieces[token].encode()

  @property
  def vocab_size(self) -> int:
    """V, the number of pieces."""
    return len(self.pieces)

  @property
  def special_ids(self) -> np.ndarray:
    """The ids of special pieces and sentinels, in order. Masking inserts none of them."""
    ids = {self.id_of(name) for name in SPECIAL}
    ids.update(self.sentinels)
    ids.discard(-1)
    return np.array(sorted(ids), np.int32)

  @property
  def sentinels(self) -> list[int]:
    """The ids of <extra_id_0>, <extra_id_1>, .. (T5). They count down from the last id."""
    known = {piece: i for i, piece in enumerate(self.pieces) if piece.startswith("<extra_id_")}
    return [known[f"<extra_id_{n}>"] for n in range(len(known)) if f"<extra_id_{n}>" in known]

  def id_of(self, name: str) -> int:
    """The id of the special piece of a name in SPECIAL; -1 where the vocabulary has none."""
    return getattr(self, name)

  def require(self, *names: str) -> None:
    """Raises UserError where the vocabulary lacks one of these special pieces."""
    if missing := [name for name in names if self.id_of(name) == -1]:
      raise UserError(
        f"the {self.name} vocabulary has no piece for {', '.join(missing)}, which "
        "this objective needs; train one (config.tokenizer.path='')"
      )

  def digest(self) -> str:
    """A digest of the vocabulary: tokenizers of equal digests give equal ids."""
    return cache.digest(
      self.name,
      str(self.lowercase),
      str(self.extra),
      *self.files.values(),
      *(f"{k}={v}" for k, v in self.special.items()),
    )

  def save(self, folder: Folder) -> None:
    """Writes the files and their description into `folder`, for `load`."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in self.files.items():
      (folder / name).write_bytes(data)
    description = {
      "name": self.name,
      "lowercase": self.lowercase,
      "special": self.special,
      "extra": self.extra,
      "template": self.template,
    }
    (folder / META).write_text(json.dumps(description))


class SentencePieceTokenizer(Tokenizer):
  """A SentencePiece model (Kudo and Richardson 2018)."""

  name = "sentencepiece"
  FILE = "spiece.model"

  def __init__(self, model: bytes, lowercase: bool = False, extra: int = 0):
    self.files = {self.FILE: model}
    self.lowercase = lowercase
    self.extra = extra
    self._model = sentencepiece.SentencePieceProcessor()
    try:
      self._model.LoadFromSerializedProto(model)
    except RuntimeError:
      raise UserError("not a SentencePiece model")
    size = self._model.GetPieceSize()
    self.pieces = [self._model.IdToPiece(i) for i in range(size)] + _sentinel_pieces(extra)
    self.starts_word_V = np.array([p.startswith("▁") for p in self.pieces])
    self.pad = self._model.pad_id()
    self.unk = self._model.unk_id()
    self.eos = self._model.eos_id()
    ids = {piece: i for i, piece in enumerate(self.pieces)}
    self.cls = ids.get("[CLS]", -1)
    self.sep = ids.get("[SEP]", -1)
    self.mask = ids.get("[MASK]", -1)

  def encode(self, texts):
    return self._model.Encode(list(texts))

  def encode_spans(self, texts):
    mappings = self._model.Encode(list(texts), return_type="offset_mapping")
    return [(mapping["ids"], _spans(mapping["offsets"])) for mapping in mappings]

  def decode(self, ids):
    size = len(self.pieces) - self.extra  # the model does not know the sentinels
    return self._model.Decode([int(i) for i in ids if i < size])


class FastTokenizer(Tokenizer):
  """A tokenizer of the `tokenizers` package."""

  _fast: tokenizers.Tokenizer | BaseTokenizer

  def definition(self) -> bytes:
    """The content of a tokenizer.json that holds the whole tokenizer."""
    return self._fast.to_str().encode()

  def encode(self, texts):
    encodings = self._fast.encode_batch(list(texts), add_special_tokens=False)
    return [encoding.ids for encoding in encodings]

  def encode_spans(self, texts):
    encodings = self._fast.encode_batch(list(texts), add_special_tokens=False)
    return [(encoding.ids, _spans(encoding.offsets)) for encoding in encodings]

  def decode(self, ids):
    return self._fast.decode([int(i) for i in ids])


class WordPieceTokenizer(FastTokenizer):
  """BERT's WordPiece (Devlin et al. 2019, section 3), from a vocabulary file."""

  name = "wordpiece"
  FILE = "vocab.txt"

  def __init__(self, vocabulary: bytes, lowercase: bool = True):
    self.files = {self.FILE: vocabulary}
    self.lowercase = lowercase
    try:
      self.pieces = vocabulary.decode("utf-8").splitlines()
    except UnicodeDecodeError:
      raise UserError("the WordPiece vocabulary is not UTF-8")
    ids = {piece: i for i, piece in enumerate(self.pieces)}
    self.starts_word_V = np.array([not p.startswith("##") for p in self.pieces])
    for name in ("pad", "unk", "cls", "sep", "mask"):
      setattr(self, name, ids.get(f"[{name.upper()}]", -1))
    for name in ("unk", "cls", "sep"):
      if self.id_of(name) == -1:
        raise UserError(
          f"the WordPiece vocabulary has no [{name.upper()}]: it must have one piece a line, as "
          "BERT's vocab.txt"
        )
    self.eos = self.sep
    self._fast = tokenizers.BertWordPieceTokenizer(ids, lowercase=lowercase)


class HuggingFaceTokenizer(FastTokenizer):
  """Any tokenizer.json of the `tokenizers` package.

  special: pad, unk, .. -> piece, as the checkpoint names them. For any other name, the first of its
  SPELLINGS in the vocabulary counts.
  """

  name = "huggingface"
  FILE = "tokenizer.json"
  SPELLINGS = {
    "pad": ("[PAD]", "<pad>"),
    "unk": ("[UNK]", "<unk>"),
    "cls": ("[CLS]", "<s>"),
    "sep": ("[SEP]", "</s>"),
    "mask": ("[MASK]", "<mask>"),
    "eos": ("<|endoftext|>", "</s>", "<|im_end|>", "[SEP]"),
  }

  def __init__(self, definition: bytes, lowercase: bool = False, special: Mapping[str, str] = {}):
    self.files = {self.FILE: definition}
    self.special = dict(special)
    try:
      self._fast = tokenizers.Tokenizer.from_buffer(definition)
    except Exception as error:  # the package raises nothing narrower
      raise UserError(f"tokenizer.json cannot be read: {first_line(error)}")
    # The files of published checkpoints may ask for truncation and padding.
    self._fast.no_truncation()
    self._fast.no_padding()
    ids = self._fast.get_vocab(with_added_tokens=True)
    if not ids or max(ids.values()) >= MOST_PIECES:
      raise UserError(f"tokenizer.json must have ids from 0 to {MOST_PIECES - 1:,} at most")
    self.pieces = [""] * (max(ids.values()) + 1)
    for piece, i in ids.items():
      self.pieces[i] = piece
    for name, usual_spellings in self.SPELLINGS.items():
      spellings = (special[name],) if name in special else usual_spellings
      setattr(self, name, next((ids[s] for s in spellings if s in ids), -1))
    if any(p.startswith("##") for p in self.pieces):
      self.starts_word_V = np.array([not p.startswith("##") for p in self.pieces])
    else:
      self.starts_word_V = np.array([p.startswith(("Ġ", "▁")) for p in self.pieces])

  @functools.cached_property
  def _bytes_of_characters(self) -> dict[str, int]:
    """Where pieces spell bytes as characters: these, and their bytes."""
    decoder = json.loads(self.files[self.FILE]).get("decoder")
    if '"ByteLevel"' not in json.dumps(decoder):
      return {}
    return {character: byte for byte, character in _spelled_bytes().items()}

  def bytes_of(self, token):
    byte_of = self._bytes_of_characters
    piece = self.pieces[token]
    if piece and all(character in byte_of for character in piece):
      return bytes(byte_of[character] for character in piece)
    return super().bytes_of(token)


class ByteTokenizer(Tokenizer):
  """The 256 bytes of UTF-8, then the special pieces. A word begins with its space."""

  name = "bytes"

  def __init__(self, extra: int = 0):
    self.files = {}
    self.extra = extra
    self.pieces = [f"<{byte:02X}>" for byte in range(256)]
    for name in SPECIAL:
      setattr(self, name, len(self.pieces))
      self.pieces.append(f"[{name.upper()}]")
    self.pieces += _sentinel_pieces(extra)
    self.starts_word_V = np.arange(len(self.pieces)) == ord(" ")

  def encode(self, texts):
    return [list(text.encode("utf-8")) for text in texts]

  def encode_spans(self, texts):
    encoded = []
    for text in texts:
      bytes_of_character = [len(character.encode("utf-8")) for character in text]
      character = np.repeat(np.arange(len(text)), bytes_of_character)
      encoded.append((list(text.encode("utf-8")), np.stack([character, character + 1], 1)))
    return encoded

  def shown(self, token):
    character = chr(token)
    return character if token < 128 and character.isprintable() else self.pieces[token]

  def bytes_of(self, token):
    return bytes([token]) if token < 256 else super().bytes_of(token)

  def definition(self) -> bytes:
    """The content of a tokenizer.json that gives the same ids."""
    ids = {character: byte for byte, character in _spelled_bytes().items()}
    ids |= {piece: number for number, piece in enumerate(self.pieces) if number >= 256}
    fast = tokenizers.Tokenizer(tokenizers.models.BPE(ids, []))
    fast.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(False, use_regex=False)
    fast.decoder = tokenizers.decoders.ByteLevel()
    fast.add_special_tokens(self.pieces[256:])
    return fast.to_str().encode()

  def decode(self, ids):
    return bytes(int(i) for i in ids if i < 256).decode("utf-8", errors="replace")


def _spelled_bytes() -> dict[int, str]:
  """How the `tokenizers` package spells the 256 bytes: as characters that can be printed, in order
  of the latter."""
  printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
  others = [byte for byte in range(256) if byte not in printable]
  spelled = {byte: chr(byte) for byte in printable}
  return spelled | {byte: chr(256 + number) for number, byte in enumerate(others)}


def _spans(offsets: Sequence[tuple[int, int]]) -> np.ndarray:
  """Nx2 characters, from and to."""
  return np.array(offsets, np.int64).reshape(-1, 2)


def _sentinel_pieces(count: int) -> list[str]:
  """T5's sentinels in the order of their ids: <extra_id_0> comes last."""
  return [f"<extra_id_{n}>" for n in reversed(range(count))]


@dataclasses.dataclass(frozen=True)
class Description:
  """The content of META. The fields are attributes of `Tokenizer`."""

  name: Literal["sentencepiece", "wordpiece", "huggingface", "bytes"]
  lowercase: bool = False
  special: dict[str, str] = dataclasses.field(default_factory=dict)
  extra: Annotated[int, msgspec.Meta(ge=0, le=10_000)] = 0
  template: str = ""


def load(folder: Folder) -> Tokenizer:
  """The tokenizer that `save` wrote into `folder`. Raises UserError where it is not whole."""
  described = reading.read_json(folder / META, Description)
  try:
    tokenizer = _of_description(folder, described)
  except UserError as error:
    raise UserError(f"{folder}: {error}")
  tokenizer.template = described.template
  return tokenizer


def _of_description(folder: Folder, described: Description) -> Tokenizer:
  if described.name == ByteTokenizer.name:
    return ByteTokenizer(described.extra)
  if described.name == SentencePieceTokenizer.name:
    model = reading.file_bytes(folder / SentencePieceTokenizer.FILE)
    return SentencePieceTokenizer(model, described.lowercase, described.extra)
  if described.name == WordPieceTokenizer.name:
    pieces = reading.file_bytes(folder / WordPieceTokenizer.FILE)
    return WordPieceTokenizer(pieces, described.lowercase)
  definition = reading.file_bytes(folder / HuggingFaceTokenizer.FILE)
  return HuggingFaceTokenizer(definition, described.lowercase, described.special)
