"""Compile a config's training step for hardware that is not here: does it fit, and what limits it?

python -m llm.preflight --config=configs/pretrain_gpt.py:xl --topology=v5e:4x4
    [--output=preflight.json] [--config.KEY=VALUE ...]

The topology is a TPU slice, such as v5p:8x8x8 or v6e-256, or CPU devices, such as cpu:8. A slice
needs the extra `tpu` but no TPU. No data is read and no array is allocated.
"""

import json
import os
import pathlib
import time
from typing import Sequence

# Set before jax is imported: nothing runs on an accelerator here, and libtpu must not look for one.
os.environ.update(
  JAX_PLATFORMS="cpu",
  TPU_SKIP_MDS_QUERY="1",
  TPU_WORKER_HOSTNAMES="localhost",
  TPU_ACCELERATOR_TYPE="",
)

import jax
import tabulate
from absl import flags

from llm import command
from llm.core import UserError
from llm.performance import hardware
from llm.train import read_config
from llm.training import experiment as experiment_lib
from llm.training import program

_TOPOLOGY = flags.DEFINE_string(
  "topology", "", "What to compile for, e.g. v5p:8x8x8, v6e-256 or cpu:8."
)
_OUTPUT = flags.DEFINE_string("output", "preflight.json", "Where the figures are written.")

GIB = 2**30


def _table(rows: Sequence[Sequence[str]], headers: Sequence[str], words: int = 1) -> str:
  """A table whose first `words` columns are words and whose others are figures."""
  return tabulate.tabulate(
    rows,
    headers=headers,
    tablefmt="github",
    disable_numparse=True,
    colalign=["left"] * words + ["right"] * (len(headers) - words),
  )


def _memory_table(report: dict) -> str:
  rows = [(kind, f"{size / GIB:.2f}") for kind, size in report["memory"].items()]
  return _table(rows, ("memory of a device", "GiB"))


def _traffic_table(report: dict) -> str:
  rows = []
  for exchange in report["collectives"]:
    axes = " ".join(exchange["axes"]) or "-"
    megabytes = f"{exchange['bytes'] / 1e6:,.1f}"
    milliseconds = f"{1e3 * exchange['seconds']:,.1f}" if exchange["seconds"] else "-"
    rows.append((exchange["kind"], axes, megabytes, milliseconds))
  return _table(rows, ("sent by a device, a step", "over", "MB", "ms at least"), words=2)


def _bounds_table(report: dict) -> str:
  rows = []
  for name, seconds in report["bounds"].items():
    mfu = report["mfu_bounds"][name]
    rows.append((name, f"{1e3 * seconds:,.1f}", f"{100 * mfu:.1f}%" if mfu < 1 else "-"))
  return _table(rows, ("bound by", "ms a step at least", "MFU at most"))


def show(report: dict):
  """Prints the report of `program.report`, with its `compile_seconds`."""
  shape = " x ".join(f"{axis} {size}" for axis, size in report["mesh"].items())
  print(
    f"{report['topology']}: {report['devices']} devices, mesh {shape}; "
    f"compiled in {report['compile_seconds']:.0f} s"
  )
  print(f"{report['parameters']:,} parameters, {report['tokens']:,} tokens a step")
  if not report["fits"]:
    print(f"DOES NOT FIT: {report['reason']}")
    print("what may help: " + "; ".join(report["advice"]))
    return
  print(f"fits\n\n{_memory_table(report)}\n")
  ratio = report["executed_flops"] / report["model_flops"]
  print(
    f"model {report['model_flops'] / 1e12:,.1f} TFLOP a step, "
    f"executed {report['executed_flops'] / 1e12:,.1f} "
    f"({ratio:.2f} times: recomputation, and what a causal mask hides)\n"
  )
  print(_traffic_table(report))
  if report["bounds"]:
    _show_bounds(report)


def _show_bounds(report: dict):
  """Prints how fast a step may be at most, and what limits it."""
  binding = report["binding"]
  tokens_per_second = report["tokens"] / report["bounds"][binding]
  print(f"\n{_bounds_table(report)}\n")
  print(
    f"bound by {binding}: at most {100 * report['mfu_bounds'][binding]:.1f}% MFU, "
    f"{tokens_per_second:,.0f} tokens/s; "
    f"{100 * report['mfu_without_overlap']:.1f}% if compute and exchanges never overlap"
  )


def main() -> int:
  """Compiles the step, prints and writes the report. Returns 1 if it does not fit, else 0."""
  if not _TOPOLOGY.value:
    raise UserError("--topology is missing: what to compile for, e.g. v5p:8x8x8, v6e-256 or cpu:8")
  config = read_config()
  jax.config.update("jax_platforms", "cpu")  # something may have imported jax before
  # A program for devices that are not here cannot be read back from the cache.
  jax.config.update("jax_enable_compilation_cache", False)
  topology = hardware.topology(_TOPOLOGY.value, config.mesh.slices)
  experiment = program.explicit(experiment_lib.without_data(config), topology)
  started = time.time()
  report = program.report(experiment, topology)
  report["compile_seconds"] = time.time() - started
  show(report)
  pathlib.Path(_OUTPUT.value).write_text(json.dumps(report, indent=1))
  return 0 if report["fits"] else 1


if __name__ == "__main__":
  command.run(main)
