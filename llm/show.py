"""Look at a batch, at how parameters lie on the mesh, or into a checkpoint.

python -m llm.show batch      --config=... [--step=N --rows=N]
python -m llm.show sharding   --config=... [--topology=v5p:8x8x8]
python -m llm.show checkpoint --checkpoint=DIR
"""

import sys

import jax
import numpy as np
import tabulate
from absl import flags

from llm import command, sharding, storage
from llm.checkpoints import locate, manager
from llm.core import UserError, flatten
from llm.data.tokenizer import Tokenizer
from llm.objectives import base
from llm.performance import hardware
from llm.train import read_config
from llm.training import experiment as experiment_lib
from llm.training import state as state_lib

_CHECKPOINT = flags.DEFINE_string(
  "checkpoint", None, "A workdir, its checkpoints folder or one step."
)
_TOPOLOGY = flags.DEFINE_string(
  "topology", "", "Devices that need not be here, e.g. v5e:4x4; default: those that are."
)
_STEP = flags.DEFINE_integer("step", 0, "Which batch.", lower_bound=0)
_ROWS = flags.DEFINE_integer("rows", 2, "How many of its rows.", lower_bound=1)


def _decoded(tokenizer, ids) -> str:
  return " ".join(tokenizer.pieces[int(i)] for i in ids)


def render_row(batch: dict, row: int, tokenizer: Tokenizer, objective: base.Objective) -> str:
  """One row in words: its documents, what is masked and how, their labels, what bears loss."""
  part = {k: v[row] for k, v in batch.items()}
  segments = part["segments"]
  lines = [
    f"{int((segments > 0).sum())} of {len(segments)} positions used, {segments.max()} document(s)"
  ]
  masked = {
    int(p): int(t)
    for p, t, w in zip(
      part.get("masked_positions", ()),
      part.get("masked_targets", ()),
      part.get("masked_weights", ()),
    )
    if w
  }
  for segment in range(1, segments.max() + 1):
    at = np.flatnonzero(segments == segment)
    words = []
    for position in at:
      piece = tokenizer.pieces[int(part["tokens"][position])]
      if position in masked:
        piece = f"<{tokenizer.pieces[masked[position]]} => {piece}>"
      words.append(piece)
    lines.append(
      f"  document {segment}, positions {part['positions'][at[0]]}..{part['positions'][at[-1]]}: "
      + " ".join(words)
    )
    if "targets" in part:  # of a decoder of its own, or of the same places
      its = np.flatnonzero(part.get("decoder_segments", segments) == segment)
      bearing = its[part["weights"][its] > 0]
      lines.append(f"    targets (bear loss): {_decoded(tokenizer, part['targets'][bearing])}")
  if masked:
    kinds = {"[MASK]": 0, "kept": 0, "random": 0}
    for position, target in masked.items():
      now = int(part["tokens"][position])
      kinds["[MASK]" if now == tokenizer.mask else "kept" if now == target else "random"] += 1
    lines.append(
      f"  loss at {len(masked)} positions: "
      + ", ".join(f"{v} {k}" for k, v in kinds.items())
      + "; shown as <original => what the model sees>"
    )
  for number in np.flatnonzero(part.get("pair_weights", ())):
    second = _decoded(tokenizer, part["tokens"][(part["types"] == 1) & (segments == number + 1)])
    truth = "true" if part["next_sentence"][number] else "another document"
    lines.append(f"  next sentence in document {number + 1}: {truth}; second part: {second}")
  for number in np.flatnonzero(part.get("window_weights", ())):
    answer = part["tokens"][part["starts"][number] : part["ends"][number] + 1]
    lines.append(f"  answer in document {number + 1}: {_decoded(tokenizer, answer)}")
  for number in np.flatnonzero(part.get("label_weights", ())):
    label = objective.label_name(part["labels"][number])
    lines.append(f"  label of document {number + 1}: {label}")
  return "\n".join(lines)


def show_batch():
  """Prints decoded rows of one training batch."""
  made = experiment_lib.prepare(read_config())
  count = min(_ROWS.value, made.batches.batch_size)
  batch = made.batches.read(_STEP.value, range(count))
  print(f"batch {_STEP.value}, {count} of {made.batches.batch_size} rows")
  for row in range(count):
    print(f"row {row}: " + render_row(batch, row, made.tokenizer, made.objective))


def show_sharding():
  """Prints every parameter and moment: shape, type, axes, bytes a device."""
  made = experiment_lib.without_data(read_config())
  if _TOPOLOGY.value:
    mesh = hardware.mesh(
      made.config.mesh, hardware.topology(_TOPOLOGY.value, made.config.mesh.slices)
    )
  else:
    command.start_cpu(made.config.mesh)
    mesh = sharding.make_mesh(made.config.mesh)
  made = made.on(mesh)
  state = state_lib.plan(made, mesh).state
  named = {"params": state.trained, "frozen": state.frozen, "optimizer": state.opt_state}
  rows, total = [], 0
  for path, leaf in jax.tree_util.tree_leaves_with_path(named):
    shard = leaf.sharding.shard_shape(leaf.shape)
    size = sharding.device_bytes(leaf)
    total += size
    rows.append(
      (
        jax.tree_util.keystr(path, simple=True, separator="/"),
        *("x".join(map(str, s)) for s in (leaf.shape, shard)),
        str(leaf.dtype),
        " ".join(str(a) for a in leaf.sharding.spec) or "-",
        "replicated" if leaf.sharding.is_fully_replicated and mesh.size > 1 else "",
        f"{size:,}",
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
    f"{step}: whole by the {'size' if storage.is_bucket(step) else 'digest'} of every file, step {description['step']}, "
    f"objective {description['config']['objective']['name']}"
  )
  print(
    f"tokenizer {tokenizer.name}, {tokenizer.vocab_size} pieces; metrics {description['metrics']}"
  )
  print(f"model {description['config']['model']}")
  rows = [
    (
      path,
      "x".join(map(str, leaf.shape)),
      str(leaf.dtype),
      f"{leaf.size:,}",
      f"{float(np.std(leaf)):.4g}",
    )
    for path, leaf in sorted(leaves.items())
  ]
  print(
    tabulate.tabulate(rows, headers=("parameter", "shape", "type", "size", "standard deviation"))
  )
  print(f"{sum(leaf.size for leaf in leaves.values()):,} parameters, the vocabulary padded")


VERBS = {"batch": show_batch, "sharding": show_sharding, "checkpoint": show_checkpoint}


if __name__ == "__main__":
  command.run_verb("llm.show", VERBS, sys.argv)
