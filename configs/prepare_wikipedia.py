"""A dump of Wikipedia (pages-articles, XML) to clean articles and token shards.

  python -m llm.prepare --config=configs/prepare_wikipedia.py --output=DIR \\
      --config.input='dumps/*.xml.bz2'

A multistream dump is read by many tasks at once, any other by one. Articles are prose already: the
filters of web pages are left out, near duplicates and articles in another language are not.
"""

from typing import Any

from llm.corpus import config as corpus_config

STEPS = ("extract", "language", "exact_duplicates", "near_duplicates")


def get_config() -> Any:
  """The config for a dump in English."""
  config = corpus_config.defaults("wikipedia", STEPS)
  config.extract.update(by="wikitext", seconds=20.0)
  return config
