"""A Wikipedia dump (pages-articles, XML) -> the wikitext of its articles."""

import re
import xml.etree.ElementTree as ElementTree
from typing import Iterator

from datatrove.data import Document

from llm.corpus.inputs import Piece
from llm.corpus.readers import LONGEST, Items, Lost
from llm.data import wikitext

ENDINGS = (".xml",)
PAGE = re.compile(rb"<page>|</page>")


def articles(piece: Piece) -> Items:
  """The articles of a piece. Redirects and pages of other namespaces are lost, with that reason.

  Only <page> elements are parsed, each alone. So no entity of a document type can expand.
  """
  for number, page in enumerate(_pages(piece)):
    id = f"{piece.name}:{number}"
    yield _article(page, id) if page is not None else Lost("too_large", id)


def _pages(piece: Piece) -> Iterator[bytes | None]:
  """The <page> elements that begin in a piece; None for one that is larger than `LONGEST`.

  Raises EOFError where the last one is cut off.
  """
  cutter = _PageCutter()
  for chunk in piece.chunks():
    yield from cutter.pages(chunk)
  for chunk in piece.beyond():
    if not cutter.inside:
      return
    for page in cutter.pages(chunk):
      yield page
      return
  if cutter.inside:
    raise EOFError("the last page is cut off")


class _PageCutter:
  """Cuts the <page> elements out of a text that comes in chunks.

  inside: whether the last page that began has not ended.
  """

  def __init__(self) -> None:
    self.inside = False
    self._is_too_large = False  # the page that it is inside of
    self._buffer = b""
    self._searched = 0  # bytes of the buffer without a tag

  def pages(self, chunk: bytes) -> Iterator[bytes | None]:
    """The pages that end in the next chunk; None for one that is larger than `LONGEST`."""
    self._buffer += chunk
    while tag := PAGE.search(self._buffer, self._searched):
      if tag[0] == b"<page>":
        self._begin(tag.start())
        continue
      if self.inside:
        yield None if self._is_too_large else self._buffer[: tag.end()]
      self.inside = False
      self._buffer = self._buffer[tag.end() :]
      self._searched = 0
    if self.inside and len(self._buffer) > LONGEST:
      self._is_too_large = True
    longest_tag = len(b"</page>")  # its beginning may be all that the buffer holds
    if not self.inside or self._is_too_large:
      self._buffer = self._buffer[-longest_tag:]
    self._searched = max(0, len(self._buffer) - longest_tag)

  def _begin(self, start: int) -> None:
    """A page begins at `start` of the buffer."""
    self.inside = True
    self._is_too_large = False
    self._buffer = self._buffer[start:]
    self._searched = len(b"<page>")


def _article(page: bytes, id: str) -> Document | Lost:
  try:
    element = ElementTree.fromstring(page)
  except ElementTree.ParseError as error:
    return Lost("broken_page", id, f"{error}: {page[:500].decode('utf-8', 'replace')}")
  title = element.findtext("title") or ""
  id = f"wikipedia:{element.findtext('id') or id}"
  text = element.findtext("revision/text") or ""
  if element.findtext("ns") != "0":
    return Lost("namespace", id, title)
  if element.find("redirect") is not None or wikitext.is_redirect(text):
    return Lost("redirect", id, title)
  return Document(text, id, metadata={"title": title})
