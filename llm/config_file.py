"""The flag --config: a file of configs/, with its argument after a colon.

A config file is the user's program. What it raises is the user's to mend, and said in one line.
"""

import importlib.machinery
import importlib.util
import sys
import types
from typing import Any

import ml_collections
from absl import flags
from ml_collections import config_flags
from ml_collections.config_flags import config_flags as parsers

from llm import reading
from llm.core import UserError, first_line


def define(help: str) -> flags.FlagHolder:
  """Defines --config, and --config.GROUP.KEY for every key of the file that it names."""
  holder = config_flags.DEFINE_config_file("config", None, help)
  flags.FLAGS["config"].parser = _Parser("config")
  return holder


class _Parser(parsers.ConfigFileFlagParser):
  """From the value of --config to the config. Raises UserError, with the line of the file."""

  def parse(self, path: str) -> Any:
    file, colon, argument = path.partition(":")
    reading.check_file(file)
    try:
      get_config = getattr(_module(file), "get_config", None)
      if not callable(get_config):
        raise UserError("it defines no function get_config")
      config = get_config(*([argument] if colon else []))
      if not isinstance(config, ml_collections.ConfigDict):
        raise UserError(f"get_config returns {config!r:.60}, not a config (llm.config.defaults)")
    except UserError as error:
      raise UserError(f"--config={path}: {error}")
    except KeyboardInterrupt:
      raise
    except BaseException as error:  # a program may raise anything, and sys.exit raises SystemExit
      raise UserError(f"{_place(error, file)}: {type(error).__name__}: {_message(error)}")
    return config.lock()


def _module(file: str) -> types.ModuleType:
  """The config file as a module, run."""
  loader = importlib.machinery.SourceFileLoader("config_file", file)
  spec = importlib.util.spec_from_loader(loader.name, loader)
  assert spec
  module = importlib.util.module_from_spec(spec)
  sys.modules[module.__name__] = module  # where its dataclasses look for their types
  loader.exec_module(module)
  return module


def _message(error: BaseException) -> str:
  if isinstance(error, SyntaxError):
    return error.msg
  return first_line(error) if str(error) else "without a message"


def _place(error: BaseException, file: str) -> str:
  """FILE:LINE of the last line of the config file that an error came through."""
  if isinstance(error, SyntaxError) and error.filename == file:
    return f"{file}:{error.lineno}"
  line = 0
  step = error.__traceback__
  while step:
    if step.tb_frame.f_code.co_filename == file:
      line = step.tb_lineno
    step = step.tb_next
  return f"{file}:{line}" if line else file
