"""Commands and links of README.md and docs/*.md, and what checks a command without running it."""

import functools
import importlib
import json
import pathlib
import re
import shlex
import sys
import tempfile

from tests import kills

ROOT = pathlib.Path(__file__).resolve().parents[1]
PAGES = (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md")))


def blocks(page: pathlib.Path, language: str) -> list[str]:
  """The fenced blocks of one language."""
  return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL)


def commands(page: pathlib.Path) -> list[list[str]]:
  """The commands `python -m llm.X ...` of a page, each as [module, argument, ...]."""
  found = []
  for block in blocks(page, "sh"):
    for line in block.replace("\\\n", " ").splitlines():
      for words in _split_at_and(shlex.split(line, comments=True)):
        if words[:2] == ["python", "-m"] and words[2].startswith("llm."):
          found.append(words[2:])
  return found


def _split_at_and(words: list[str]) -> list[list[str]]:
  parts = [[]]
  for word in words:
    if word == "&&":
      parts.append([])
    else:
      parts[-1].append(word)
  return parts


def check(module_name: str, arguments: list[str]):
  """Ends the process with status 0 where a command would start, and as the command does if not.

  Flags are parsed, verbs looked up, configs frozen and objectives built. Nothing is read or run.
  """
  from llm import command

  # Configs read their overrides from here, one as soon as its module is imported.
  sys.argv = [module_name, *arguments]
  module = importlib.import_module(module_name)
  check_key = None
  name_of_study = ""
  if module_name == "llm.show":
    sys.argv = module.with_flag(sys.argv)
  elif module_name == "llm.prepare":
    check_key = module.corpus_config.check_key
  elif module_name == "llm.study":
    sys.argv = module.with_config(sys.argv)
    name_of_study = sys.argv.pop(1)
    check_key = module.check_key
  verbs = getattr(module, "VERBS", {})
  if verbs and arguments and not arguments[0].startswith("-"):
    verb = sys.argv.pop(1)
    if verb not in verbs:
      sys.exit(f"{module_name} has no {verb!r}")

  def freeze():
    if not any(argument.startswith("--config=") for argument in sys.argv):
      return
    if module_name == "llm.prepare":
      module.read_config()
      return
    if module_name == "llm.study":
      module.build(name_of_study)
      return
    from llm.objectives import base
    from llm.train import read_config

    base.build(read_config().objective)

  command.run(freeze, sys.argv, check_key)


def statuses(commands: list[list[str]]) -> list[int | None]:
  """What `check` says of each command.

  Each is checked in a process of its own, for two commands may define a flag of one name. It is a
  fork of this one, so that JAX is imported once. What it prints goes to standard error.
  """
  return [
    kills.ended(kills.forked(functools.partial(check, module, arguments), "/dev/stderr"), 300)
    for module, *arguments in commands
  ]


def run(commands: list[list[str]]):
  """Runs commands one after another, forks too. The first that fails ends this process."""
  for command in commands:
    output = pathlib.Path("printed.txt")
    output.unlink(missing_ok=True)
    status = kills.ended(kills.start(command, output), seconds=300)
    if status != 0:
      sys.exit(f"{command} ended with {status}: {output.read_text()}")


def outcomes(commands: list[list[str]]) -> list[tuple[int | None, str]]:
  """The status of each command, run in a fork too, and what it printed."""
  results = []
  for command in commands:
    with tempfile.NamedTemporaryFile() as output:
      status = kills.ended(kills.start(command, output.name), seconds=300)
      results.append((status, pathlib.Path(output.name).read_text()))
  return results


def main():
  """Reads commands from standard input, as JSON, and prints their statuses, or as argv says.

  `run`: runs them until one fails. `outcomes`: runs them, and prints how each ended.
  """
  # Most of what commands import, before the forks.
  from llm.inference import writer  # noqa: F401
  from llm.studies import label_efficiency, responses  # noqa: F401

  commands = json.load(sys.stdin)
  if sys.argv[1:] == ["run"]:
    run(commands)
  elif sys.argv[1:] == ["outcomes"]:
    print(json.dumps(outcomes(commands)))
  else:
    print(json.dumps(statuses(commands)))


if __name__ == "__main__":
  main()
