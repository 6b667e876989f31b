"""Token shards that `llm.prepare` wrote, in the layout of datatrove, as a source of documents.

A folder holds `tokenizer/` and, for every shard NNNNN.ds (uint16 or uint32):

  NNNNN.ds.index      where each document ends, in tokens (uint64)
  NNNNN.ds.sentences  where each sentence ends, where asked for (uint64)
  NNNNN.ds.metadata   tokenizer, bytes a token and number of tokens, as datatrove writes them
  NNNNN.ds.json       facts: counts, SHA-256 of tokens and ends, the tokenizer. Sizes are checked
"""

import bisect
import dataclasses
import functools
import pathlib
from typing import Annotated, Any, Iterator, Literal, Sequence

import msgspec
import numpy as np
from etils import epath

from llm import reading, storage
from llm.core import UserError
from llm.data import growing
from llm.data import tokenizer as tokenizer_lib
from llm.data.sources import Source

TOKENIZER = "tokenizer"


def id_type(tokenizer: tokenizer_lib.Tokenizer) -> np.dtype:
  """The smallest type that holds the ids of a tokenizer."""
  return np.dtype("<u2" if tokenizer.vocab_size <= 2**16 else "<u4")


@dataclasses.dataclass(frozen=True)
class Facts:
  """What is known of one shard. path: of its tokens."""

  path: str
  sha256: str
  ends_sha256: str
  documents: Annotated[int, msgspec.Meta(ge=0)]
  tokens: Annotated[int, msgspec.Meta(ge=0)]
  token_bytes: Literal[2, 4]
  sentences: str
  tokenizer: str
  of: int = 0  # how many shards there are; 0: an earlier version did not say


class Tokens:
  """The tokens of all shards, one after another, as an array that is read in slices.

  Local shards are memory-mapped. Of a bucket, a slice fetches its bytes alone.
  """

  def __init__(self, shards: tuple[Facts, ...]):
    self.shards = shards
    self.starts = np.cumsum([0, *(shard.tokens for shard in shards)]).tolist()
    self.dtype = np.dtype(f"<u{shards[0].token_bytes}")

  def __reduce__(self):
    return Tokens, (self.shards,)

  def __len__(self) -> int:
    return self.starts[-1]

  def __getitem__(self, place: Any) -> Any:
    if not isinstance(place, slice):
      return self[place : place + 1][0]
    start, stop, _ = place.indices(len(self))
    parts = []
    while start < stop:
      number = bisect.bisect_right(self.starts, start) - 1
      end = min(stop, self.starts[number + 1])
      first = self.starts[number]
      parts.append(self._read(number, start - first, end - first))
      start = end
    return parts[0] if len(parts) == 1 else np.concatenate([np.zeros(0, self.dtype), *parts])

  def _read(self, number: int, start: int, stop: int) -> np.ndarray:
    """Tokens start .. stop-1 of one shard."""
    path = self.shards[number].path
    if storage.is_bucket(path):
      size = self.dtype.itemsize
      data = self._bucket.cat_file(path, start=start * size, end=stop * size)
      return np.frombuffer(data, self.dtype)
    return self._mapped(number)[start:stop]

  @functools.cached_property
  def _bucket(self) -> Any:
    import fsspec

    return fsspec.core.url_to_fs(self.shards[0].path)[0]

  @functools.cached_property
  def _maps(self) -> dict[int, np.ndarray]:
    return {}

  def _mapped(self, number: int) -> np.ndarray:
    if number not in self._maps:
      self._maps[number] = np.memmap(self.shards[number].path, self.dtype, "r")
    return self._maps[number]


def facts(source: Source) -> tuple[Facts, ...]:
  """The shards of a source, in order, without the empty ones.

  Raises UserError where there is none, one is not whole, or they do not fit one another.
  """
  paths = sorted(storage.folder(source.name).glob("*.ds"), key=str)
  shards = [_facts_of(path, source) for path in paths]
  if not shards:
    raise UserError(f"{source.spec}: no shards (*.ds) in it: give the shards/ of llm.prepare")
  if shards[0].of and len(shards) != shards[0].of:
    raise UserError(
      f"{source.spec}: {len(shards)} of its {shards[0].of} shards are there: copy the others too, "
      "or make all again with another --output"
    )
  if len({(shard.tokenizer, shard.token_bytes) for shard in shards}) > 1:
    raise UserError(f"{source.spec}: its shards are of several tokenizers")
  with_tokens = tuple(shard for shard in shards if shard.tokens)
  if not with_tokens:
    raise UserError(f"{source.spec}: its shards hold no token")
  return with_tokens


def _facts_of(path: epath.Path, source: Source) -> Facts:
  """The facts of one shard. Raises UserError where it is not whole."""
  try:
    said = reading.read_json(epath.Path(f"{path}.json"), dict[str, Any])
    shard = reading.shaped({**said, "path": str(path)}, Facts, f"{path}.json")
  except UserError:
    raise UserError(f"{source.spec}: {path.name} is not whole: run llm.prepare again")
  expected = shard.tokens * shard.token_bytes
  if (size := path.stat().length) != expected:
    raise UserError(f"{source.spec}: {path.name} has {size:,} bytes, expected {expected:,}")
  return shard


def content(shards: Sequence[Facts]) -> list[str]:
  """Strings that change when the tokens change."""
  return [shard.sha256 + shard.ends_sha256 for shard in shards]


def tokenizer(source: Source) -> tokenizer_lib.Tokenizer:
  """The tokenizer that wrote the shards."""
  try:
    return tokenizer_lib.load(storage.folder(source.name) / TOKENIZER)
  except UserError as error:
    raise UserError(f"{source.spec}: {error}: run llm.prepare again")


def check_tokenizer(
  source: Source, shards: Sequence[Facts], of_run: tokenizer_lib.Tokenizer
) -> None:
  """Raises UserError where a run has another tokenizer than the shards of a source."""
  if of_run.digest() != shards[0].tokenizer:
    raise UserError(
      f"{source.spec}: its tokens are of another tokenizer than the run's; prepare the corpus with "
      "that of the checkpoint (--config.tokenizer.checkpoint=DIR)"
    )


def records(source: Source) -> Iterator[dict]:
  """The documents of the shards as text."""
  decode = tokenizer(source).decode
  for shard in facts(source):
    tokens = Tokens((shard,))
    start = 0
    for stop in _numbers(f"{shard.path}.index").tolist():
      yield {"text": decode(tokens[start:stop])}
      start = stop


def offsets(source: Source, shards: Sequence[Facts], how: str, scratch: pathlib.Path) -> None:
  """Writes sentences.npy and documents.npy of `documents.Documents` into the folder `scratch`.

  They are written shard by shard and mapped from disk, for they have 8 bytes a document and a
  sentence. how: as in `documents.load`.
  """
  if how != "none" and any(shard.sentences == "none" for shard in shards):
    raise UserError(
      f"{source.spec}: it does not say where sentences begin, which next-sentence prediction "
      "needs: run llm.prepare with --config.shards.sentences=split"
    )
  by_sentence = how != "none"
  with (
    growing.Growing(scratch / "sentences.npy") as sentences,
    growing.Growing(scratch / "documents.npy") as ends,
  ):
    sentences.add([0])
    ends.add([0])
    first_token = first_sentence = 0
    for shard in shards:
      index = _numbers(f"{shard.path}.index")
      starts = _numbers(f"{shard.path}.sentences") if by_sentence else index
      sentences.add(starts + first_token)
      ends.add(np.searchsorted(starts, index) + 1 + first_sentence)
      first_token += shard.tokens
      first_sentence += len(starts)


def _numbers(path: str) -> np.ndarray:
  """The uint64 numbers of a file."""
  return np.frombuffer(epath.Path(path).read_bytes(), "<u8").astype(np.int64)
