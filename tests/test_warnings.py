"""What is accepted though it is surely a mistake is said in one line, and refused by --strict."""

import warnings

import pytest
from absl import flags

from llm import command, core
from llm import help as help_lib
from llm.core import UserError


@pytest.fixture
def fresh_warnings(monkeypatch):
  """What a command does to the warnings goes with it."""
  with warnings.catch_warnings():
    yield


def run(main, *arguments):
  with pytest.raises(SystemExit) as ended:
    command.run(main, ["command", *arguments])
  return ended.value.code


@pytest.fixture
def strict_flag():
  yield
  flags.FLAGS["strict"].unparse()


def test_a_warning_is_one_line_once(fresh_warnings, strict_flag, capsys):
  def main():
    core.warn("a.txt: a strange thing")
    core.warn("a.txt: a strange thing")

  assert run(main) == 0
  assert capsys.readouterr().err == "warning: a.txt: a strange thing\n"
  assert run(main, "--strict") == 2
  assert capsys.readouterr().err == "error: a.txt: a strange thing\n"


def test_a_flag_given_twice(fresh_warnings, strict_flag, capsys):
  assert run(lambda: None, "--nostrict", "--strict=False", "--strict=False") == 0
  assert capsys.readouterr().err == "warning: --strict is given twice: the last one counts, False\n"


@pytest.mark.parametrize(
  "key, hint",
  [
    ("config.block_size", "here it is config.training.sequence_length"),
    ("config.training.learning_rate", "did you mean config.optimizer.learning_rate"),
    ("config.learning_rate", "did you mean config.optimizer.learning_rate"),
    ("config.training.lr", "here it is config.optimizer.learning_rate"),
    ("config.training.stepz", "did you mean config.training.steps"),
  ],
)
def test_keys_of_other_codebases_are_answered(key, hint):
  with pytest.raises(UserError, match=hint):
    command.check_key_of_run(key.removeprefix("config."))


@pytest.mark.parametrize(
  "name, hint",
  [
    ("learning_rate", "here it is --config.optimizer.learning_rate"),
    ("max_steps", "here it is --config.training.steps"),
    ("output_dir", "here it is --workdir"),
    ("workdri", "--help lists the flags"),
  ],
)
def test_flags_of_other_codebases_are_answered(name, hint, monkeypatch):
  from llm import train  # noqa: F401 (it defines the flags)

  error = help_lib.unknown_flag(flags.UnrecognizedFlagError(name))
  assert hint in str(error) and f"--{name}" in str(error)
