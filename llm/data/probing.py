"""Whether somebody's tokenizer.json can be used: it is tried in a process of its own first.

Its regular expressions may take exponential time, its replacements exponential memory, and the
package may end the process on what it did not foresee. The process imports this file alone.
"""

import tokenizers

from llm import bounded

SECONDS = 20.0
MEGABYTES = 2048
# Runs of one kind of character make an ambiguous regular expression try all ways to part them.
PROBES = [
  "The film was a joy to watch, and its plot made no sense: 1,234.5 times!\n\n\tIt isn't.",
  *(character * 500 for character in "aA1 .!\n\t_-é中"),
  *(character * 60 + end for character in "aAxX1 ._" for end in "!y\n"),
  "aA1 .!\n" * 100,
]


def _try(definition: str) -> int:
  """The number of ids of the probes. The process calls it."""
  tokenizer = tokenizers.Tokenizer.from_str(definition)
  return sum(len(encoding.ids) for encoding in tokenizer.encode_batch(PROBES))


def fault(definition: bytes) -> str:
  """What keeps the content of a tokenizer.json from being used; "" where nothing does."""
  worker = bounded.Worker("llm.data.probing:_try", SECONDS, MEGABYTES)
  try:
    worker(definition.decode("utf-8", "replace"))
  except bounded.Failed as error:
    return str(error)
  finally:
    worker.close()
  return ""
