"""What every command shares: flags, devices, the compilation cache, and how errors end."""

import contextlib
import ctypes
import functools
import os
import sys
import threading
import traceback
from typing import Callable
from unittest import mock

import jax
import psutil
from absl import flags, logging
from jax._src import distributed  # for what jax.distributed has no argument for

from llm import config as config_lib
from llm import core, sharding
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


def _guarded(main, argv):
  try:
    rest = flags.FLAGS(_checked_overrides(argv))
    if len(rest) > 1:
      raise UserError(
        f"unexpected argument {rest[1]!r}; flags are --NAME=VALUE (--help lists them)"
      )
    use_compilation_cache()
    return main()
  except (flags.Error, OSError, AttributeError, KeyError, TypeError, ValueError) as error:
    if isinstance(error, flags.Error) or _from_config_file(error):
      raise UserError(_first_line(error))
    if isinstance(error, OSError) and error.filename and not _is_ours(error):
      raise UserError(f"{error.filename}: {error.strerror}")
    raise
  except jax.errors.JaxRuntimeError as error:
    if "RESOURCE_EXHAUSTED" in str(error) or "out of memory" in str(error).lower():
      raise UserError(OUT_OF_MEMORY)
    if jax.distributed.is_initialized() and "Gloo" in str(error):
      print(
        f"error: an exchange with the other processes failed; JAX says next which of them is gone ({_first_line(error)})",
        file=sys.stderr,
      )
      return 1
    raise


def _first_line(error: BaseException) -> str:
  lines = str(error).strip().splitlines()
  return (
    lines[-1].strip() if lines and "parsing config file" in lines[0] else core.first_line(error)
  )


def _from_config_file(error: BaseException) -> bool:
  """Whether an exception was raised while flags and config files were read."""
  frames = traceback.extract_tb(error.__traceback__)
  return any("ml_collections" in f.filename for f in frames)


def _is_ours(error: BaseException) -> bool:
  return traceback.extract_tb(error.__traceback__)[-1].filename.endswith("cache.py")


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


def join_processes():
  """Makes this process one of many: as JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID say, else as the TPU pod
  or the Slurm job does. Must come before JAX is first used.

  PRETUNE_START_SECONDS (300) and PRETUNE_HEARTBEAT_SECONDS (60) say how long the others are waited for. Raises UserError.
  """
  told = {
    name: os.environ.get(f"JAX_{name}")
    for name in ("COORDINATOR_ADDRESS", "NUM_PROCESSES", "PROCESS_ID")
  }
  if any(told.values()) and not all(told.values()):
    raise UserError(
      f"--distributed: JAX_{next(n for n, v in told.items() if not v)} is not set, though "
      f"JAX_{next(n for n, v in told.items() if v)} is: set all three of {', '.join(f'JAX_{n}' for n in told)}"
    )
  try:
    explicit = (
      (told["COORDINATOR_ADDRESS"], int(told["NUM_PROCESSES"]), int(told["PROCESS_ID"]))
      if all(told.values())
      else ()
    )
    start, heartbeat = (
      int(os.environ.get(f"PRETUNE_{name}_SECONDS", seconds))
      for name, seconds in (("START", 300), ("HEARTBEAT", 60))
    )
    with _meeting_within(start):
      jax.distributed.initialize(
        *explicit, initialization_timeout=start + 30, heartbeat_timeout_seconds=heartbeat
      )
  except (RuntimeError, ValueError) as error:
    raise UserError(f"--distributed: the processes did not meet: {_first_line(error)}")


@contextlib.contextmanager
def _meeting_within(seconds: int):
  """Has JAX's service, which waits for an hour, give up before the processes do, which do not know whom they miss: it names them.

  JAX then ends all processes by force: the line before says what happened.
  """
  service = getattr(distributed, "_jax", None)
  make = getattr(service, "get_distributed_runtime_service", None)
  late = threading.Timer(
    max(seconds - 1, 0),
    lambda: print(
      f"error: --distributed: not all processes came within {seconds} s (PRETUNE_START_SECONDS); those that JAX names next as "
      '"timed out task names", in the log of process 0, are missing; if it has none, 0 itself is',
      file=sys.stderr,
      flush=True,
    ),
  )
  late.daemon = True
  late.start()
  try:
    with (
      mock.patch.object(
        service,
        "get_distributed_runtime_service",
        functools.partial(make, cluster_register_timeout=seconds),
      )
      if make
      else contextlib.nullcontext()
    ):
      yield
  finally:
    late.cancel()


def start_cpu(mesh: MeshConfig = MeshConfig()):
  """Settles how JAX uses the CPU and its memory; must come before JAX is first used.

  The CPU is one device whose threads are the cores, unless the mesh asks for more devices or
  JAX_NUM_CPU_DEVICES is set.
  """
  _keep_freed_memory()
  try:
    if jax.config.jax_num_cpu_devices <= 0:  # not set by the user
      processes = distributed.global_state.num_processes or 1  # which share the mesh
      jax.config.update("jax_num_cpu_devices", max(1, sharding.cpu_devices(mesh) // processes))
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
