"""Writes a tokenizer as AutoTokenizer of `transformers` reads it."""

import json
import pathlib
from typing import Any, Mapping

import tokenizers
from sentencepiece import sentencepiece_model_pb2

from llm.core import UserError
from llm.data import tokenizer as tokenizer_lib

SENTENCEPIECE_PROTOS: Any = sentencepiece_model_pb2  # protobuf adds its classes at import


def write(
  tokenizer: tokenizer_lib.Tokenizer,
  folder: pathlib.Path,
  max_length: int,
  *,
  as_definition: bool = False,
  **entries: str,
):
  """Writes the tokenizer's files as AutoTokenizer reads them.

  as_definition: writes a WordPiece vocabulary as tokenizer.json. entries: additional keys of
  tokenizer_config.json.
  """
  tokenizer_class, files = _tokenizer_files(tokenizer, as_definition)
  for name, data in files.items():
    (folder / name).write_bytes(data)
  special: dict[str, Any] = {
    f"{name}_token": tokenizer.pieces[getattr(tokenizer, name)]
    for name in ("pad", "unk", "cls", "sep", "mask", "eos")
    if getattr(tokenizer, name) >= 0
  }
  if tokenizer.extra:
    special["extra_ids"] = tokenizer.extra
  settings = {
    "tokenizer_class": tokenizer_class,
    "do_lower_case": tokenizer.lowercase,
    "model_max_length": max_length,
    **special,
    **entries,
  }
  (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2))


def _tokenizer_files(
  tokenizer: tokenizer_lib.Tokenizer, as_definition: bool
) -> tuple[str, Mapping[str, bytes]]:
  """The class of transformers that reads a tokenizer, and its files by name."""
  if isinstance(tokenizer, tokenizer_lib.SentencePieceTokenizer):
    # T5Tokenizer supports no special pieces but those of T5, whose first piece is <pad>.
    if tokenizer.pieces[0] == "<pad>":
      return "T5Tokenizer", tokenizer.files
    return "PreTrainedTokenizerFast", {"tokenizer.json": _unigram_definition(tokenizer)}
  if isinstance(tokenizer, tokenizer_lib.WordPieceTokenizer):
    if as_definition:
      return "PreTrainedTokenizerFast", {"tokenizer.json": tokenizer.definition()}
    return "BertTokenizer", tokenizer.files
  if isinstance(tokenizer, tokenizer_lib.ByteTokenizer):
    return "PreTrainedTokenizerFast", {"tokenizer.json": tokenizer.definition()}
  return "PreTrainedTokenizerFast", tokenizer.files


def _unigram_definition(tokenizer: tokenizer_lib.SentencePieceTokenizer) -> bytes:
  """tokenizer.json of a SentencePiece unigram model: the same pieces, scores and normalisation.

  Raises UserError where the model is not a unigram model.
  """
  proto = SENTENCEPIECE_PROTOS.ModelProto.FromString(tokenizer.files[tokenizer.FILE])
  if proto.trainer_spec.model_type != proto.trainer_spec.UNIGRAM:
    raise UserError("only unigram models of SentencePiece can be written as tokenizer.json")
  pieces = [(p.piece, p.score) for p in proto.pieces]
  byte_fallback = proto.trainer_spec.byte_fallback
  fast = tokenizers.Tokenizer(
    tokenizers.models.Unigram(pieces, unk_id=tokenizer.unk, byte_fallback=byte_fallback)
  )
  fast.normalizer = _unigram_normalizer(proto)
  fast.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace(prepend_scheme="always", split=False)
  fast.decoder = _unigram_decoder(byte_fallback)
  fast.add_special_tokens([tokenizer.pieces[i] for i in tokenizer.special_ids])
  return fast.to_str().encode()


def _unigram_normalizer(proto: Any) -> Any:
  """The normalisation of a SentencePiece model.

  Where the line break is a piece, a private-use character carries it through the normalisation.
  No text has that character.
  """
  normalizers = tokenizers.normalizers
  line_break_is_piece = any(p.piece == "\n" for p in proto.pieces)
  steps = []
  if line_break_is_piece:
    steps.append(normalizers.Replace("\n", "\ue001"))
  if charsmap := proto.normalizer_spec.precompiled_charsmap:
    steps.append(normalizers.Precompiled(charsmap))
  steps.append(normalizers.Strip())
  steps.append(normalizers.Replace(tokenizers.Regex(" {2,}"), " "))
  if line_break_is_piece:
    steps.append(normalizers.Replace("\ue001", "\n"))
  return normalizers.Sequence(steps)


def _unigram_decoder(byte_fallback: bool) -> Any:
  decoders = tokenizers.decoders
  if not byte_fallback:
    return decoders.Metaspace(prepend_scheme="always")
  return decoders.Sequence(
    [
      decoders.Replace("▁", " "),
      decoders.ByteFallback(),
      decoders.Fuse(),
      decoders.Strip(" ", 1, 0),
    ]
  )
