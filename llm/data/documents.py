"""Tokenized documents, made once and kept on disk by the digest of what they were made from."""

import dataclasses
import pathlib

import numpy as np
import sentencex
import tqdm

from llm.core import UserError
from llm.data import cache
from llm.data.sources import Source
from llm.data.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class Documents:
  """All documents as one array of ids and two of offsets; memory-mapped.

  tokens_N: ids. sentences: start of every sentence in tokens_N, and the end. documents: start of
  every document in `sentences`, and the end. Document i is sentences[documents[i]:documents[i+1]].
  """

  tokens_N: np.ndarray
  sentences: np.ndarray
  documents: np.ndarray
  digest: str
  folder: pathlib.Path

  def __len__(self) -> int:
    return len(self.documents) - 1

  def __reduce__(self):
    """Another process maps the same files."""
    return _opened, (self.folder, self.tokens_N.dtype, self.digest)

  def bounds(self) -> np.ndarray:
    """Start of every document in tokens_N, and the end."""
    return self.sentences[self.documents]


def _sentences(text: str, how: str) -> list[str]:
  """Sentences of one text: `split` finds them, `lines` takes each line, `none` the whole text."""
  if how == "none":
    return [text]
  lines = [line for line in text.splitlines() if line.strip()]
  if how == "lines":
    return lines
  return [s.strip() for line in lines for s in sentencex.segment("en", line) if s.strip()]


def _write(source: Source, tokenizer: Tokenizer, how: str, folder: pathlib.Path):
  dtype = np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32
  lengths, counts, batch = [], [], []
  with (
    open(folder / "tokens.bin", "wb") as out,
    tqdm.tqdm(
      desc=f"tokenizing {source.spec}", unit=" tokens", unit_scale=True, disable=None
    ) as bar,
  ):

    def flush():
      ids = tokenizer.encode([s for document in batch for s in document])
      taken = 0
      for document in batch:
        kept = [i for i in ids[taken : taken + len(document)] if i]
        taken += len(document)
        if kept:
          counts.append(len(kept))
          lengths.extend(len(i) for i in kept)
      flat = np.array([i for sentence in ids for i in sentence], dtype)
      out.write(flat.tobytes())
      bar.update(len(flat))
      batch.clear()

    for record in source.records():
      batch.append(_sentences(record["text"], how))
      if len(batch) >= 256:
        flush()
    flush()
  if not lengths:
    raise UserError(f"{source.spec}: no text in it")
  np.save(folder / "sentences.npy", np.cumsum([0, *lengths], dtype=np.int64))
  np.save(folder / "documents.npy", np.cumsum([0, *counts], dtype=np.int64))


def load(source: Source, tokenizer: Tokenizer, how: str) -> Documents:
  """The documents of a source. how: split, lines, none (a document is one sentence)."""
  key = cache.digest("documents 1", source.digest(), tokenizer.digest(), how)
  folder = cache.made_once(
    source.cache / "tokens" / key[:32], lambda scratch: _write(source, tokenizer, how, scratch)
  )
  dtype = np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32
  return _opened(folder, dtype, key)


def _opened(folder: pathlib.Path, dtype, digest: str) -> Documents:
  return Documents(
    np.memmap(folder / "tokens.bin", dtype, "r"),
    np.load(folder / "sentences.npy"),
    np.load(folder / "documents.npy"),
    digest,
    folder,
  )
