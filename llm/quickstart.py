"""Both phases on real text in minutes: pretrain small models, fine-tune them, and compare.

Sentiment, questions and replies (studies/two_phases.py):
  python -m llm.quickstart [--workdir=DIR] [--quick] [--steps=N] [--cache=DIR] [--offline]
Replies alone, with a published decoder beside (studies/responses.py):
  python -m llm.quickstart gpt [--workdir=DIR] [--quick] [--steps=N] [--cache=DIR] [--offline]
"""

import os
import pathlib
import sys
from types import ModuleType

from absl import flags

from llm import command, storage
from llm.core import UserError
from llm.studies import responses, two_phases

_WORKDIR = flags.DEFINE_string(
  "workdir", "", "Where runs and report are kept; default quickstart or quickstart_gpt."
)
_QUICK = flags.DEFINE_bool("quick", False, "Less of everything.")
_STEPS = flags.DEFINE_integer(
  "steps", 0, "Steps of the pretraining (a GPT beside a BERT takes a third).", lower_bound=0
)
_CACHE = flags.DEFINE_string(
  "cache", "", "Where fetched archives are kept; default ~/.cache/pretune."
)
_OFFLINE = flags.DEFINE_bool("offline", False, "Fetch nothing: the archives are in the cache.")


def _run(study: ModuleType, default_folder: str):
  """Runs a file of studies/ in the workdir."""
  if _OFFLINE.value:
    os.environ["PRETUNE_OFFLINE"] = "1"
  if storage.is_bucket(_WORKDIR.value):
    raise UserError(f"--workdir={_WORKDIR.value}: give a folder of this machine")
  workdir = pathlib.Path(os.path.expanduser(_WORKDIR.value or default_folder)).absolute()
  study.run(workdir, _QUICK.value, _CACHE.value, _STEPS.value, command.start_cpu)


VERBS = {
  "all": lambda: _run(two_phases, "quickstart"),
  "gpt": lambda: _run(responses, "quickstart_gpt"),
}


if __name__ == "__main__":
  arguments = sys.argv
  if len(arguments) < 2 or arguments[1].startswith("-"):
    arguments = [arguments[0], "all", *arguments[1:]]
  command.run_verb("llm.quickstart", VERBS, arguments)
