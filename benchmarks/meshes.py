"""Compares every mesh of 8 devices over data, fsdp, tensor and context with one device.

  PYTHONPATH=. python benchmarks/meshes.py     (eight virtual devices; some ten minutes)

It prints the largest relative differences for BERT, GPT and T5: of the gradients in float64, then
of the losses of five steps and the parameters after them in float32 under SGD. Dropout is off. Each
mesh also works through the batch in two parts.
"""

# JAX gets its settings before the imports that may start it.
# ruff: noqa: E402

import itertools
import os

os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_backend_optimization_level=0"
os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import numpy as np
import optax
import tabulate
import tqdm

jax.config.update("jax_num_cpu_devices", 8)

from llm import command, sharding
from llm.config import MeshConfig
from llm.objectives import base
from llm.runs import metrics
from llm.training import partition
from llm.training import step as step_lib
from tests.test_models import batch_of, model_of, params_of

SHAPES = [shape for shape in itertools.product((1, 2, 4, 8), repeat=4) if np.prod(shape) == 8]
GRADIENTS = optax.GradientTransformation(
  lambda params: params,
  lambda grads, state, params: (jax.tree.map(jax.numpy.zeros_like, grads), grads),
)


def run(name: str, shape, accum: int, dtype: str, optimizer, steps: int):
  """(losses, parameters, what the optimizer keeps) after some steps on a mesh."""
  objective = base.build(base.defaults("masked_lm" if name == "bert" else "causal_lm"))
  model = model_of(name, dtype=dtype, num_heads=8, num_kv_heads=0, width=64, head_width=8)
  with jax.enable_x64(False):  # else the draw itself would differ
    fresh = params_of(model)
  params = jax.tree.map(lambda x: np.asarray(x, dtype), fresh)
  marks = partition.frozen_layers(params, "")
  mesh = sharding.make_mesh(MeshConfig(*shape), jax.devices()[: int(np.prod(shape))])
  with jax.set_mesh(mesh):
    trained, frozen = partition.split(
      jax.device_put(params, sharding.shardings(params, mesh)), marks
    )
    state, losses = step_lib.init_state(trained, frozen, optimizer), []
    train = step_lib.one_at_a_time(
      step_lib.make_train_step(model, objective, lambda _: optimizer, marks, accum, None)
    )
    for number in range(steps):
      batch = {k: np.concatenate([v, v]) for k, v in batch_of(8, seed=number).items()}
      state, found = train(state, jax.device_put(batch, sharding.batch_sharding(mesh)), 0, None)
      losses.append(metrics.means([jax.device_get(found)])["loss"])

  def host(tree):
    return {path: np.asarray(leaf) for path, leaf in tree.items()}

  return (
    np.array(losses),
    host(state.trained),
    host(state.opt_state) if optimizer is GRADIENTS else {},
  )


def difference(found: dict, expected: dict) -> float:
  """The largest, relative to the largest value."""
  scale = max(np.abs(x).max() for x in expected.values())
  return max(np.abs(found[path] - expected[path]).max() for path in expected) / scale


def main():
  command.use_compilation_cache()
  cases = [
    (name, shape, accum)
    for name in ("bert", "gpt", "t5")
    for shape in SHAPES
    for accum in (1, 2)
    if accum == 1 or shape in ((1, 1, 1, 8), (2, 2, 2, 1), (8, 1, 1, 1))
  ]
  expected, rows = {}, []
  for name, shape, accum in tqdm.tqdm(cases, unit=" meshes", disable=None):
    if name not in expected:
      with jax.enable_x64(True):
        exact = run(name, (1, 1, 1, 1), 1, "float64", GRADIENTS, 1)[2]
      expected[name] = exact, *run(name, (1, 1, 1, 1), 1, "float32", optax.sgd(0.1), 5)[:2]
    with jax.enable_x64(True):
      gradients = run(name, shape, accum, "float64", GRADIENTS, 1)[2]
    losses, params, _ = run(name, shape, accum, "float32", optax.sgd(0.1), 5)
    exact, true_losses, true_params = expected[name]
    rows.append(
      (
        name,
        " x ".join(map(str, shape)),
        accum,
        difference(gradients, exact),
        np.abs(losses / true_losses - 1).max(),
        difference(params, true_params),
      )
    )
  print(
    tabulate.tabulate(
      rows,
      headers=(
        "model",
        "data x fsdp x tensor x context",
        "parts",
        "gradients, float64",
        "losses, float32",
        "parameters, float32",
      ),
      tablefmt="github",
      floatfmt=".1e",
    )
  )
  print("largest: " + ", ".join(f"{max(row[i] for row in rows):.1e}" for i in (3, 4, 5)))


if __name__ == "__main__":
  main()
