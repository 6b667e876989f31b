"""Held-out documents that share long runs of tokens with the training text."""

import json
import pathlib
from typing import Callable, Sequence

import numpy as np

from llm import cache, core
from llm.data.documents import Documents

# Tokens that are about 13 words, the runs of GPT-3's decontamination (Brown et al. 2020, C).
RUN = 20
RUN_OF_BYTES = 80
CHUNK = 2**20  # tokens that are hashed at a time
BITS = 24  # of the table that tells most runs apart, without a search
BASE = np.uint64(0x9E3779B97F4A7C15)  # odd, so that no token is lost in the products


def run_length(tokenizer: str) -> int:
  """Tokens of a run. tokenizer: its name."""
  return RUN_OF_BYTES if tokenizer == "bytes" else RUN


def hashes(tokens_N: np.ndarray, length: int) -> np.ndarray:
  """The hash of each run of `length` tokens: N - length + 1 numbers, uint64; none where N is less.

  h(run) = sum of token[i] * BASE ** (length - 1 - i), modulo 2**64. Runs are put together from
  blocks of 1, 2, 4, .. tokens, by the binary digits of `length`.
  """
  count = max(0, len(tokens_N) - length + 1)
  run_N = np.zeros(count, np.uint64)
  covered = 0
  block_N = np.asarray(tokens_N).astype(np.uint64) + np.uint64(1)
  width = 1
  power = BASE  # ** width
  with np.errstate(over="ignore"):
    while count:
      if length & width:
        run_N = run_N * power + block_N[covered : covered + count]
        covered += width
      if covered == length:
        break
      block_N = block_N[:-width] * power + block_N[width:]
      power = power * power
      width *= 2
  return run_N


def shared_runs(
  train: Sequence[Documents], held_out: Documents, length: int
) -> list[tuple[int, int]]:
  """(document, place) of the first shared run of every held-out document that has one.

  Documents of fewer than `length` tokens are not compared.
  """
  runs_N, document_N, place_N = _runs(held_out, length)
  if not len(runs_N):
    return []
  distinct_runs = np.unique(runs_N)
  seen = np.zeros(len(distinct_runs), bool)
  for documents in train:
    _mark_seen(documents, length, distinct_runs, seen)
  is_shared_N = seen[np.searchsorted(distinct_runs, runs_N)]
  documents, firsts = np.unique(document_N[is_shared_N], return_index=True)
  places = place_N[is_shared_N][firsts]
  return list(zip(documents.tolist(), places.tolist()))


def _runs(held_out: Documents, length: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """(hash, document, place in tokens_N) of each run of the held-out documents."""
  bounds = held_out.bounds()
  runs = [np.zeros(0, np.uint64)]
  documents = [np.zeros(0, np.int64)]
  places = [np.zeros(0, np.int64)]
  for document in range(len(held_out)):
    of_document = hashes(held_out.tokens_N[bounds[document] : bounds[document + 1]], length)
    runs.append(of_document)
    documents.append(np.full(len(of_document), document))
    places.append(bounds[document] + np.arange(len(of_document)))
  return np.concatenate(runs), np.concatenate(documents), np.concatenate(places)


def _mark_seen(documents: Documents, length: int, asked: np.ndarray, seen: np.ndarray) -> None:
  """Marks the asked hashes that occur in the documents. asked: sorted."""
  mask = np.uint64(2**BITS - 1)
  may_be_asked = np.zeros(2**BITS, bool)
  may_be_asked[asked & mask] = True
  for start in range(0, len(documents.tokens_N), CHUNK):
    runs = hashes(documents.tokens_N[start : start + CHUNK + length - 1], length)
    runs = runs[may_be_asked[runs & mask]]
    places = np.minimum(np.searchsorted(asked, runs), len(asked) - 1)
    seen[places[asked[places] == runs]] = True


def warn(
  train: Sequence[Documents],
  held_out: Documents,
  name: str,
  length: int,
  decode: Callable[[Sequence[int]], str],
  folder: pathlib.Path,
) -> None:
  """Counts the held-out documents with shared runs, where there are any.

  name: of the held-out source. length: tokens of a run. folder: the cache, which keeps what was
  found.
  """
  key = cache.digest(
    f"overlap {length}", held_out.digest, *(documents.digest for documents in train)
  )

  def write(scratch: pathlib.Path) -> None:
    (scratch / "shared.json").write_text(json.dumps(shared_runs(train, held_out, length)))

  path = cache.kept(folder / "overlaps" / key[:32], write)
  shared = json.loads((path / "shared.json").read_text())
  if not shared:
    return
  place = shared[0][1]
  words = decode(held_out.tokens_N[place : place + length].tolist())
  core.warn(
    f"{len(shared):,} of the {len(held_out):,} documents of {name} share runs of {length} tokens "
    f"with the training text, which makes its figures too good: {words!r}"
    f"{' ..' if len(shared) > 1 else ''}"
  )
