"""Tokenized documents, kept in the cache by the digest of their text and tokenizer."""

import dataclasses
import pathlib
from typing import Iterator

import numpy as np
import sentencex
import tqdm

from llm import cache
from llm.core import UserError
from llm.data import growing, shards
from llm.data.sources import Source
from llm.data.tokenizer import Tokenizer

DOCUMENTS_AT_ONCE = 256  # tokenized in one call


@dataclasses.dataclass(frozen=True)
class Documents:
  """All documents of a source, as memory-mapped ids and two arrays of offsets.

  tokens_N: the ids. sentences: the start of every sentence in tokens_N, and the end. documents: the
  start of every document in `sentences`, and the end. The sentences of document i start at
  sentences[documents[i]:documents[i+1]].
  """

  tokens_N: np.ndarray | shards.Tokens
  sentences: np.ndarray
  documents: np.ndarray
  digest: str
  folder: pathlib.Path

  def __len__(self) -> int:
    return len(self.documents) - 1

  def __reduce__(self):
    """Pickles the folder alone: another process maps the same files."""
    tokens = self.tokens_N if isinstance(self.tokens_N, shards.Tokens) else None
    return _open, (self.folder, self.tokens_N.dtype, self.digest, tokens)

  def bounds(self) -> np.ndarray:
    """The start of every document in tokens_N, and the end."""
    if len(self.sentences) == len(self.documents):
      return self.sentences  # a document is a sentence: nothing is copied
    return self.sentences[self.documents]


def load(source: Source, tokenizer: Tokenizer, how: str) -> Documents:
  """The documents of a source, tokenized where the cache does not hold them.

  how: "split" splits lines into sentences, "lines" takes a line as a sentence, "none" takes a
  document as one sentence. Raises UserError where the source has no text.
  """
  if source.kind == "shards":
    return _of_shards(source, tokenizer, how)
  key = cache.digest("documents 1", source.digest(), tokenizer.digest(), how)
  folder = cache.kept(
    source.cache / "tokens" / key[:32], lambda scratch: _write(source, tokenizer, how, scratch)
  )
  return _open(folder, shards.id_type(tokenizer), key)


def _of_shards(source: Source, tokenizer: Tokenizer, how: str) -> Documents:
  """The documents of token shards: only offsets are made here."""
  facts = shards.facts(source)
  shards.check_tokenizer(source, facts, tokenizer)
  key = cache.digest("shards 2", *shards.content(facts), how)
  folder = cache.kept(
    source.cache / "tokens" / key[:32], lambda scratch: shards.offsets(source, facts, how, scratch)
  )
  tokens = shards.Tokens(facts)
  return _open(folder, tokens.dtype, key, tokens)


def _open(
  folder: pathlib.Path, dtype: np.dtype, digest: str, tokens: shards.Tokens | None = None
) -> Documents:
  """The documents of a folder of the cache. tokens: where they are not in the folder."""
  return Documents(
    np.memmap(folder / "tokens.bin", dtype, "r") if tokens is None else tokens,
    growing.mapped(folder / "sentences.npy"),
    growing.mapped(folder / "documents.npy"),
    digest,
    folder,
  )


def _write(source: Source, tokenizer: Tokenizer, how: str, folder: pathlib.Path) -> None:
  """Writes the ids and the offsets of a source into `folder`."""
  dtype = shards.id_type(tokenizer)
  sentence_lengths: list[int] = []
  sentence_counts: list[int] = []  # one a document
  progress = tqdm.tqdm(
    desc=f"tokenizing {source.spec}", unit=" tokens", unit_scale=True, disable=None
  )
  with open(folder / "tokens.bin", "wb") as file, progress:
    for documents in _groups_of_documents(source, how):
      for sentence_ids in encode(documents, tokenizer):
        lengths = [len(ids) for ids in sentence_ids]
        sentence_lengths.extend(lengths)
        sentence_counts.append(len(lengths))
        flat = np.array([token for ids in sentence_ids for token in ids], dtype)
        file.write(flat.tobytes())
        progress.update(len(flat))
  if not sentence_lengths:
    raise UserError(f"{source.spec}: no text in it")
  np.save(folder / "sentences.npy", np.cumsum([0, *sentence_lengths], dtype=np.int64))
  np.save(folder / "documents.npy", np.cumsum([0, *sentence_counts], dtype=np.int64))


def _groups_of_documents(source: Source, how: str) -> Iterator[list[list[str]]]:
  """The sentences of each document, in groups of DOCUMENTS_AT_ONCE documents."""
  group = []
  for record in source.records():
    group.append(sentences(record["text"], how))
    if len(group) == DOCUMENTS_AT_ONCE:
      yield group
      group = []
  yield group


def encode(documents: list[list[str]], tokenizer: Tokenizer) -> Iterator[list[list[int]]]:
  """The ids of each document's sentences. Sentences and documents without tokens are left out."""
  ids = iter(tokenizer.encode([sentence for document in documents for sentence in document]))
  for document in documents:
    encoded = [next(ids) for _ in document]
    if with_tokens := [sentence for sentence in encoded if sentence]:
      yield with_tokens


def sentences(text: str, how: str) -> list[str]:
  """The sentences of one text; `how` as in `load`."""
  if how == "none":
    return [text]
  lines = [line for line in text.splitlines() if line.strip()]
  if how == "lines":
    return lines
  split = []
  for line in lines:
    # The package is compiled and has no stubs.
    parts = sentencex.segment("en", line)  # pyright: ignore[reportAttributeAccessIssue]
    split.extend(part.strip() for part in parts if part.strip())
  return split
