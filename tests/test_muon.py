"""Muon: what it does to one matrix, which it sees, and that meshes and stops change nothing."""

import collections
import dataclasses
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from llm import models, sharding
from llm.checkpoints import manager
from llm.config import MeshConfig, OptimizerConfig
from llm.core import STACKED, UserError, flatten
from llm.models.architecture import head_width_of
from llm.performance import hlo
from llm.training import header, loop, optimizer
from tests.conftest import tiny
from tests.test_models import model_of, shapes_of
from tests.test_training import final_state, same

QUERY = "backbone/layers/attention/query/kernel"
OUT = "backbone/layers/attention/out/kernel"
UP = "backbone/layers/mlp/up/kernel"
SHAPES = {QUERY: (4, 16, 4, 4), OUT: (4, 4, 4, 16), UP: (4, 16, 32)}
REST = {"backbone/token/embedding": (32, 16), "backbone/layers/mlp_norm/scale": (4, 16)}
# Without clipping, warm-up or decay, so that an update is the rate times what Muon makes.
PLAIN = OptimizerConfig(
  name="muon",
  learning_rate=0.1,
  schedule="constant",
  warmup_steps=0,
  weight_decay=0.0,
  grad_clip_norm=0.0,
)


def draw(seed: int, shapes=None) -> dict[str, jax.Array]:
  rng = np.random.default_rng(seed)
  shapes = shapes or {**SHAPES, **REST}
  return {path: jnp.asarray(rng.normal(size=s), jnp.float32) for path, s in shapes.items()}


def updates_of(config: OptimizerConfig, params: dict, grads: list[dict]) -> list[dict]:
  """The updates that the gradients lead to, at one place."""
  made = optimizer.make(config, params, 4, 10)
  state, out = made.init(params), []
  for each in grads:
    updates, state = made.update(each, state, params)
    out.append(updates)
  return out


@pytest.mark.parametrize("rows, columns", [(24, 24), (16, 48), (48, 16)])
def test_a_matrix_becomes_its_polar_factor(rows, columns):
  """Singular vectors stay; singular values that differ 20-fold come to 0.68 to 1.14."""
  drawn = np.random.default_rng(0).normal(size=(rows, columns))
  left, values, right = np.linalg.svd(drawn, full_matrices=False)
  momentum = (left * np.linspace(0.1, 2, len(values))) @ right
  stacked = {UP: jnp.asarray(momentum, jnp.float32)[None]}
  found = np.asarray(optimizer.orthogonalised(stacked)[UP][0])
  inside = left.T @ (found / (0.2 * max(rows, columns) ** 0.5)) @ right.T
  assert 0.65 < np.diag(inside).min() and np.diag(inside).max() < 1.2
  assert np.abs(inside - np.diag(np.diag(inside))).max() < 1e-4
  assert np.sqrt(np.mean(found**2)) == pytest.approx(0.2, rel=0.2)


def test_layers_and_heads_are_seen_as_matrices():
  """A stack with head axes is, layer by layer, its matrices of inputs x outputs."""
  momenta = draw(1, SHAPES)
  found = optimizer.orthogonalised(momenta)
  for path, shape in SHAPES.items():
    outputs = 16 if path == OUT else -1
    inputs = -1 if path == OUT else 16
    for layer in range(4):
      alone = optimizer.orthogonalised({UP: momenta[path][layer].reshape(1, inputs, outputs)})[UP]
      expected = np.asarray(alone).reshape(shape[1:])
      np.testing.assert_allclose(found[path][layer], expected, atol=1e-5)


def test_updates_follow_nesterovs_momentum():
  params, grads = draw(0), [draw(1), draw(2)]
  (_, second), config = updates_of(PLAIN, params, grads), dataclasses.replace(PLAIN, name="adamw")
  trace = {path: grads[1][path] + 0.95 * grads[0][path] for path in SHAPES}
  looked_ahead = {path: grads[1][path] + 0.95 * trace[path] for path in SHAPES}
  for path, expected in optimizer.orthogonalised(looked_ahead).items():
    np.testing.assert_allclose(second[path], -0.1 * expected, atol=1e-5)
  rest = {path: params[path] for path in REST}
  adamw = updates_of(config, rest, [{path: g[path] for path in REST} for g in grads])[1]
  for path, expected in adamw.items():
    np.testing.assert_array_equal(second[path], expected)


def test_decay_multipliers_and_the_type_of_moments_are_those_of_adamw():
  params, grads = draw(0), [draw(1)]
  plain, shorter = updates_of(PLAIN, params, grads)[0], (r"layers/1/.*up=0.5",)
  config = dataclasses.replace(PLAIN, weight_decay=0.5, no_decay="query", multipliers=shorter)
  found = updates_of(config, params, grads)[0]
  np.testing.assert_array_equal(found[QUERY], plain[QUERY])
  np.testing.assert_allclose(found[OUT], plain[OUT] - 0.1 * 0.5 * params[OUT], atol=1e-6)
  factors = np.array([1, 0.5, 1, 1])[:, None, None]
  np.testing.assert_allclose(found[UP], factors * (plain[UP] - 0.1 * 0.5 * params[UP]), atol=1e-6)
  narrow = dataclasses.replace(PLAIN, moment_dtype="bfloat16")
  state = optimizer.make(narrow, params, 4, 10).init(params)
  assert {str(x.dtype) for x in jax.tree.leaves(state[0]["muon"])} == {"bfloat16"}


@pytest.mark.parametrize("name", models.NAMES)
@pytest.mark.parametrize("rank", [0, 2])
def test_every_architecture_gives_its_matrices_and_its_state_a_place(name, rank):
  model = model_of(name, lora_rank=rank, lora_targets=".")
  params = flatten(shapes_of(model))
  for path, leaf in params.items():
    axes, last = optimizer.matrix_axes(path, leaf.ndim), path.rsplit("/", 1)[-1]
    is_matrix = STACKED in path and last in ("kernel", "lora_a", "lora_b")
    assert (axes is not None) == is_matrix, path
    if last == "kernel" and is_matrix:
      mixed = model.backbone.config.num_heads * head_width_of(model.backbone.config)
      inputs = 64 if "down" in path else mixed if "out" in path else 32
      assert np.prod([leaf.shape[axis] for axis in axes.reduction_axis]) == inputs, path
      outputs = np.prod([leaf.shape[axis] for axis in axes.output_axis])
      assert 3 * inputs * outputs == leaf.size, path
  mesh = sharding.make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
  state = jax.eval_shape(optimizer.make(PLAIN, params, 3, 10).init, params)
  placed = sharding.shardings(state, mesh)[0]["muon"][0].trace
  for path, place in placed.items():
    assert place.spec == sharding.parameter_spec(path, params[path].ndim), path


def test_meshes_agree_and_no_product_of_newton_schulz_is_exchanged():
  params, grads = draw(0), [draw(1), draw(2)]
  expected = updates_of(PLAIN, params, grads)
  mesh = sharding.make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
  made = optimizer.make(PLAIN, params, 4, 10)
  with jax.set_mesh(mesh):
    place = sharding.shardings(params, mesh)
    state_place = sharding.shardings(jax.eval_shape(made.init, params), mesh)
    update = jax.jit(made.update, out_shardings=(place, state_place))
    params = jax.device_put(params, place)
    state = jax.jit(made.init, out_shardings=state_place)(params)
    for each, single in zip(grads, expected):
      each = jax.device_put(each, place)
      compiled = update.lower(each, state, params).compile()
      updates, state = compiled(each, state, params)
      for path, value in single.items():
        np.testing.assert_allclose(updates[path], value, atol=2e-6)
    exchanged = collections.Counter(
      (one.kind, one.axes) for one in hlo.collectives(compiled.as_text(), mesh)
    )
  # Four layers over fsdp x tensor, there and back, for each of three stacks: one exchange an axis.
  assert exchanged == {("all-to-all", ("fsdp",)): 6, ("all-to-all", ("tensor",)): 6}


def test_an_axis_that_does_not_divide_the_layers_holds_copies():
  with jax.set_mesh(sharding.make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))):
    assert sharding.layer_by_layer(QUERY, (3, 16, 4, 4))[-1] == P((), None, None, None)
    assert sharding.layer_by_layer(QUERY, (6, 16, 4, 4))[-1] == P("fsdp", None, None, None)
    spread = P(("fsdp", "tensor", "data"), None, None, None)
    assert sharding.layer_by_layer(QUERY, (8, 16, 4, 4))[-1] == spread


def test_muon_on_parameters_that_are_no_matrices_is_one_line():
  with pytest.raises(UserError, match="optimizer.name=muon: no trained parameter is a matrix"):
    optimizer.make(PLAIN, draw(0, REST), 4, 10)


def test_a_run_continued_on_a_mesh_is_the_run_uninterrupted(corpus, tmp_path):
  """From the checkpoint at step 2 of 4, in the decay of the schedule."""
  config = tiny(
    "gpt",
    f"text:{corpus}",
    optimizer__name="muon",
    optimizer__schedule="wsd",
    optimizer__decay_share=0.5,
    optimizer__warmup_steps=1,
    mesh__data=2,
    mesh__fsdp=2,
    mesh__tensor=2,
    training__steps=4,
    training__save_every=2,
  )
  loop.train(config, tmp_path / "whole")
  shutil.copytree(tmp_path / "whole", tmp_path / "parts")
  shutil.rmtree(tmp_path / "parts" / "checkpoints" / "4")
  said = []
  loop.train(config, tmp_path / "parts", say=said.append)
  assert any("resumed from" in str(line) for line in said)
  step, params, state = final_state(tmp_path / "parts")
  assert step == 4 and same((step, params, state), final_state(tmp_path / "whole"))
  assert any(np.abs(x).max() > 0 for x in jax.tree.leaves(state[1]["muon"]))


@pytest.mark.parametrize("step, told", [(50, "stays 0.001"), (99, "is 0.001 instead of 0.0001")])
def test_a_longer_run_says_what_becomes_of_the_rate(step, told, monkeypatch):
  """Of wsd: nothing before the decay, and from within it the way back to the full rate."""
  settings = OptimizerConfig(schedule="wsd", warmup_steps=5, learning_rate=1e-3)
  config = dataclasses.replace(tiny("gpt", "text:x"), optimizer=settings)
  config = dataclasses.replace(config, training=dataclasses.replace(config.training, steps=200))
  shorter = dataclasses.replace(config, training=dataclasses.replace(config.training, steps=100))
  planned = manager.Description(50, shorter, {}, manager.Best(), {}, {}, {}, {}, 0.0)
  monkeypatch.setattr(manager, "describe", lambda step: planned)
  said = []
  header.show_new_length(pathlib.Path("checkpoints"), config, step, said.append)
  assert f"the learning rate of step {step} {told}" in said[0]
