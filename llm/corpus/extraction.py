"""Markup to main text, in a process of its own: a page that hangs or explodes costs only itself."""

import contextlib
import ctypes
import logging
import os
import signal
import sys
from typing import Any, Callable, Iterator

from datatrove.data import Document
from datatrove.pipeline.base import PipelineStep
from datatrove.pipeline.extractors.base import ExtractorSandbox

from llm import bounded
from llm.corpus.accounts import REASON, Samples
from llm.data import wikitext

IS_TEXT = "_is_text"  # in the metadata of what needs no extraction
START = 30.0  # seconds that the process may take to begin


def trafilatura_text(html: str) -> str | None:
  """Main text as FineWeb takes it (Penedo et al. 2024), each page alone.

  FineWeb also lets trafilatura drop paragraphs that earlier pages had. That depends on the order of
  pages, so it is off here.
  """
  import trafilatura

  logging.getLogger("trafilatura").setLevel(logging.CRITICAL)  # a line for every empty page
  return trafilatura.extract(html, favor_precision=True, include_comments=False)


def resiliparse_text(html: str) -> str:
  """Main text by resiliparse: some ten times as fast, with more of the page around it."""
  from resiliparse.extract import html2text

  return html2text.extract_plain_text(html, main_content=True, alt_texts=False)


EXTRACTORS: dict[str, Callable[[str], str | None]] = {
  "trafilatura": trafilatura_text,
  "resiliparse": resiliparse_text,
  "wikitext": wikitext.plain_text,
}


class Bounded:
  """A function of a text, for a process of its own: memory is bounded, an error is an answer."""

  def __init__(self, function: Callable[[str], str | None], megabytes: int):
    self.function = function
    self.megabytes = megabytes
    self.parent = os.getpid()
    self._is_bounded = False

  def __call__(self, text: str) -> tuple[str, str]:
    """(text, "") or ("", the reason why there is none)."""
    if not self._is_bounded and os.getpid() != self.parent:
      bounded.limit_memory(self.megabytes)
      _end_with_parent()
      self._is_bounded = True
    try:
      return self.function(text) or "", ""
    except MemoryError:
      return "", "out_of_memory"
    except RecursionError:
      return "", "nested_too_deep"
    except Exception as error:  # a parser may raise anything on hostile input: it is counted
      return "", f"failed ({type(error).__name__})"


def _end_with_parent() -> None:
  """Has Linux end this process when the one that forked it is killed."""
  if sys.platform == "linux":
    set_parent_death_signal = 1  # from sys/prctl.h
    ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)


class Extract(PipelineStep):
  """Replaces the markup of each document by its text. Documents without text are dropped.

  seconds, megabytes: the most that one document may take.
  """

  type = "EXTRACT"

  def __init__(
    self,
    name: str,
    function: Callable[[str], str | None],
    seconds: float,
    megabytes: int,
    dropped: Samples,
  ):
    self.name = name
    super().__init__()
    self.function = function
    self.seconds = seconds
    self.megabytes = megabytes
    self.dropped = dropped

  def run(self, data: Any, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
    within = Bounded(self.function, self.megabytes)
    with contextlib.suppress(Exception):
      self.function("")  # imports what it needs, before the process that does the work is forked
    with ExtractorSandbox(timeout=START, warmup_text="") as sandbox, self.dropped as dropped:
      for document in data:
        if document.metadata.pop(IS_TEXT, False):
          yield document
          continue
        with self.track_time():
          text, reason = self._in(sandbox, document.text, within)
        if reason or not text.strip():
          self._drop(document, reason or "no_text", dropped, rank)
          continue
        document.text = text
        yield document

  def _in(self, sandbox: ExtractorSandbox, text: str, within: Bounded) -> tuple[str, str]:
    """(text, "") or ("", reason)."""
    try:
      sandbox.timeout = START
      sandbox._ensure_process(within)
      # Held open here, it would hide that the other side is gone.
      sandbox.child_conn.close()  # pyright: ignore[reportOptionalMemberAccess]
      sandbox.timeout = self.seconds
      return sandbox.process_document(text, within)
    except TimeoutError:
      return "", "took_too_long"
    except (EOFError, BrokenPipeError, ConnectionResetError):
      return "", "crashed"

  def _drop(self, document: Document, reason: str, dropped: Samples, rank: int) -> None:
    self.stat_update("dropped", f"dropped_{reason}")
    document.metadata[REASON] = reason
    dropped.write(document, rank)
