"""Text to ids and back: SentencePiece (trained here or loaded), WordPiece vocabularies, the tokenizer.json
of published checkpoints, bytes.

All of them have the attributes of `Tokenizer`; an id that a vocabulary does not have is -1.
"""

import io
import json
import pathlib
from typing import Iterable, Mapping, Sequence

import numpy as np
import sentencepiece
import tokenizers

from llm.config import TokenizerConfig
from llm.core import UserError, first_line
from llm.data import cache

META = "tokenizer_config.json"
SPECIAL = ("pad", "unk", "cls", "sep", "mask", "eos")


class Tokenizer:
  """What the rest of the code knows of a tokenizer.

  pad, unk, cls, sep, mask, eos: ids or -1. pieces: the V strings. starts_word_V: bool, whether a
  piece begins a word. files: what `save` writes, by name.
  """

  name: str
  pieces: list[str]
  starts_word_V: np.ndarray
  files: dict[str, bytes]
  lowercase: bool = False
  special: dict[str, str] = {}  # pad, unk, ... -> piece, where the files do not say it
  extra: int = 0  # sentinels after the pieces of the file
  template: str = ""  # of conversations, in Jinja, where the checkpoint came with one
  pad = unk = cls = sep = mask = eos = -1

  def encode(self, texts: Sequence[str]) -> list[list[int]]:
    """Ids of each text, no special ones added."""
    raise NotImplementedError

  def encode_spans(self, texts: Sequence[str]) -> list[tuple[list[int], np.ndarray]]:
    """Ids of each text and where each stands in it: Nx2 characters, from and to."""
    raise NotImplementedError

  def decode(self, ids: Iterable[int]) -> str:
    """The text of ids; special ones are left out."""
    raise NotImplementedError

  @property
  def vocab_size(self) -> int:
    return len(self.pieces)

  @property
  def special_ids(self) -> np.ndarray:
    """The ids that no mask may hide and no random replacement may be."""
    return np.array(
      sorted({*(getattr(self, s) for s in SPECIAL), *self.sentinels} - {-1}), np.int32
    )

  @property
  def sentinels(self) -> list[int]:
    """T5's <extra_id_0>, <extra_id_1>, ..: they count down from the top of the vocabulary."""
    known = {piece: i for i, piece in enumerate(self.pieces) if piece.startswith("<extra_id_")}
    return [known[f"<extra_id_{n}>"] for n in range(len(known)) if f"<extra_id_{n}>" in known]

  def id_of(self, name: str) -> int:
    """The id of a special piece (SPECIAL); -1 where the vocabulary has none."""
    return getattr(self, name)

  def require(self, *names: str):
    """Raises UserError unless the vocabulary has these special ids."""
    if missing := [n for n in names if getattr(self, n) == -1]:
      raise UserError(
        f"the {self.name} vocabulary has no piece for {', '.join(missing)}, which "
        "this objective needs; train one (config.tokenizer.path='')"
      )

  def digest(self) -> str:
    return cache.digest(
      self.name,
      str(self.lowercase),
      str(self.extra),
      *self.files.values(),
      *(f"{k}={v}" for k, v in self.special.items()),
    )

  def save(self, folder: pathlib.PurePath):
    """Writes the files, and what they are; `load` reads them."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in self.files.items():
      (folder / name).write_bytes(data)
    meta = {
      "name": self.name,
      "lowercase": self.lowercase,
      "special": self.special,
      "extra": self.extra,
      "template": self.template,
    }
    (folder / META).write_text(json.dumps(meta))


class SentencePieceTokenizer(Tokenizer):
  """A SentencePiece model (Kudo and Richardson 2018)."""

  name = "sentencepiece"
  FILE = "spiece.model"

  def __init__(self, model: bytes, lowercase: bool = False, extra: int = 0):
    self.files, self.lowercase, self.extra = {self.FILE: model}, lowercase, extra
    self._sp = sentencepiece.SentencePieceProcessor()
    try:
      self._sp.LoadFromSerializedProto(model)
    except RuntimeError:
      raise UserError("not a SentencePiece model")
    size = self._sp.GetPieceSize()
    self.pieces = [self._sp.IdToPiece(i) for i in range(size)] + _sentinel_pieces(extra)
    self.starts_word_V = np.array([p.startswith("▁") for p in self.pieces])
    self.pad, self.unk, self.eos = self._sp.pad_id(), self._sp.unk_id(), self._sp.eos_id()
    known = {p: i for i, p in enumerate(self.pieces)}
    self.cls, self.sep, self.mask = (known.get(p, -1) for p in ("[CLS]", "[SEP]", "[MASK]"))

  def encode(self, texts):
    return self._sp.Encode(list(texts))

  def encode_spans(self, texts):
    found = self._sp.Encode(list(texts), return_type="offset_mapping")
    return [(f["ids"], _spans(f["offsets"])) for f in found]

  def decode(self, ids):
    return self._sp.Decode([int(i) for i in ids if i < len(self.pieces) - self.extra])


class FastTokenizer(Tokenizer):
  """One that the `tokenizers` package computes: `_fast`."""

  def definition(self) -> bytes:
    """All of it as a tokenizer.json."""
    return self._fast.to_str().encode()

  def encode(self, texts):
    return [e.ids for e in self._fast.encode_batch(list(texts), add_special_tokens=False)]

  def encode_spans(self, texts):
    return [
      (e.ids, _spans(e.offsets))
      for e in self._fast.encode_batch(list(texts), add_special_tokens=False)
    ]

  def decode(self, ids):
    return self._fast.decode([int(i) for i in ids])


class WordPieceTokenizer(FastTokenizer):
  """BERT's WordPiece (Devlin et al. 2019, section 3), from a vocabulary file."""

  name = "wordpiece"
  FILE = "vocab.txt"

  def __init__(self, vocabulary: bytes, lowercase: bool = True):
    self.files, self.lowercase = {self.FILE: vocabulary}, lowercase
    try:
      self.pieces = vocabulary.decode("utf-8").splitlines()
    except UnicodeDecodeError:
      raise UserError("the WordPiece vocabulary is not UTF-8")
    known = {p: i for i, p in enumerate(self.pieces)}
    self.starts_word_V = np.array([not p.startswith("##") for p in self.pieces])
    for name in ("pad", "unk", "cls", "sep", "mask"):
      setattr(self, name, known.get(f"[{name.upper()}]", -1))
    if self.unk == -1:
      raise UserError(
        "the WordPiece vocabulary has no [UNK]: one piece a line, as BERT's vocab.txt"
      )
    self.eos = self.sep
    self._fast = tokenizers.BertWordPieceTokenizer(known, lowercase=lowercase)


class HuggingFaceTokenizer(FastTokenizer):
  """A tokenizer.json of the `tokenizers` package, whatever is in it. special: as its checkpoint says."""

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
    self.files, self.special = {self.FILE: definition}, dict(special)
    try:
      self._fast = tokenizers.Tokenizer.from_buffer(definition)
    except Exception as error:  # the package raises nothing narrower
      raise UserError(f"tokenizer.json cannot be read: {first_line(error)}")
    self._fast.no_truncation()  # files of published checkpoints may carry both
    self._fast.no_padding()
    known = self._fast.get_vocab(with_added_tokens=True)
    self.pieces = [""] * (max(known.values()) + 1)
    for piece, i in known.items():
      self.pieces[i] = piece
    for name, spellings in self.SPELLINGS.items():
      spellings = (special[name],) if name in special else spellings
      setattr(self, name, next((known[s] for s in spellings if s in known), -1))
    if any(p.startswith("##") for p in self.pieces):
      self.starts_word_V = np.array([not p.startswith("##") for p in self.pieces])
    else:
      self.starts_word_V = np.array([p.startswith(("Ġ", "▁")) for p in self.pieces])


class ByteTokenizer(Tokenizer):
  """UTF-8 bytes, and the special ids after them. A word starts with its space."""

  name = "bytes"

  def __init__(self, extra: int = 0):
    self.files, self.extra = {}, extra
    self.pieces = (
      [f"<{b:02X}>" for b in range(256)]
      + [f"[{s.upper()}]" for s in SPECIAL]
      + _sentinel_pieces(extra)
    )
    self.pad, self.unk, self.cls, self.sep, self.mask, self.eos = range(256, 262)
    self.starts_word_V = np.arange(len(self.pieces)) == ord(" ")

  def encode(self, texts):
    return [list(text.encode("utf-8")) for text in texts]

  def encode_spans(self, texts):
    out = []
    for text in texts:
      owner = np.repeat(np.arange(len(text)), [len(c.encode("utf-8")) for c in text])
      out.append((list(text.encode("utf-8")), np.stack([owner, owner + 1], 1)))
    return out

  def decode(self, ids):
    return bytes(int(i) for i in ids if i < 256).decode("utf-8", errors="replace")


def _spans(offsets) -> np.ndarray:
  return np.array(offsets, np.int64).reshape(-1, 2)


def _sentinel_pieces(count: int) -> list[str]:
  return [f"<extra_id_{n}>" for n in reversed(range(count))]


def train_sentencepiece(texts: Iterable[str], vocab_size: int, lowercase: bool) -> bytes:
  """A unigram model of at most vocab_size pieces, [PAD] [UNK] </s> [CLS] [SEP] [MASK] first.

  A corpus too small for so many pieces gets fewer. A cased one is for models that write: line breaks are pieces, and
  what has no piece is spelled in bytes, 256 more.
  """
  model = io.BytesIO()
  lines = (line for text in texts for line in text.splitlines())
  try:
    sentencepiece.SentencePieceTrainer.Train(
      sentence_iterator=lines,
      model_writer=model,
      vocab_size=vocab_size,
      hard_vocab_limit=False,
      model_type="unigram",
      max_sentence_length=16384,
      input_sentence_size=1_000_000,
      shuffle_input_sentence=False,
      normalization_rule_name="nmt_nfkc_cf" if lowercase else "nmt_nfkc",
      pad_id=0,
      unk_id=1,
      eos_id=2,
      bos_id=-1,
      pad_piece="[PAD]",
      unk_piece="[UNK]",
      control_symbols=["[CLS]", "[SEP]", "[MASK]"],
      minloglevel=2,
      byte_fallback=not lowercase,
      user_defined_symbols=[] if lowercase else ["\n"],
    )
  except (RuntimeError, OSError) as error:
    raise UserError(
      f"cannot train a SentencePiece model of {vocab_size} pieces on this text: "
      f"{str(error).strip().splitlines()[-1]}"
    )
  return model.getvalue()


def _read(path: str) -> bytes:
  try:
    return pathlib.Path(path).read_bytes()
  except OSError as error:
    raise UserError(f"config.tokenizer.path={path}: {error.strerror}")


def load(folder: pathlib.PurePath) -> Tokenizer:
  """What `save` wrote."""
  meta = json.loads((folder / META).read_text())
  kinds = {k.name: k for k in (SentencePieceTokenizer, WordPieceTokenizer, HuggingFaceTokenizer)}
  if meta["name"] == "bytes":
    return ByteTokenizer(meta.get("extra", 0))
  kind = kinds[meta["name"]]
  more = (
    {"special": meta["special"]}
    if kind is HuggingFaceTokenizer
    else {"extra": meta.get("extra", 0)}
    if kind is SentencePieceTokenizer
    else {}
  )
  made = kind((folder / kind.FILE).read_bytes(), meta["lowercase"], **more)
  made.template = meta.get("template", "")
  return made


def make(config: TokenizerConfig, sources, cache_folder: pathlib.Path) -> Tokenizer:
  """The tokenizer of a config: loaded from `path`, or SentencePiece trained on the sources (once).

  Raises UserError on a missing or unreadable file and where a kind cannot be trained.
  """
  if config.name == "bytes":
    return ByteTokenizer(config.sentinels)
  for kind in (WordPieceTokenizer, HuggingFaceTokenizer):
    if config.name == kind.name:
      if not config.path:
        raise UserError(
          f"config.tokenizer.name={kind.name!r} needs config.tokenizer.path, a {kind.FILE}"
        )
      return kind(_read(config.path), config.lowercase)
  if config.name != "sentencepiece":
    raise UserError(
      "config.tokenizer.name must be set (sentencepiece, wordpiece, huggingface, bytes) where no "
      "checkpoint is transferred"
    )
  if config.path:
    return SentencePieceTokenizer(_read(config.path), config.lowercase, config.sentinels)
  key = cache.digest(
    "unigram 2",
    str(config.vocab_size),
    str(config.lowercase),
    str(config.sentinels),
    *(s.digest() for s in sources),
  )

  def train(folder):
    print(f"training a SentencePiece model of {config.vocab_size} pieces ...", flush=True)
    texts = (record["text"] for source in sources for record in source.records())
    model = train_sentencepiece(texts, config.vocab_size, config.lowercase)
    SentencePieceTokenizer(model, config.lowercase, config.sentinels).save(folder)

  return load(cache.made_once(cache_folder / "tokenizers" / key[:32], train))
