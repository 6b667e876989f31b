"""Files of text (JSON lines, Parquet, CSV, text; compressed or not) to token shards.

  python -m llm.prepare --config=configs/prepare_text.py --output=DIR --config.input=corpus/

Records have their text in the field `text`. The input is files, patterns and folders, on this
machine or in a bucket (gs://), or a data set of the hub (hf:NAME). Of text that is clean already,
only duplicates are dropped; other steps are named in config.steps.
"""

from typing import Any

from llm.corpus import config as corpus_config

STEPS = ("exact_duplicates", "near_duplicates")


def get_config() -> Any:
  """The config for any text."""
  return corpus_config.defaults("text", STEPS)
