"""Wikitext to running text."""

import re

import mwparserfromhell
from mwparserfromhell import nodes
from mwparserfromhell.wikicode import Wikicode

DROPPED_TAGS = ("table", "ref", "gallery", "math")
DROPPED_LINKS = re.compile(r"\s*(file|image|category)\s*:", re.I)
# The parts of links, tags, headings and arguments of which the text is shown.
SHOWN_PARTS = ("text", "contents", "title", "default")


def plain_text(wikitext: str) -> str:
  """Wikitext -> paragraphs of prose, one a line.

  What becomes of the markup: templates (infoboxes among them), tables, references, galleries,
  formulas, and links to files and categories are left out. A link is its text. So are headings, and
  lines of 60 characters or fewer, most list items among them: what stays ends as a sentence does.
  """
  code = mwparserfromhell.parse(wikitext)
  _drop_nodes(code)
  lines = (re.sub(r"\s+", " ", line).strip() for line in code.strip_code().splitlines())
  # A paragraph of prose ends as a sentence does. Headings, list items and rests of markup do not.
  return "\n".join(line for line in lines if len(line) > 60 and line[-1] in ".!?\"')")


def is_redirect(wikitext: str) -> bool:
  """Whether a page only points to another."""
  return wikitext.lower().startswith("#redirect")


def _drop_nodes(code: Wikicode) -> None:
  """Drops nodes at every depth, in one pass: to remove them one by one takes quadratic time."""
  code.nodes = [node for node in code.nodes if not _is_dropped(node)]
  for node in code.nodes:
    for part in SHOWN_PARTS:
      inner = getattr(node, part, None)
      if isinstance(inner, Wikicode):
        _drop_nodes(inner)


def _is_dropped(node: nodes.Node) -> bool:
  if isinstance(node, nodes.Wikilink):
    return bool(DROPPED_LINKS.match(str(node.title)))
  return isinstance(node, nodes.Tag) and node.tag in DROPPED_TAGS
