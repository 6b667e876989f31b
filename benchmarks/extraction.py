"""The extractors of llm.prepare on pages whose main text is marked: what they keep, and how fast.

  pip install -e '.[corpus]' && python benchmarks/extraction.py FOLDER_OF_HTML [--pages=200]

Pages are those that Sphinx makes, which mark their main text by role="main": any project's
documentation, e.g. a -doc package of Debian. Words count with their number: kept is the share of
the main text's words that an extractor gives, boilerplate the share of its words that are from
elsewhere on the page.
"""

import argparse
import collections
import pathlib
import statistics
import time

import lxml.html
import tabulate

from llm.corpus import extraction
from llm.data import embedded


def words(text: str) -> collections.Counter[str]:
  return collections.Counter(embedded.words_of(text).split())


def main_text(html: str) -> str:
  """The text that the page marks as its main part; "" where it marks none."""
  marked = lxml.html.fromstring(html.encode()).xpath('//*[@role="main"]')
  if not marked:
    return ""
  for link in marked[0].xpath('.//a[@class="headerlink"]'):
    link.drop_tree()
  return marked[0].text_content()


def main():
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("folder", type=pathlib.Path)
  parser.add_argument("--pages", type=int, default=200)
  arguments = parser.parse_args()
  pages = []
  for path in sorted(arguments.folder.rglob("*.html")):
    html = path.read_text(errors="replace")
    truth = main_text(html)
    if 500 < len(truth) and len(html) < 500_000:
      pages.append((html, words(truth)))
  pages = pages[:: max(1, len(pages) // arguments.pages)][: arguments.pages]
  rows = []
  for name in ("trafilatura", "resiliparse"):
    extract = extraction.EXTRACTORS[name]
    extract(pages[0][0])  # imports
    kept, boilerplate, empty = [], [], 0
    start = time.perf_counter()
    texts = [extract(html) or "" for html, _ in pages]
    seconds = time.perf_counter() - start
    for text, (_, truth) in zip(texts, pages):
      given = words(text)
      empty += not given
      shared = (given & truth).total()
      kept.append(shared / truth.total())
      boilerplate.append(1 - shared / max(1, given.total()))
    rows.append(
      {
        "extractor": name,
        "ms a page": f"{1000 * seconds / len(pages):.1f}",
        "kept": f"{statistics.mean(kept):.1%}",
        "boilerplate": f"{statistics.mean(boilerplate):.1%}",
        "pages without text": empty,
      }
    )
  print(f"{len(pages)} pages of {sum(len(html) for html, _ in pages) / 1e6:.1f} MB")
  print(tabulate.tabulate(rows, headers="keys"))


if __name__ == "__main__":
  main()
