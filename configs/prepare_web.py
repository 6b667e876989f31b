"""Pages of Common Crawl (WARC, WET) to clean text and token shards, by the steps of FineWeb.

  python -m llm.prepare --config=configs/prepare_web.py --output=DIR \\
      --config.input='crawl/*.warc.gz'

The steps and thresholds are those of FineWeb (Penedo et al. 2024, section 3), which takes of C4 all
but the rule on punctuation, and removes near duplicates within one crawl. Its block list of
addresses is left out, for it is fetched at run time. Languages are told by py3langid instead of
fastText: for that, set config.language.model to the path of lid.176.bin.
"""

from typing import Any

from llm.corpus import config as corpus_config

STEPS = (
  "extract",
  "language",
  "gopher_repetition",
  "gopher_quality",
  "c4",
  "fineweb_quality",
  "near_duplicates",
  "mask_personal",
)


def get_config() -> Any:
  """The config for English pages."""
  config = corpus_config.defaults("web", STEPS)
  config.c4.filter_no_terminal_punct = False
  return config
