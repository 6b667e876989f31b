"""Wikitext to running text."""

import re
from typing import Any

import mwparserfromhell

DROPPED_TAGS = ("table", "ref", "gallery", "math")


def plain_text(wikitext: str) -> str:
  """Wikitext -> paragraphs of prose, one a line.

  What becomes of the markup: templates (infoboxes among them), tables, references, galleries,
  formulas, and links to files and categories are left out. A link is its text. So are headings, and
  lines of 60 characters or fewer, most list items among them: what stays ends as a sentence does.
  """
  code = mwparserfromhell.parse(wikitext)
  for node in code.filter_wikilinks(recursive=True):
    if re.match(r"\s*(file|image|category)\s*:", str(node.title), re.I):
      _remove(code, node)
  for node in code.filter_tags(matches=lambda n: n.tag in DROPPED_TAGS):
    _remove(code, node)
  lines = (re.sub(r"\s+", " ", line).strip() for line in code.strip_code().splitlines())
  # A paragraph of prose ends as a sentence does. Headings, list items and rests of markup do not.
  return "\n".join(line for line in lines if len(line) > 60 and line[-1] in ".!?\"')")


def is_redirect(wikitext: str) -> bool:
  """Whether a page only points to another."""
  return wikitext.lower().startswith("#redirect")


def _remove(code: mwparserfromhell.wikicode.Wikicode, node: Any) -> None:
  try:
    code.remove(node)
  except ValueError:
    pass  # it was removed together with a node around it
