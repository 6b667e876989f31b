"""What every command shares: flags, devices, the compilation cache and the exit on errors."""

import ctypes
import errno
import logging
import os
import sys
import warnings
from typing import Any, Callable, Mapping

import jax
import psutil
from absl import flags
from absl import logging as absl_logging

from llm import cache, core, processes, sharding
from llm import config as config_lib
from llm import help as help_lib
from llm.config import MeshConfig
from llm.core import UserError

OUT_OF_MEMORY = (
  "out of memory on a device: use a smaller config.training.batch_size, more "
  "config.optimizer.grad_accum_steps, config.model.remat=full, config.model.loss_chunk=128, or "
  "split the parameters with config.mesh.fsdp"
)


# What the system says where a disk is full, or a quota or the largest file is reached.
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

_STRICT = flags.DEFINE_bool("strict", False, "Warnings of bad input are errors.")


def run(
  main: Callable[[], int | None],
  argv: list[str] | None = None,
  check_key: Callable[[str], None] | None = None,
):
  """Parses the flags, calls main and exits with its status, 0 where it returns none.

  --help prints what the command is for, and its flags. A UserError is printed as one line and exits
  with 2. A bug keeps its traceback and exits with 1. argv: the command line; None takes that of the
  process. check_key: raises UserError on an unknown key of --config; None takes the keys of a run.
  """
  _quiet_failed_writes()
  argv = sys.argv if argv is None else argv
  if help_lib.is_asked(argv):
    print(help_lib.text(sys.modules[__name__]))
    sys.exit(0)
  try:
    status = _guarded(main, argv, check_key or check_key_of_run)
  except UserError as error:
    print(f"error: {error}", file=sys.stderr)
    status = 2
  except KeyboardInterrupt:
    print("interrupted", file=sys.stderr)
    status = 130
  sys.stdout.flush()
  sys.exit(status or 0)


def run_verb(name: str, verbs: Mapping[str, Callable[[], int | None]], argv: list[str]):
  """Runs `python -m NAME VERB --flags`: calls the function that `verbs` has for the verb."""
  argv = list(argv)
  verb = ""
  if len(argv) > 1 and argv[1] not in help_lib.FLAGS:
    verb = argv.pop(1)  # absl must not see it

  def main() -> int | None:
    if verb not in verbs:
      raise UserError(f"{name} needs one of {', '.join(verbs)} first, not {verb!r}")
    return verbs[verb]()

  run(main, argv)


def _guarded(
  main: Callable[[], int | None], argv: list[str], check_key: Callable[[str], None]
) -> int | None:
  """Calls main. Raises UserError for every failure that the user can mend."""
  _parse(argv, check_key)
  _show_warnings(_STRICT.value)
  _warn_of_flags_given_twice(argv)
  use_compilation_cache()
  try:
    return main()
  except OSError as error:
    if error.errno in NO_ROOM:
      raise UserError(f"{error.filename or 'a file'}: {error.strerror}; what was saved is kept")
    if error.filename:
      raise UserError(f"{error.filename}: {error.strerror}")
    raise
  except jax.errors.JaxRuntimeError as error:
    if "RESOURCE_EXHAUSTED" in str(error) or "out of memory" in str(error).lower():
      raise UserError(OUT_OF_MEMORY)
    if jax.distributed.is_initialized() and "Gloo" in str(error):
      print(
        "error: an exchange with the other processes failed; JAX says next which of them is gone "
        f"({core.first_line(error)})",
        file=sys.stderr,
      )
      return 1
    raise


def _parse(argv: list[str], check_key: Callable[[str], None]):
  """Reads the flags and the config file. Raises UserError if either is wrong."""
  given = _config_flags(argv)
  _check_config_flags(given, check_key)
  try:
    arguments = flags.FLAGS(argv)
  except UserError:
    raise
  except flags.UnrecognizedFlagError as error:
    _check_objective_keys(given)
    raise help_lib.unknown_flag(error)
  except Exception as error:  # ml_collections runs the config file, which may raise anything
    _check_objective_keys(given)
    lines = str(error).strip().splitlines()
    in_config = lines and "parsing config file" in lines[0]
    raise UserError(lines[-1].strip() if in_config else core.first_line(error))
  if len(arguments) > 1:
    raise UserError(
      f"unexpected argument {arguments[1]!r}; flags are --NAME=VALUE (--help lists them)"
    )


def _quiet_failed_writes():
  """Silences the tracebacks of libraries where a checkpoint cannot be written: we say it in a line.

  The first array that fails closes the event loop of Orbax. Each of the others complains of that.
  """
  absl_logging.set_verbosity(absl_logging.FATAL)
  logging.getLogger("asyncio").setLevel(logging.CRITICAL)
  show_others = sys.excepthook

  def show(kind: Any, error: BaseException, trace: Any):
    if str(error) != "Event loop is closed":
      show_others(kind, error, trace)

  sys.excepthook = show


def _show_warnings(strict: bool):
  """Prints each `core.warn` once and in one line, in the first process; or raises it."""

  def show(message: Any, category: Any, *_: Any):
    if issubclass(category, core.InputWarning):
      if not processes.index():
        print(f"warning: {message}", file=sys.stderr, flush=True)
    else:
      show_others(message, category, *_)

  show_others = warnings.showwarning
  warnings.showwarning = show
  warnings.simplefilter("error" if strict else "once", core.InputWarning)


def _warn_of_flags_given_twice(argv: list[str]):
  """The last value counts, which may not be the one that was meant."""
  given = [argument.lstrip("-").partition("=")[0] for argument in argv if argument[:2] == "--"]
  for name in sorted({name for name in given if given.count(name) > 1 and name in flags.FLAGS}):
    flag = flags.FLAGS[name]
    if not isinstance(flag, flags.MultiFlag):
      core.warn(f"--{name} is given twice: the last one counts, {flag.value}")


def _config_flags(argv: list[str]) -> list[tuple[str, str]]:
  """(name, value) of --config and of every key that overrides it, in order."""
  given = []
  for number, argument in enumerate(argv[1:], 1):
    if argument == "--":
      break
    name, equals, value = argument.lstrip("-").partition("=")
    if argument.startswith("-") and (name == "config" or name.startswith("config.")):
      given.append((name, value if equals else (argv + [""])[number + 1]))
  return given


def _check_config_flags(given: list[tuple[str, str]], check_key: Callable[[str], None]):
  """Raises UserError if the config file or an overridden key does not exist.

  ml_collections would raise errors that name no key that was probably meant.
  """
  for name, value in given:
    if name == "config":
      path = value.split(":")[0]
      if not os.path.isfile(path):
        raise UserError(f"--config={path}: no such config file")
    else:
      check_key(name.removeprefix("config."))


def _check_objective_keys(given: list[tuple[str, str]]):
  """Raises UserError, naming the nearest key, on a key that the objective does not have.

  It runs after the flags could not be read: which keys there are is known by the name of the
  objective, which may itself be overridden, and else by running the config file once more.
  """
  values = dict(given)
  prefix = "config.objective."
  keys = [name.removeprefix(prefix) for name in values if name.startswith(prefix)]
  if not keys or "config" not in values:
    return
  # Imported here: a command that has no objective starts without its imports.
  from llm.objectives import base

  try:
    config: Any = flags.FLAGS["config"].parser.parse(values["config"])
  except Exception:  # the config file is wrong, which the caller says
    return
  name = values.get("config.objective.name") or config.objective.name
  base.check_keys(name, keys)
  for key in keys:
    if key not in config.objective:
      raise UserError(
        f"config.objective.{key}: {values['config']} is a config of {config.objective.name}, and "
        f"has no keys of {name}; take a config that has"
      )


def check_key_of_run(key: str):
  """Raises UserError, naming the nearest key, if no config has `key` (GROUP or GROUP.NAME).

  Those of an objective are known when its config was read (_check_objective_keys).
  """
  group, *names = key.split(".")
  if group == "objective":
    return
  if group in config_lib.ELSEWHERE:
    raise config_lib.unknown_key("config", group, ())
  if group not in config_lib.GROUPS:
    raise config_lib.unknown_key("config", group, [*config_lib.GROUPS, "objective"])
  config_lib.check_name(group, names, config_lib.GROUPS[group])


def use_compilation_cache():
  """Keeps compiled programs between runs.

  They lie in JAX_COMPILATION_CACHE_DIR where it is set, else in the folder xla of the cache.
  """
  if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
    jax.config.update("jax_compilation_cache_dir", str(cache.cache_dir() / "xla"))
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)


def start_cpu(mesh: MeshConfig = MeshConfig()):
  """Settles how JAX uses the CPU and its memory. Call it before JAX is first used.

  The CPU is one device, which runs a thread on each core. It is more devices where the mesh or
  JAX_NUM_CPU_DEVICES asks for them.
  """
  _keep_freed_memory()
  try:
    # JAX adds its options to the class at run time, where its types do not show them.
    count: int = jax.config.jax_num_cpu_devices  # pyright: ignore[reportAttributeAccessIssue]
    if count <= 0:  # not set by the user
      devices = max(1, sharding.cpu_devices(mesh) // processes.count())
      jax.config.update("jax_num_cpu_devices", devices)
  except RuntimeError:
    pass  # JAX is in use: a command of several phases keeps the devices of the first


def _keep_freed_memory():
  """Makes glibc keep the memory that a step frees, for the next step.

  Otherwise the kernel hands out a step's temporary memory anew each time, zeroed page by page.
  Threads share one arena, because the arenas that glibc gives them cannot hold blocks over 64 MB.
  """
  # The parameters of mallopt, from malloc.h.
  trim_threshold = -1
  mmap_max = -4
  arena_max = -8
  if sys.platform != "linux":
    return
  libc = ctypes.CDLL(None)
  if not hasattr(libc, "mallopt"):
    return
  libc.mallopt(arena_max, 1)
  libc.mallopt(mmap_max, 0)
  libc.mallopt(trim_threshold, -1)  # never give a free top back
  _ask_for_huge_pages(libc)


def _ask_for_huge_pages(libc: ctypes.CDLL):
  """Advises the kernel to back the heap by huge pages: half as much of it as there is memory.

  The block is freed at once and stays on the heap. It takes no memory until it is used.
  """
  madv_hugepage = 14  # from mman.h
  page = 2**21
  libc.malloc.restype = ctypes.c_void_p
  libc.malloc.argtypes = [ctypes.c_size_t]
  libc.free.argtypes = [ctypes.c_void_p]
  libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
  size = psutil.virtual_memory().total // 2
  if block := libc.malloc(size):
    libc.madvise(core.round_up(block, page), size - page, madv_hugepage)
    libc.free(block)
