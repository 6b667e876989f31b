"""Files of Common Crawl: WARC (pages) and WET (their text) -> documents."""

import contextlib
from typing import Any

from datatrove.data import Document

from llm.corpus.extraction import IS_TEXT
from llm.corpus.inputs import Piece, decompressed
from llm.corpus.readers import Items, Lost

ENDINGS = (".warc", ".wet", ".warc.wet")
LARGEST = 10 * 2**20  # bytes of a page
HEADERS = 2**16  # bytes before it
HTML = ("text/html", "application/xhtml+xml")


def pages(piece: Piece) -> Items:
  """The HTML of each response of a WARC file, or each text of a WET file.

  Raises EOFError at the end of a file that is cut off, and OSError where it holds no record.
  """
  from fastwarc.warc import ArchiveIterator, WarcRecordType

  wanted = (WarcRecordType.response, WarcRecordType.conversion)
  count = 0
  is_short = False
  with piece.open() as stored:
    file = decompressed(stored, piece.path) if piece.path.endswith(".bz2") else stored
    # Lenient: after a record with a wrong length, reading goes on at the next header.
    for count, record in enumerate(ArchiveIterator(file, parse_http=False, quirks_mode=True), 1):
      id = record.record_id or f"{piece.name}:{count}"
      content = record.reader.read(LARGEST + HEADERS)
      is_short = len(content) < min(record.content_length, LARGEST)
      if record.record_type not in wanted:
        continue
      is_short = is_short or not _url(record)
      yield Lost("wrong_length", id) if is_short else _document(content, record, id)
  if is_short:
    raise EOFError("the file is cut off")
  if not count:
    raise OSError("there is no WARC record in it")


def _url(record: Any) -> str:
  return record.headers.get("WARC-Target-URI") or ""


def _document(content: bytes, record: Any, id: str) -> Document | Lost:
  from fastwarc.warc import WarcRecordType

  metadata = {"url": _url(record), "date": record.headers.get("WARC-Date", "")}
  if record.record_type != WarcRecordType.conversion:
    headers, body = _response(content) if record.is_http else (None, content)
    return _page(body, headers, id, metadata)
  if len(content) > LARGEST:
    return Lost("too_large", id, metadata["url"])
  text = content.decode("utf-8", "replace")
  return Document(text, id, metadata={**metadata, IS_TEXT: True})


def _response(content: bytes) -> tuple[Any, bytes]:
  """The headers of a response, and its body without the encodings that they name.

  Some archives keep the headers of a body that they store decoded: it is taken as it is.
  """
  from fastwarc.warc import WarcRecord

  for encodings in ("all", "none"):
    response: Any = WarcRecord()  # one of its own: an error in it would end the reading of the file
    response.is_http = True
    response.set_bytes_content(content)
    with contextlib.suppress(OSError):
      response.parse_http(auto_decode=encodings, quirks_mode=True)
      return response, response.reader.read(LARGEST + 1)
  return None, b""


def _page(content: bytes, response: Any, id: str, metadata: dict) -> Document | Lost:
  """The HTML of a response, decoded as its bytes say; lost where it is something else."""
  from resiliparse.parse import encoding

  url = metadata["url"]
  if len(content) > LARGEST:
    return Lost("too_large", id, url)
  status = response.http_headers.status_code if response and response.http_headers else None
  if status is not None and status >= 300:
    return Lost("http_status", id, f"{status} {url}")
  kind = (response.http_content_type or "").lower() if response else ""
  if kind and kind not in HTML or b"\0" in content[:1024]:
    return Lost("no_html", id, f"{kind or 'binary'} {url}")
  if b"<" not in content:
    return Lost("no_html", id, url)
  guess = encoding.detect_encoding(content, from_html_meta=True) or "utf-8"
  text = encoding.bytes_to_str(content, guess, errors="replace")
  return Document(text, id, metadata={**metadata, "encoding": guess})
