"""Show a batch in words, how parameters lie on the mesh, what a checkpoint holds or a model wrote.

python -m llm.show batch      --config=... [--step=N --rows=N]
python -m llm.show sharding   --config=... [--topology=v5p:8x8x8]
python -m llm.show checkpoint --checkpoint=DIR
python -m llm.show corpus     DIR
python -m llm.show rollouts   --workdir=DIR [--step=N --rows=N]
"""

import contextlib
import dataclasses
import json
import pydoc
import sys
from typing import Sequence

import jax
import numpy as np
import tabulate
from absl import flags
from jax.sharding import Mesh

from llm import command, sharding, storage
from llm.checkpoints import locate, manager
from llm.config import MeshConfig
from llm.core import UserError, flatten
from llm.performance import hardware
from llm.train import read_config
from llm.training import experiment as experiment_lib
from llm.training import in_words
from llm.training import plan as plan_lib

_CHECKPOINT = flags.DEFINE_string(
  "checkpoint", None, "A workdir, its checkpoints folder or one step."
)
_TOPOLOGY = flags.DEFINE_string(
  "topology", "", "Devices to plan for, e.g. v5e:4x4; default: those of this machine."
)
_CORPUS = flags.DEFINE_string("corpus", None, "The --output of llm.prepare.")
_STEP = flags.DEFINE_integer("step", 0, "The batch of this step, or its rollouts.", lower_bound=0)
_ROWS = flags.DEFINE_integer("rows", 2, "How many of its rows or prompts.", lower_bound=1)


def show_batch():
  """Prints decoded rows of one training batch."""
  training = experiment_lib.prepare(read_config())
  batches = training.batches
  count = min(_ROWS.value, batches.batch_size)
  batch = batches.read(_STEP.value, range(count))
  print(f"batch {_STEP.value}, {count} of {batches.batch_size} rows")
  for number in range(count):
    print(f"row {number}: " + in_words.row(batch, number, training.tokenizer, training.objective))


def _mesh(config: MeshConfig) -> Mesh:
  """The mesh of the devices of --topology, or of this machine's."""
  if _TOPOLOGY.value:
    return hardware.mesh(config, hardware.topology(_TOPOLOGY.value, config.slices))
  command.start_cpu(config)
  return sharding.make_mesh(config)


def _shape(sizes: Sequence[int]) -> str:
  return "x".join(map(str, sizes))


def show_sharding():
  """Prints every parameter and moment: shape, type, mesh axes and bytes on a device."""
  experiment = experiment_lib.without_data(read_config())
  mesh = _mesh(experiment.config.mesh)
  state = plan_lib.of(experiment.on(mesh), mesh).state
  named = {"params": state.trained, "frozen": state.frozen, "optimizer": state.opt_state}
  rows = []
  total = 0
  for path, leaf in jax.tree_util.tree_leaves_with_path(named):
    device_bytes = sharding.device_bytes(leaf)
    total += device_bytes
    replicated = leaf.sharding.is_fully_replicated and mesh.size > 1
    rows.append(
      (
        jax.tree_util.keystr(path, simple=True, separator="/"),
        _shape(leaf.shape),
        _shape(leaf.sharding.shard_shape(leaf.shape)),
        str(leaf.dtype),
        " ".join(str(axis) for axis in leaf.sharding.spec) or "-",
        "replicated" if replicated else "",
        f"{device_bytes:,}",
      )
    )
  print(
    tabulate.tabulate(
      rows,
      headers=("array", "shape", "of a device", "type", "axes", "", "bytes a device"),
      colalign=("left",) * 6 + ("right",),
    )
  )
  print(f"mesh {dict(mesh.shape)}: {total:,} bytes a device")


def show_checkpoint():
  """Prints what a checkpoint holds."""
  if not _CHECKPOINT.value:
    raise UserError(
      "--checkpoint is missing: a workdir of llm.train, its checkpoints folder or one step"
    )
  step = locate.find(_CHECKPOINT.value)
  description = manager.describe(step)
  tokenizer = manager.load_tokenizer(step)
  leaves = flatten(manager.restore(step, "params"))
  print(
    f"{step}: whole by the digest of every file, step {description.step}, "
    f"objective {description.config.objective['name']}"
  )
  print(f"tokenizer {tokenizer.name}, {tokenizer.vocab_size} pieces; metrics {description.metrics}")
  print(f"model {dataclasses.asdict(description.config.model)}")
  rows = []
  for path, leaf in sorted(leaves.items()):
    deviation = f"{float(np.std(leaf)):.4g}"
    rows.append((path, _shape(leaf.shape), str(leaf.dtype), f"{leaf.size:,}", deviation))
  print(
    tabulate.tabulate(rows, headers=("parameter", "shape", "type", "size", "standard deviation"))
  )
  print(f"{sum(leaf.size for leaf in leaves.values()):,} parameters, the vocabulary padded")


def show_corpus():
  """Pages through what llm.prepare did: figures, and documents kept and dropped by each reason."""
  if not _CORPUS.value:
    raise UserError(
      "the folder is missing: python -m llm.show corpus DIR, the --output of llm.prepare"
    )
  report = storage.folder(_CORPUS.value) / "report.md"
  if not report.exists():
    raise UserError(f"{report}: there is no report: {_CORPUS.value} is no corpus that is finished")
  pydoc.pager(report.read_text())


def show_rollouts():
  """Prints prompts of a logged step, what the model wrote after them, and what it earned."""
  workdir = flags.FLAGS.workdir  # a flag of llm.train
  if not workdir:
    raise UserError("--workdir is missing: the workdir of a run of configs/finetune_grpo.py")
  path = storage.folder(workdir) / "rollouts.jsonl"
  if not path.exists():
    raise UserError(f"{path}: there is none: the run learns from no rewards, or has logged no step")
  samples = []
  for line in path.read_text().splitlines():
    with contextlib.suppress(json.JSONDecodeError):  # the last one may be half written
      samples.append(json.loads(line))
  if not samples:
    raise UserError(f"{path}: the run has logged no step yet")
  steps = sorted({sample["step"] for sample in samples})
  step = _STEP.value or steps[-1]
  if step not in steps:
    raise UserError(
      f"--step={step}: rollouts were logged of {len(steps)} steps, from {steps[0]} to {steps[-1]} "
      "(config.training.log_every)"
    )
  of_step = [sample for sample in samples if sample["step"] == step]
  for sample in of_step[: _ROWS.value]:
    print(f"step {step}, prompt: {sample['prompt']!r}")
    rows = [
      (answer.get("reward", answer.get("fault")), answer["tokens"], repr(answer["text"]))
      for answer in sample["answers"]
    ]
    print(tabulate.tabulate(rows, headers=("reward", "tokens", "answer")))


def with_flag(argv: Sequence[str]) -> list[str]:
  """`corpus DIR` as `corpus --corpus=DIR`."""
  arguments = list(argv)
  if arguments[1:2] == ["corpus"] and len(arguments) > 2 and not arguments[2].startswith("-"):
    arguments[2] = f"--corpus={arguments[2]}"
  return arguments


VERBS = {
  "batch": show_batch,
  "sharding": show_sharding,
  "checkpoint": show_checkpoint,
  "corpus": show_corpus,
  "rollouts": show_rollouts,
}


if __name__ == "__main__":
  command.run_verb("llm.show", VERBS, with_flag(sys.argv))
