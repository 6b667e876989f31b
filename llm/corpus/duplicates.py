"""Duplicate documents, lines and near-duplicates, by datatrove. Each needs all documents at once.

So each ends a stage, in which every document gets signatures. Stages that find equal ones follow,
and the next stage over the documents begins with a filter.
"""

import dataclasses
from typing import Any, Iterator, NamedTuple

import numpy as np
from datatrove.data import Document
from datatrove.io import DataFolder
from datatrove.pipeline.base import PipelineStep
from datatrove.pipeline.dedup import exact_dedup, minhash, sentence_dedup
from datatrove.utils.text import TextNormConfig

from llm.config import key
from llm.corpus.accounts import Samples
from llm.corpus.words import ENGLISH

GROUP = "_near_group"  # in the metadata: the number of the group of near duplicates
MOST_LINES = 2**16 - 1  # of a document, that the signatures of datatrove can number


class Finding(NamedTuple):
  """A stage that compares signatures."""

  name: str
  block: PipelineStep
  tasks: int


class Barrier:
  """A step that needs all documents at once. folder: where its signatures lie."""

  def signatures(self, folder: DataFolder) -> PipelineStep:
    """The block that ends the stage before."""
    raise NotImplementedError

  def findings(self, folder: DataFolder) -> list[Finding]:
    """The stages between."""
    raise NotImplementedError

  def blocks(self, name: str, folder: DataFolder, samples: DataFolder) -> list[PipelineStep]:
    """The blocks that begin the stage after."""
    raise NotImplementedError


def text_of(document: Document) -> str:
  return document.text


@dataclasses.dataclass(frozen=True)
class ExactDuplicates(Barrier):
  """Keeps one of the documents of equal text."""

  def _config(self) -> exact_dedup.ExactDedupConfig:
    return exact_dedup.ExactDedupConfig(content_getter=text_of, only_dedup_in_index=False)

  def signatures(self, folder: DataFolder) -> PipelineStep:
    return exact_dedup.ExactDedupSignature(_inside(folder, "signatures"), self._config())

  def findings(self, folder: DataFolder) -> list[Finding]:
    block = exact_dedup.ExactFindDedups(
      _inside(folder, "signatures"), _inside(folder, "found"), self._config()
    )
    return [Finding("find", block, 1)]

  def blocks(self, name: str, folder: DataFolder, samples: DataFolder) -> list[PipelineStep]:
    dropped: Any = Samples(samples, name)
    return [exact_dedup.ExactDedupFilter(_inside(folder, "found"), self._config(), dropped)]


# Lines that differ in case, punctuation, accents or numbers are not equal.
AS_THEY_ARE = TextNormConfig(
  lowercase=False,
  remove_punctuation=False,
  norm_unicode_diacritics=False,
  norm_numbers=False,
)


@dataclasses.dataclass(frozen=True)
class LineDuplicates(Barrier):
  """Keeps one of equal lines, in whichever documents they stand."""

  # A document with fewer words after it is dropped.
  min_doc_words: int = key(50, at_least=0)
  min_num_sentences: int = key(3, at_least=0)

  def _config(self) -> sentence_dedup.SentDedupConfig:
    return sentence_dedup.SentDedupConfig(
      n_sentences=1,
      split_sentences=False,
      norm_config=AS_THEY_ARE,
      only_dedup_in_index=False,
      min_doc_words=self.min_doc_words,
      min_num_sentences=self.min_num_sentences,
    )

  def signatures(self, folder: DataFolder) -> PipelineStep:
    return _LineSignatures(_inside(folder, "signatures"), config=self._config())

  def findings(self, folder: DataFolder) -> list[Finding]:
    block = sentence_dedup.SentenceFindDedups(
      _inside(folder, "signatures"), _inside(folder, "found"), config=self._config()
    )
    return [Finding("find", block, 1)]

  def blocks(self, name: str, folder: DataFolder, samples: DataFolder) -> list[PipelineStep]:
    dropped: Any = Samples(samples, name)
    found = _inside(folder, "found")
    return [sentence_dedup.SentenceDedupFilter(found, self._config(), dropped)]


class _LineSignatures(sentence_dedup.SentenceDedupSignature):
  """Lines past the last that can be numbered have no signature: they stay."""

  def get_hashes(self, doc: Document, doc_idx: int) -> list[Any]:
    return [h for h in super().get_hashes(doc, doc_idx) if h and h[2] <= MOST_LINES]


@dataclasses.dataclass(frozen=True)
class NearDuplicates(Barrier):
  """Keeps one of each group of documents that share most of their n-grams (MinHash, Broder 1997).

  As FineWeb does: two documents of which a share s of the n-grams are common are found with
  probability 1 - (1 - s^8)^14: 0.56 at s = 0.7, 0.92 at 0.8, 0.9996 at 0.9.
  """

  n_grams: int = key(5, above=0)
  buckets: int = key(14, above=0)
  hashes_per_bucket: int = key(8, above=0)

  def _config(self) -> minhash.MinhashConfig:
    return minhash.MinhashConfig(self.n_grams, self.buckets, self.hashes_per_bucket)

  def signatures(self, folder: DataFolder) -> PipelineStep:
    return minhash.MinhashDedupSignature(
      _inside(folder, "signatures"), self._config(), language=ENGLISH
    )

  def findings(self, folder: DataFolder) -> list[Finding]:
    config = self._config()
    pairs = minhash.MinhashDedupBuckets(
      _inside(folder, "signatures"), _inside(folder, "pairs"), config=config
    )
    groups = minhash.MinhashDedupCluster(
      _inside(folder, "pairs"),
      _inside(folder, "groups"),
      config=config,
      save_cluster_id=True,
    )
    return [Finding("pairs", pairs, self.buckets), Finding("groups", groups, 1)]

  def blocks(self, name: str, folder: DataFolder, samples: DataFolder) -> list[PipelineStep]:
    originals = Samples(samples, f"{name}-originals")
    return [GroupFilter(_inside(folder, "groups"), Samples(samples, name), originals)]


class GroupFilter(PipelineStep):
  """Keeps one document of each group, the one that MinhashDedupCluster chose.

  originals: keeps some of those to look at, beside what was dropped for them.
  """

  type = "FILTER"
  name = "near duplicates"

  def __init__(self, groups: DataFolder, dropped: Samples, originals: Samples):
    super().__init__()
    self.groups = groups
    self.dropped = dropped
    self.originals = originals

  def run(self, data: Any, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
    groups: Any = self._numbers(f"{rank:06d}.clusters").reshape(-1, 2).tolist()
    group_of: dict[int, int] = dict(groups)
    removed = set(self._numbers(f"{rank:06d}.remove").tolist())
    with self.dropped as dropped, self.originals as originals:
      for number, document in enumerate(data):
        document.metadata[GROUP] = group_of.get(number, -1)
        if number in removed:
          self.stat_update("dropped", "dropped_near_duplicate")
          dropped.write(document, rank)
          continue
        if number in group_of:
          originals.write(document, rank)
        yield document

  def _numbers(self, name: str) -> np.ndarray:
    """The uint32 numbers of a file of datatrove; none where the task has no such file."""
    if not self.groups.isfile(name):
      return np.zeros(0, np.uint32)
    return np.frombuffer(self.groups.cat_file(name), "<u4")


def _inside(folder: DataFolder, name: str) -> DataFolder:
  return DataFolder(f"{folder.path}/{name}", fs=folder.fs)
