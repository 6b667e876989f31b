"""The tokenizer of a config: read from its file, or trained on the sources."""

import io
import itertools
import pathlib
import re
from typing import Iterable, Iterator, Sequence

import sentencepiece

from llm import cache, reading
from llm.config import TokenizerConfig
from llm.core import UserError
from llm.data.sources import Source
from llm.data.tokenizer import (
  ByteTokenizer,
  HuggingFaceTokenizer,
  SentencePieceTokenizer,
  Tokenizer,
  WordPieceTokenizer,
  load,
)

MOST_LINES = 1_000_000  # that a tokenizer is trained on, as many of each source
MOST_BYTES = 16384  # of a line: SentencePiece leaves out what is longer


def make(
  config: TokenizerConfig, sources: Sequence[Source], cache_folder: pathlib.Path
) -> Tokenizer:
  """The tokenizer of a config: loaded from `path`, or a SentencePiece model trained on the sources.

  A trained model is kept in the cache. Raises UserError where a file cannot be read, and where a
  tokenizer without a path cannot be trained.
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
  return _trained(config, sources, cache_folder)


def _trained(
  config: TokenizerConfig, sources: Sequence[Source], cache_folder: pathlib.Path
) -> Tokenizer:
  """A SentencePiece tokenizer trained on the sources, unless the cache has it."""
  key = cache.digest(
    "unigram 3",
    str(config.vocab_size),
    str(config.lowercase),
    str(config.sentinels),
    *(s.digest() for s in sources),
  )

  def train(folder: pathlib.Path) -> None:
    print(f"training a SentencePiece model of {config.vocab_size} pieces ...", flush=True)
    most = MOST_LINES // len(sources)
    lines = (line for source in sources for line in itertools.islice(_lines_of(source), most))
    model = train_sentencepiece(lines, config.vocab_size, config.lowercase)
    SentencePieceTokenizer(model, config.lowercase, config.sentinels).save(folder)

  return load(cache.kept(cache_folder / "tokenizers" / key[:32], train))


def _read(path: str) -> bytes:
  """The file of config.tokenizer.path."""
  try:
    return reading.file_bytes(path)
  except UserError as error:
    raise UserError(f"config.tokenizer.path: {error}")


def _lines_of(source: Source) -> Iterator[str]:
  return (line for record in source.records() for line in record["text"].splitlines())


def _parts(line: str) -> Iterator[str]:
  """A line in parts of at most MOST_BYTES, cut at spaces."""
  if len(line.encode(errors="replace")) <= MOST_BYTES:
    yield line
    return
  start, most = 0, MOST_BYTES // 4  # characters, whose bytes are at most four
  while start < len(line):
    end = start + most
    if end < len(line):
      end = max(line.rfind(" ", start, end), start) or end
    yield line[start:end]
    start = end


def train_sentencepiece(texts: Iterable[str], vocab_size: int, lowercase: bool) -> bytes:
  """A serialized unigram model of at most vocab_size pieces (Kudo and Richardson 2018).

  It learns from the first MOST_LINES lines.

  The first pieces are [PAD] [UNK] </s> [CLS] [SEP] [MASK]. A small corpus may give fewer pieces. A
  cased model (lowercase=False) serves models that write: it has a piece for the line break and 256
  for bytes, which spell characters without a piece. Raises UserError where training fails.
  """
  model = io.BytesIO()
  lines = (part for text in texts for line in text.splitlines() for part in _parts(line))
  try:
    sentencepiece.SentencePieceTrainer.Train(
      sentence_iterator=lines,
      model_writer=model,
      vocab_size=vocab_size,
      hard_vocab_limit=False,
      model_type="unigram",
      max_sentence_length=MOST_BYTES,
      input_sentence_size=MOST_LINES,
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
    raise UserError(_why_not_trained(error, vocab_size))
  return model.getvalue()


def _why_not_trained(error: Exception, vocab_size: int) -> str:
  reason = str(error).strip().splitlines()[-1]
  if too_small := re.search(r"required_chars.* (\d+) vs (\d+)", reason):
    return (
      f"config.tokenizer.vocab_size={vocab_size} is too small: the characters of this text and "
      f"the special pieces alone are {too_small[2]}"
    )
  return f"cannot train a SentencePiece model of {vocab_size} pieces on this text: {reason}"
