"""Both phases on real text in minutes: pretrain a small model, fine-tune it, and compare.

python -m llm.quickstart [bert] [--workdir=DIR] [--quick] [--cache=DIR] [--offline]    sentiment (studies/sentiment.py)
python -m llm.quickstart gpt    [--workdir=DIR] [--quick] [--cache=DIR] [--offline]    prompt and response (studies/responses.py)
"""

import os
import pathlib
import sys

from absl import flags

from llm import command, storage
from llm.core import UserError
from llm.studies import responses, sentiment

_WORKDIR = flags.DEFINE_string(
  "workdir", "", "Where runs and report are kept; default quickstart or quickstart_gpt."
)
_QUICK = flags.DEFINE_bool("quick", False, "Less of everything.")
_CACHE = flags.DEFINE_string(
  "cache", "", "Where fetched archives are kept; default ~/.cache/pretune."
)
_OFFLINE = flags.DEFINE_bool("offline", False, "Fetch nothing: the archives are in the cache.")


def _run(study, folder: str):
  if _OFFLINE.value:
    os.environ["PRETUNE_OFFLINE"] = "1"
  if storage.is_bucket(_WORKDIR.value):
    raise UserError(f"--workdir={_WORKDIR.value}: give a folder of this machine")
  study.run(
    pathlib.Path(_WORKDIR.value or folder).expanduser().absolute(),
    _QUICK.value,
    _CACHE.value,
    command.start_cpu,
  )


VERBS = {
  "bert": lambda: _run(sentiment, "quickstart"),
  "gpt": lambda: _run(responses, "quickstart_gpt"),
}


if __name__ == "__main__":
  named = len(sys.argv) > 1 and not sys.argv[1].startswith("-")
  command.run_verb(
    "llm.quickstart", VERBS, sys.argv if named else [sys.argv[0], "bert", *sys.argv[1:]]
  )
