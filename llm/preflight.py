"""Compile a config's training step for hardware that is not here: does it fit, and what binds it?

python -m llm.preflight --config=configs/pretrain_gpt.py:xl --topology=v5e:4x4 [--output=preflight.json] [--config.KEY=VALUE ...]

The topology is a TPU slice (v5p:8x8x8, v6e-256; needs the extra `tpu`, no TPU) or cpu:8. No data is read and nothing allocated.
"""

import json
import os
import pathlib
import time

# Before jax is imported: nothing runs on an accelerator here, and no TPU is to be asked what it is.
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
  "topology", "", "What to compile for, e.g. v5p:8x8x8, v6e-256, cpu:8."
)
_OUTPUT = flags.DEFINE_string("output", "preflight.json", "Where the figures are written.")

GIB = 2**30


def _table(rows, *headers: str) -> str:
  texts = 2 if headers[1] == "over" else 1  # columns of words; the others are figures
  return tabulate.tabulate(
    rows,
    headers=headers,
    tablefmt="github",
    disable_numparse=True,
    colalign=["left"] * texts + ["right"] * (len(headers) - texts),
  )


def _memory_table(report: dict) -> str:
  return _table(
    [(kind, f"{size / GIB:.2f}") for kind, size in report["memory"].items()],
    "memory of a device",
    "GiB",
  )


def _traffic_table(report: dict) -> str:
  rows = [
    (
      t["kind"],
      " ".join(t["axes"]) or "-",
      f"{t['bytes'] / 1e6:,.1f}",
      f"{1e3 * t['seconds']:,.1f}" if t["seconds"] else "-",
    )
    for t in report["collectives"]
  ]
  return _table(rows, "sent by a device, a step", "over", "MB", "ms at least")


def _bounds_table(report: dict) -> str:
  rows = [
    (
      name,
      f"{1e3 * seconds:,.1f}",
      f"{100 * report['mfu_bounds'][name]:.1f}%" if report["mfu_bounds"][name] < 1 else "-",
    )
    for name, seconds in report["bounds"].items()
  ]
  return _table(rows, "bound by", "ms a step at least", "MFU at most")


def show(report: dict):
  """The report in words."""
  shape = " x ".join(f"{axis} {size}" for axis, size in report["mesh"].items())
  print(
    f"{report['topology']}: {report['devices']} devices, mesh {shape}; compiled in {report['compile_seconds']:.0f} s"
  )
  print(f"{report['parameters']:,} parameters, {report['tokens']:,} tokens a step")
  if not report["fits"]:
    print(f"DOES NOT FIT: {report['reason']}")
    print("what may help: " + "; ".join(report["advice"]))
    return
  print(f"fits\n\n{_memory_table(report)}\n")
  print(
    f"model {report['model_flops'] / 1e12:,.1f} TFLOP a step, executed {report['executed_flops'] / 1e12:,.1f} "
    f"({report['executed_flops'] / report['model_flops']:.2f} times: recomputation, and what a causal mask hides)\n"
  )
  print(_traffic_table(report))
  if report["bounds"]:
    best = report["mfu_bounds"][report["binding"]]
    print(
      f"\n{_bounds_table(report)}\n\nbound by {report['binding']}: at most {100 * best:.1f}% MFU, "
      f"{report['tokens'] / report['bounds'][report['binding']]:,.0f} tokens/s; "
      f"{100 * report['mfu_without_overlap']:.1f}% if compute and exchanges never overlap"
    )


def main():
  if not _TOPOLOGY.value:
    raise UserError("--topology is missing: what to compile for, e.g. v5p:8x8x8, v6e-256 or cpu:8")
  config = read_config()
  jax.config.update(
    "jax_enable_compilation_cache", False
  )  # programs for absent devices cannot be read back
  topology = hardware.topology(_TOPOLOGY.value, config.mesh.slices)
  experiment = program.explicit(experiment_lib.without_data(config), topology)
  began = time.time()
  report = program.report(experiment, topology)
  report["compile_seconds"] = time.time() - began
  show(report)
  pathlib.Path(_OUTPUT.value).write_text(json.dumps(report, indent=1))
  return 0 if report["fits"] else 1


if __name__ == "__main__":
  command.run(main)
