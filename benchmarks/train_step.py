"""Our training step beside torch's, interleaved: same shapes, dropout off.

  pip install -e '.[bench]'
  python benchmarks/train_step.py [--shapes=gpt-4x128,bert-4x256] [--dtype=auto] [--rounds=5]

--dtype=float32: both sides in float32. auto: ours as `config.model.dtype=auto` takes it on this
CPU, torch under bfloat16 autocast.

Peers run in a process of their own and take turns with ours, so that neither disturbs the other's
threads. Prints a table of medians: milliseconds a step, ratio of the peer to ours, share of the
measured matmul ceiling, peak memory; and writes it as JSON with --output.
"""

import argparse
import json
import multiprocessing
import pathlib
import resource
import statistics
import sys
import time

import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).parent))

# name -> kind, layers, width, heads, vocabulary, rows, tokens a row, steps a round
SHAPES = {
  "gpt-4x128": ("gpt", 4, 128, 4, 65, 12, 64, 40),
  "gpt-6x384": ("gpt", 6, 384, 6, 4096, 8, 256, 3),
  "bert-4x256": ("bert", 4, 256, 4, 30_522, 32, 128, 3),
  "bert-base": ("bert", 12, 768, 12, 30_522, 8, 128, 1),
  "t5-4x256": ("t5", 4, 256, 4, 32_128, 16, 128, 3),  # v1.0, to TARGETS targets a row
}
TARGETS = 32
MASKED = 20  # positions a row, as BERT's max_predictions_per_seq at length 128


def make_batch(kind: str, vocab: int, rows: int, length: int) -> dict[str, np.ndarray]:
  """Random tokens in the layout of llm.core."""
  rng = np.random.default_rng(0)
  tokens = rng.integers(0, vocab, (rows, length)).astype(np.int32)
  batch = {
    "tokens": tokens,
    "segments": np.ones_like(tokens),
    "positions": np.tile(np.arange(length, dtype=np.int32), (rows, 1)),
  }
  if kind == "gpt":
    return batch | {
      "targets": np.roll(tokens, -1, 1),
      "weights": np.ones((rows, length), np.float32),
    }
  if kind == "t5":
    targets = rng.integers(0, vocab, (rows, TARGETS)).astype(np.int32)
    places = np.tile(np.arange(TARGETS, dtype=np.int32), (rows, 1))
    return batch | {
      "targets": targets,
      "weights": np.ones(targets.shape, np.float32),
      "decoder_positions": places,
      "decoder_tokens": np.roll(targets, 1, 1),
      "decoder_segments": np.ones_like(targets),
    }
  masked = np.sort(
    rng.permuted(np.tile(np.arange(length, dtype=np.int32), (rows, 1)), axis=1)[:, :MASKED], 1
  )
  return batch | {
    "types": np.zeros_like(tokens),
    "masked_positions": masked,
    "masked_targets": np.take_along_axis(tokens, masked, 1),
    "masked_weights": np.ones(masked.shape, np.float32),
    "firsts": np.zeros((rows, 1), np.int32),
    "pair_weights": np.ones((rows, 1), np.float32),
    "next_sentence": np.arange(rows, dtype=np.int32)[:, None] % 2,
  }


def ours(shape, dtype):
  """name -> (run(steps), FLOPs a step, ceiling)."""
  import jax

  from llm import command, sharding
  from llm.config import MeshConfig, ModelConfig, OptimizerConfig
  from llm.models import precision, resolve
  from llm.objectives import base
  from llm.performance import flops
  from llm.training import experiment, optimizer, partition
  from llm.training import step as step_lib

  kind, layers, width, heads, vocab, rows, length, _ = shape
  config = ModelConfig(
    name=kind,
    num_layers=layers,
    width=width,
    num_heads=heads,
    mlp_dim=4 * width,
    vocab_size=vocab,
    max_length=length if kind == "gpt" else 512,
    dropout=0.0,
    dtype=dtype,
    gated=False,
    init_std=1.0 if kind == "t5" else 0.02,
  )
  command.start_cpu()
  command.use_compilation_cache()
  config = resolve.resolved(config, length, "cpu")
  objective = base.build(
    base.defaults({"gpt": "causal_lm", "bert": "masked_lm", "t5": "span_corruption"}[kind])
  )
  model, batch, mesh = (
    experiment.build(objective, config, trains=True),
    make_batch(kind, vocab, rows, length),
    sharding.make_mesh(MeshConfig()),
  )
  with jax.set_mesh(mesh):

    def init():
      return step_lib.init_params(model, batch, jax.random.key(0))

    params = jax.jit(init, out_shardings=sharding.shardings(jax.eval_shape(init), mesh))()
    of_step = flops.model_flops(model, params, batch, config)
    ceiling, _ = flops.peak_flops(mesh, precision.of(config))
    marks = partition.frozen_layers(params, "")
    trained, frozen = partition.split(params, marks)
    tx = optimizer.make(OptimizerConfig(learning_rate=1e-4), trained, layers, 1000)
    placed = sharding.shardings(jax.eval_shape(tx.init, trained), mesh)
    state = [
      step_lib.TrainState(
        np.int32(0), trained, frozen, jax.jit(tx.init, out_shardings=placed)(trained)
      )
    ]
    train = step_lib.one_at_a_time(
      step_lib.make_train_step(model, objective, lambda _: tx, marks, 1, None)
    )
    batch = jax.device_put(batch, sharding.batch_sharding(mesh))

  def run(steps):
    with jax.set_mesh(mesh):
      for _ in range(steps):
        state[0], _ = train(state[0], batch, 0, None)
      jax.block_until_ready(state[0])

  return {"pretune": run}, of_step, ceiling


def theirs(shape, dtype):
  import torch_peers
  import transformers

  transformers.logging.set_verbosity_error()
  kind, layers, width, heads, vocab, rows, length, _ = shape
  found = torch_peers.peers(
    kind,
    layers,
    width,
    heads,
    vocab,
    make_batch(kind, vocab, rows, length),
    autocast=dtype != "float32",
  )

  def runner(step):
    def run(steps):
      for _ in range(steps):
        step().item()

    return run

  return {name: runner(step) for name, step in found.items()}, None, None


def worker(side, shape, dtype, pipe):
  """Answers ("run", name, steps) with seconds; ("end",) with the peak memory."""
  runs, flops, ceiling = (ours if side == "ours" else theirs)(shape, dtype)
  ready, failed = [], {}
  for name, run in runs.items():
    try:
      run(2)
      ready.append(name)
    except Exception as error:  # torch.compile needs a compiler that may not be there
      failed[name] = str(error).strip().splitlines()[0][:120]
  pipe.send((ready, failed, flops, ceiling))
  while True:
    command, *rest = pipe.recv()
    if command == "end":
      pipe.send(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20)
      return
    name, steps = rest
    start = time.perf_counter()
    runs[name](steps)
    pipe.send((time.perf_counter() - start) / steps)


def compare(name: str, dtype: str, rounds: int) -> list[dict]:
  """Medians of one shape, ours first."""
  shape, context = SHAPES[name], multiprocessing.get_context("spawn")
  sides, entries = {}, []
  for side in ("ours", "theirs"):
    here, there = context.Pipe()
    context.Process(target=worker, args=(side, shape, dtype, there), daemon=True).start()
    ready, failed, *counted = here.recv()
    sides[side] = here
    if side == "ours":
      flops, ceiling = counted
    entries += [(side, n) for n in ready]
    for n, reason in failed.items():
      print(f"{name}: {n} could not run: {reason}", file=sys.stderr)
  times = {entry: [] for entry in entries}
  for _ in range(rounds):
    for side, n in entries:
      sides[side].send(("run", n, shape[-1]))
      times[side, n].append(sides[side].recv())
  memory = {}
  for side, pipe in sides.items():
    pipe.send(("end",))
    memory[side] = pipe.recv()
  base = times["ours", "pretune"]
  return [
    {
      "shape": name,
      "dtype": dtype,
      "model": n,
      "ms": 1e3 * statistics.median(t),
      "ratio": statistics.median(a / b for a, b in zip(t, base)),
      "ceiling_share": flops / statistics.median(t) / ceiling,
      "peak_gib": memory[side],
    }
    for (side, n), t in times.items()
  ]


def processor() -> str:
  """The name of the CPU, as Linux gives it."""
  lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
  models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
  return f"{len(models)} x {models[0]}" if models else "unknown CPU"


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--shapes", default=",".join(SHAPES))
  parser.add_argument("--dtype", default="float32", choices=["float32", "auto"])
  parser.add_argument("--rounds", type=int, default=5)
  parser.add_argument("--output", help="write the rows as JSON")
  options = parser.parse_args()
  import tabulate

  print(f"{processor()}, {options.dtype}")
  rows = []
  for name in options.shapes.split(","):
    found = compare(name, options.dtype, options.rounds)
    rows += found
    print(
      tabulate.tabulate(
        [
          (
            r["shape"],
            r["model"],
            f"{r['ms']:.1f}",
            f"{r['ratio']:.2f}",
            f"{r['ceiling_share']:.0%}",
            f"{r['peak_gib']:.2f}",
          )
          for r in found
        ],
        headers=(
          "shape",
          "",
          "ms a step",
          "peer / ours",
          "of our matmul ceiling",
          "peak GiB of the side",
        ),
      ),
      flush=True,
    )
  if options.output:
    pathlib.Path(options.output).write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
  main()
