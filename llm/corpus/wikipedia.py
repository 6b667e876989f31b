"""A Wikipedia dump (pages-articles, XML) -> the wikitext of its articles."""

import itertools
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
  buffer = b""
  searched = 0
  inside = False
  is_too_large = False
  is_past = False
  for chunk in itertools.chain(piece.chunks(), [None], piece.beyond()):
    if chunk is None:
      is_past = True
      continue
    if is_past and not inside:
      return
    buffer += chunk
    while match := PAGE.search(buffer, searched):
      if match[0] == b"<page>":
        buffer = buffer[match.start() :]
        searched = len(match[0])
        inside = True
        is_too_large = False
      else:
        if inside:
          yield None if is_too_large else buffer[: match.end()]
          if is_past:
            return
        buffer = buffer[match.end() :]
        searched = 0
        inside = False
    if inside and len(buffer) > LONGEST:
      is_too_large = True
    if not inside or is_too_large:
      buffer = buffer[-len(b"</page>") :]
    searched = max(0, len(buffer) - len(b"</page>"))
  if inside:
    raise EOFError("the last page is cut off")


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
