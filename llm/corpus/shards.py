"""Clean documents to token shards, in the layout of datatrove: one shard a task."""

import hashlib
import itertools
import json
from typing import Any, Iterator, NamedTuple

import numpy as np
from datatrove.data import Document
from datatrove.io import DataFolder
from datatrove.pipeline.base import PipelineStep
from etils import epath

from llm.corpus.interim import read_documents
from llm.data import documents, shards, tokenizer_training
from llm.data import tokenizer as tokenizer_lib

AT_ONCE = 256  # documents tokenized in one call


class _Written(NamedTuple):
  """A shard that was written: where its sentences and documents end, in tokens (uint64)."""

  sentence_ends: np.ndarray
  document_ends: np.ndarray
  sha256: str  # of the tokens

  @property
  def tokens(self) -> int:
    return int(self.sentence_ends[-1]) if len(self.sentence_ends) else 0


class Tokenize(PipelineStep):
  """Writes the tokens of the documents of a task as one shard.

  sentences: "split" and "lines" keep where sentences begin, as `data.documents.load` takes them;
  "none" does not.
  """

  type = "TOKENIZE"
  name = "tokenize"

  def __init__(self, output: DataFolder, sentences: str):
    super().__init__()
    self.output = output
    self.sentences = sentences

  def run(self, data: Any, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
    if not self.output.exists(shards.TOKENIZER):
      return  # no document was left to train one on
    tokenizer = tokenizer_lib.load(_tokenizer_folder(self.output))
    name = f"{rank:05d}.ds"
    with self.output.open(name, "wb") as file:
      written = self._write_tokens(data, tokenizer, file)
    self._write_ends(name, written)
    self._write_facts(name, written, tokenizer, world_size)
    yield from ()

  def _write_tokens(self, data: Any, tokenizer: tokenizer_lib.Tokenizer, file: Any) -> _Written:
    """Writes the tokens of all documents, and counts them."""
    dtype = shards.id_type(tokenizer)
    sha = hashlib.sha256()
    sentence_lengths: list[int] = []
    sentence_counts: list[int] = []  # one a document
    for group in _groups(data):
      with self.track_time():
        split = [documents.sentences(document.text, self.sentences) for document in group]
        before = len(sentence_counts)
        for ids in documents.encode(split, tokenizer):
          sentence_lengths += [len(sentence) for sentence in ids]
          sentence_counts.append(len(ids))
          tokens = np.array([token for sentence in ids for token in sentence], dtype).tobytes()
          sha.update(tokens)
          file.write(tokens)
          self.stat_update("tokens", value=len(tokens) // dtype.itemsize)
        if empty := before + len(group) - len(sentence_counts):
          self.stat_update("dropped", "dropped_no_tokens", value=empty)
    sentence_ends = np.cumsum(sentence_lengths, dtype="<u8")
    last_sentences = np.cumsum(sentence_counts, dtype=np.int64) - 1
    return _Written(sentence_ends, sentence_ends[last_sentences], sha.hexdigest())

  def _write_ends(self, name: str, written: _Written):
    """Writes where documents and sentences end."""
    with self.output.open(f"{name}.index", "wb") as file:
      file.write(written.document_ends.tobytes())
    if self.sentences != "none":
      with self.output.open(f"{name}.sentences", "wb") as file:
        file.write(written.sentence_ends.tobytes())

  def _write_facts(
    self, name: str, written: _Written, tokenizer: tokenizer_lib.Tokenizer, count: int
  ):
    """Writes what is known of the shard. The last file says that the shard is whole."""
    token_bytes = shards.id_type(tokenizer).itemsize
    ends = written.document_ends.tobytes() + written.sentence_ends.tobytes()
    with self.output.open(f"{name}.metadata", "wt") as file:
      file.write(f"{tokenizer.name}|{token_bytes}\n{written.tokens}\n{written.tokens:,} tokens")
    facts = {
      "sha256": written.sha256,
      "ends_sha256": hashlib.sha256(ends).hexdigest(),
      "documents": len(written.document_ends),
      "tokens": written.tokens,
      "token_bytes": token_bytes,
      "sentences": self.sentences,
      "tokenizer": tokenizer.digest(),
      "of": count,
    }
    with self.output.open(f"{name}.json", "wt") as file:
      json.dump(facts, file)


def _groups(data: Any) -> Iterator[list[Document]]:
  group = []
  for document in data:
    group.append(document)
    if len(group) == AT_ONCE:
      yield group
      group = []
  if group:
    yield group


def _tokenizer_folder(output: DataFolder) -> epath.Path:
  """The folder of the tokenizer in `output`, whose path lacks the protocol of its bucket."""
  whole = output.path if output.is_local() else output.fs.unstrip_protocol(output.path)
  return epath.Path(whole) / shards.TOKENIZER


class TrainTokenizer(PipelineStep):
  """Trains the tokenizer of the shards on the first characters of every task's documents.

  characters: in all.
  """

  type = "TOKENIZE"
  name = "train the tokenizer"

  def __init__(
    self,
    cleaned: DataFolder,
    tasks: int,
    output: DataFolder,
    vocab_size: int,
    lowercase: bool,
    sentinels: int,
    characters: int,
  ):
    super().__init__()
    self.cleaned = cleaned
    self.tasks = tasks
    self.output = output
    self.vocab_size = vocab_size
    self.lowercase = lowercase
    self.sentinels = sentinels
    self.characters = characters

  def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
    with self.track_time():
      sample = self._sample()
      first = next(sample, None)
      if first is None:
        return
      texts = itertools.chain([first], sample)
      model = tokenizer_training.train_sentencepiece(texts, self.vocab_size, self.lowercase)
      tokenizer = tokenizer_lib.SentencePieceTokenizer(model, self.lowercase, self.sentinels)
      tokenizer.save(_tokenizer_folder(self.output))
    yield from ()

  def _sample(self) -> Iterator[str]:
    share = -(-self.characters // self.tasks)
    for task in range(self.tasks):
      left = share
      for document in read_documents(self.cleaned, task):
        yield document.text
        left -= len(document.text)
        if left <= 0:
          break
