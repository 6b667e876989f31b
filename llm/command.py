"""What every command shares: flags, devices, the compilation cache, and how errors end."""

import ctypes
import os
import sys
from typing import Callable

import jax
import psutil
from absl import flags, logging

from llm import config as config_lib
from llm import core, processes, sharding
from llm.config import MeshConfig
from llm.core import UserError
from llm.data import cache

OUT_OF_MEMORY = (
  "out of memory on a device: use a smaller config.training.batch_size, more "
  "config.optimizer.grad_accum_steps, config.model.remat=full, config.model.loss_chunk=128, or "
  "split the parameters with config.mesh.fsdp"
)


def run(main: Callable[[], int | None], argv: list[str] | None = None):
  """Parses flags, calls main and exits: 0, or 2 with one line for a mistake of the user's.

  A fault of ours keeps its traceback and exits with 1.
  """
  logging.set_verbosity(logging.ERROR)
  try:
    status = _guarded(main, sys.argv if argv is None else argv)
  except UserError as error:
    print(f"error: {error}", file=sys.stderr)
    status = 2
  except KeyboardInterrupt:
    print("interrupted", file=sys.stderr)
    status = 130
  sys.stdout.flush()
  sys.exit(status or 0)


def run_verb(name: str, verbs: dict[str, Callable], argv: list[str]):
  """`python -m NAME VERB --flags`: the verb is taken off before the flags are parsed."""
  argv = list(argv)
  verb = argv.pop(1) if len(argv) > 1 else ""

  def chosen():
    if verb not in verbs:
      raise UserError(f"{name} needs one of {', '.join(verbs)} first, not {verb!r}")
    return verbs[verb]()

  run(chosen, argv)


def _guarded(main: Callable[[], int | None], argv: list[str]) -> int | None:
  """Calls main, with what a user can do wrong turned into a UserError."""
  _parse(argv)
  use_compilation_cache()
  try:
    return main()
  except OSError as error:
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


def _parse(argv: list[str]):
  """Reads flags and the config file. Raises UserError on what is wrong in either."""
  try:
    rest = flags.FLAGS(_checked_overrides(argv))
  except UserError:
    raise
  except Exception as error:  # ml_collections runs the config file, which may raise anything
    lines = str(error).strip().splitlines()
    in_config = lines and "parsing config file" in lines[0]
    raise UserError(lines[-1].strip() if in_config else core.first_line(error))
  if len(rest) > 1:
    raise UserError(f"unexpected argument {rest[1]!r}; flags are --NAME=VALUE (--help lists them)")


def _checked_overrides(argv: list[str]) -> list[str]:
  """Names the nearest key for an override that no config has, before ml_collections sees it."""
  for number, argument in enumerate(argv[1:], 1):
    if argument == "--":
      break
    name, _, value = argument.lstrip("-").partition("=")
    if name == "config" and argument.startswith("-"):
      path = (value or (argv + [""])[number + 1]).split(":")[0]
      if not os.path.isfile(path):
        raise UserError(f"--config={path}: no such config file")
    if not argument.startswith(("--config.", "-config.")):
      continue
    key = argument.lstrip("-").partition("=")[0]
    parts = key.split(".")[1:]
    if parts[0] in config_lib.ELSEWHERE:
      raise config_lib.unknown_key("config", parts[0], ())
    if parts[0] != "objective" and parts[0] not in config_lib.GROUPS:
      raise config_lib.unknown_key("config", parts[0], [*config_lib.GROUPS, "objective"])
    if parts[0] in config_lib.GROUPS and len(parts) > 1:
      known = config_lib.GROUPS[parts[0]].__dataclass_fields__
      if parts[1] not in known or len(parts) > 2:
        raise config_lib.unknown_key(f"config.{parts[0]}", ".".join(parts[1:]), known)
  return argv


def use_compilation_cache():
  """Compiled programs are kept between runs, under ~/.cache/pretune/xla or JAX_COMPILATION_CACHE_DIR."""
  if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
    jax.config.update("jax_compilation_cache_dir", str(cache.cache_dir() / "xla"))
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)


def start_cpu(mesh: MeshConfig = MeshConfig()):
  """Settles how JAX uses the CPU and its memory; must come before JAX is first used.

  The CPU is one device whose threads are the cores, unless the mesh asks for more devices or
  JAX_NUM_CPU_DEVICES is set.
  """
  _keep_freed_memory()
  try:
    if jax.config.jax_num_cpu_devices <= 0:  # not set by the user
      devices = max(1, sharding.cpu_devices(mesh) // processes.count())
      jax.config.update("jax_num_cpu_devices", devices)
  except RuntimeError:
    pass  # JAX runs already: a command of several phases keeps its devices


def _keep_freed_memory():
  """Has glibc keep what a step frees for the next one, in huge pages where the kernel gives them.

  Otherwise the kernel hands out a step's temporary memory anew each time, zeroed page by page.
  Threads share one arena, for those that glibc gives them cannot hold blocks over 64 MB. What is
  reserved here takes no memory until it is used.
  """
  # Of malloc.h and mman.h.
  trim_threshold = -1
  mmap_max = -4
  arena_max = -8
  madv_hugepage = 14
  if sys.platform != "linux":
    return
  libc = ctypes.CDLL(None)
  if not hasattr(libc, "mallopt"):
    return
  libc.mallopt(arena_max, 1)
  libc.mallopt(mmap_max, 0)
  libc.mallopt(trim_threshold, -1)  # never give a free top back
  libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
  libc.free.argtypes = [ctypes.c_void_p]
  libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
  size = psutil.virtual_memory().total // 2
  page = 2**21
  if block := libc.malloc(size):
    libc.madvise(core.round_up(block, page), size - page, madv_hugepage)
    libc.free(block)
