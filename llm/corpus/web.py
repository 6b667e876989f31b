"""Files of Common Crawl: WARC (pages) and WET (their text) -> documents."""

from typing import Any

from datatrove.data import Document

from llm.corpus.inputs import Piece
from llm.corpus.readers import Items, Lost

ENDINGS = (".warc", ".wet", ".warc.wet")
LARGEST = 10 * 2**20  # bytes of a page
HTML = ("text/html", "application/xhtml+xml")


def pages(piece: Piece) -> Items:
  """The HTML of each response of a WARC file, or each text of a WET file."""
  from fastwarc.warc import ArchiveIterator, WarcRecordType

  kinds = WarcRecordType.response | WarcRecordType.conversion
  with piece.open() as file:
    for number, record in enumerate(ArchiveIterator(file, record_types=kinds, parse_http=True)):
      url = record.headers.get("WARC-Target-URI") or ""
      id = record.record_id or f"{piece.name}:{number}"
      metadata = {"url": url, "date": record.headers.get("WARC-Date", "")}
      content = record.reader.read(LARGEST + 1)
      if len(content) > LARGEST:
        yield Lost("too_large", id, url)
      elif record.record_type == WarcRecordType.conversion:
        text = content.decode("utf-8", "replace")
        yield Document(text, id, metadata={**metadata, "is_text": True})
      else:
        yield _page(content, record, id, metadata)


def _page(content: bytes, record: Any, id: str, metadata: dict) -> Document | Lost:
  """The HTML of a response, decoded as its bytes say; lost where it is something else."""
  from resiliparse.parse import encoding

  status = record.http_headers.status_code if record.http_headers else None
  if status is not None and status >= 300:
    return Lost("http_status", id, f"{status} {metadata['url']}")
  kind = (record.http_content_type or "").lower()
  if kind and kind not in HTML or b"\0" in content[:1024]:
    return Lost("no_html", id, f"{kind or 'binary'} {metadata['url']}")
  if b"<" not in content:
    return Lost("no_html", id, metadata["url"])
  guess = encoding.detect_encoding(content, from_html_meta=True) or "utf-8"
  text = encoding.bytes_to_str(content, guess, errors="replace")
  return Document(text, id, metadata={**metadata, "encoding": guess})
