"""Compiled programs compute what they say: beside float64 without a compiler, at odd sizes.

`.ci/run` runs this file under a second Python too, whose JAX is another. Programs are compiled as
those of users are, not as fast as tests/conftest.py has it.
"""

import contextlib
import dataclasses
import functools
import importlib.metadata
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm import environment
from llm.config import ModelConfig, OptimizerConfig
from llm.models import attention, layers, precision, resolve
from llm.objectives import base
from llm.training import experiment, optimizer, partition
from llm.training import step as step_lib

USERS = {}
if importlib.metadata.version("jaxlib").startswith("0.10."):
  USERS["xla_cpu_use_fusion_emitters"] = True
compiled_for_users = functools.partial(jax.jit, compiler_options=USERS)

ROWS, LENGTH, VOCABULARY = 5, 37, 131  # no multiples of 2, 3 or 128
OBJECTIVES = {
  "bert": "masked_lm",
  "gpt": "causal_lm",
  "llama": "causal_lm",
  "t5": "span_corruption",
}


@pytest.mark.parametrize("rows", [32_767, 32_769, 65_537])
def test_sums_of_many_rows(rows):
  """What jaxlib 0.10.2 has wrong (jax issue 39103)."""
  rng = np.random.default_rng(0)
  matrix, x = (
    rng.normal(size=(3, 3)).astype(np.float32),
    rng.normal(size=(rows, 3)).astype(np.float32),
  )
  sums = compiled_for_users(jax.vmap(lambda row: ((matrix @ row) ** 2).sum()))(x)
  np.testing.assert_allclose(sums, ((x.astype(np.float64) @ matrix.T) ** 2).sum(1), rtol=1e-5)


def batch_of(name: str) -> dict[str, np.ndarray]:
  """Two documents a row, of uneven lengths, and padding."""
  rng = np.random.default_rng(1)
  shape = (ROWS, LENGTH)
  tokens = rng.integers(0, VOCABULARY, shape).astype(np.int32)
  segments = np.where(np.arange(LENGTH) < 17, 1, np.where(np.arange(LENGTH) < 34, 2, 0))
  segments = np.tile(segments, (ROWS, 1)).astype(np.int32)
  positions = np.where(
    np.arange(LENGTH) < 17, np.arange(LENGTH), np.maximum(np.arange(LENGTH) - 17, 0)
  )
  positions = np.tile(positions, (ROWS, 1)).astype(np.int32)
  batch = {"tokens": tokens, "segments": segments, "positions": positions}
  weights = (rng.random(shape) < 0.7).astype(np.float32) * (segments > 0)
  if name == "bert":
    masked = np.tile(np.array([1, 5, 20, 31, 33], np.int32), (ROWS, 1))
    return batch | {
      "types": (segments == 2).astype(np.int32),
      "masked_positions": masked,
      "masked_targets": np.take_along_axis(tokens, masked, 1),
      "masked_weights": weights[:, [1, 5, 20, 31, 33]],
      "firsts": np.tile(np.array([0, 17], np.int32), (ROWS, 1)),
      "next_sentence": rng.integers(0, 2, (ROWS, 2)).astype(np.int32),
      "pair_weights": np.ones((ROWS, 2), np.float32),
    }
  if name == "t5":
    targets = rng.integers(0, VOCABULARY, (ROWS, 11)).astype(np.int32)
    own = np.tile(np.array([1] * 5 + [2] * 6, np.int32), (ROWS, 1))
    places = np.tile(np.array([*range(5), *range(6)], np.int32), (ROWS, 1))
    return batch | {
      "targets": targets,
      "decoder_tokens": np.roll(targets, 1, 1),
      "decoder_segments": own,
      "decoder_positions": places,
      "weights": weights[:, :11],
    }
  return batch | {"targets": np.roll(tokens, -1, 1), "weights": weights}


@functools.cache
def params_of(model) -> dict:
  batch = batch_of(model.backbone.config.name)
  return jax.jit(lambda: step_lib.init_params(model, batch, jax.random.key(0)))()


def one_step(name: str, dtype: str, compiled: bool) -> tuple[float, dict, dict]:
  """(loss, first moments, change of the parameters) of a step of AdamW.

  The first moments are a tenth of the gradients.
  """
  config = ModelConfig(
    name=name,
    num_layers=2,
    width=20,
    num_heads=2,
    mlp_dim=53,
    max_length=41,
    dropout=0.0,
    vocab_size=VOCABULARY,
    dtype=dtype,
    gated=name == "t5",
    init_std=0.3 if name != "t5" else 1.0,
  )
  objective = base.build(base.defaults(OBJECTIVES[name]))
  model, batch = experiment.build(objective, config), batch_of(name)
  with jax.enable_x64(False):  # else the draw itself would differ
    params = params_of(experiment.build(objective, dataclasses.replace(config, dtype="float32")))
  exact = jnp.float64 if dtype == "float64" else jnp.float32
  params = jax.tree.map(lambda x: jnp.asarray(np.asarray(x), exact), params)
  marks = partition.frozen_layers(params, "")
  trained, frozen = partition.split(params, marks)
  # With this epsilon, gradients that are zero but for rounding move nothing.
  adamw = optimizer.make(
    OptimizerConfig(
      epsilon=1e-2, schedule="constant", warmup_steps=0, learning_rate=0.1, grad_clip_norm=0.0
    ),
    trained,
    2,
    10,
  )
  state = step_lib.init_state(trained, frozen, adamw)
  before = {path: np.asarray(leaf) for path, leaf in trained.items()}

  def run(state):
    return step_lib.train_step(model, objective, adamw, marks, 1, state, batch, 0)

  with contextlib.nullcontext() if compiled else jax.disable_jit():
    state, metrics = (compiled_for_users(run) if compiled else run)(state)
  total, weight = next(value for key, value in metrics.items() if key.endswith("loss"))
  moments = {
    jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(leaf)
    for path, leaf in jax.tree_util.tree_leaves_with_path(state.opt_state)
  }
  moments = {path.partition("mu/")[2]: leaf for path, leaf in moments.items() if "mu/" in path}
  return (
    float(total / weight),
    moments,
    {path: np.asarray(leaf) - before[path] for path, leaf in state.trained.items()},
  )


def apart(found: dict, expected: dict) -> float:
  """The largest difference, relative to the largest value."""
  assert found.keys() == expected.keys() and found
  scale = max(np.abs(value).max() for value in expected.values())
  return max(np.abs(found[path] - expected[path]).max() for path in expected) / scale


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_compiled_step_is_the_step_in_float64_without_a_compiler(name):
  loss, moments, changes = one_step(name, "float32", compiled=True)
  rough_loss, rough_moments, _ = one_step(name, "bfloat16_operands", compiled=True)
  with jax.enable_x64(True):
    exact_loss, exact_moments, exact_changes = one_step(name, "float64", compiled=False)
  assert loss == pytest.approx(exact_loss, rel=1e-5)
  assert apart(moments, exact_moments) < 1e-5
  assert apart(changes, exact_changes) < 1e-4
  assert rough_loss == pytest.approx(exact_loss, rel=1e-2)
  assert 1e-5 < apart(rough_moments, exact_moments) < 5e-2  # bfloat16 has 8 bits


def test_bfloat16_operands_are_rounded_and_their_products_summed_in_float32():
  types = precision.TYPES["bfloat16_operands"]
  rng = np.random.default_rng(0)
  x, kernel, dy = (
    rng.normal(size=s).astype(np.float32) for s in ((2, 7, 1031), (1031, 5), (2, 7, 5))
  )

  def rounded(a):
    return np.asarray(jnp.asarray(a, jnp.bfloat16), np.float64)

  y, pull = jax.vjp(lambda x, k: layers.matmul(x, k, types), x, kernel)
  dx, dkernel = pull(dy)
  assert (y.dtype, dx.dtype, dkernel.dtype) == (jnp.float32,) * 3
  np.testing.assert_allclose(y, rounded(x) @ rounded(kernel), rtol=1e-4, atol=1e-4)
  np.testing.assert_allclose(dx, rounded(dy) @ rounded(kernel).T, rtol=1e-4, atol=1e-4)
  expected = rounded(x).reshape(14, -1).T @ rounded(dy).reshape(14, -1)
  np.testing.assert_allclose(dkernel, expected, rtol=1e-4, atol=1e-4)
  ones = layers.matmul(jnp.ones((1, 4096)), jnp.ones((4096, 1)), types)
  assert ones[0, 0] == 4096  # bfloat16 sums would stop at 256


def test_a_loop_over_tokens_reads_bfloat16_kernels_as_they_are_stored():
  """Copied to float32 before the loop, every token would read twice the bytes."""

  def write(x_1xI, kernel_OxI):
    def token(x_1xI):
      return x_1xI + layers.read_once(x_1xI, kernel_OxI)[:, :64]

    return jax.lax.while_loop(lambda x_1xI: x_1xI.sum() < 1e3, token, x_1xI)

  program = compiled_for_users(write).lower(jnp.ones((1, 64)), jnp.ones((96, 64), jnp.bfloat16))
  (loop,) = [line for line in program.compile().as_text().splitlines() if " while(" in line]
  assert "bf16[96,64]" in loop and "f32[96,64]" not in loop.replace("bf16[96,64]", "")


@pytest.mark.parametrize("groups", [1, 2, 6])
def test_gradients_of_attention_are_those_of_plain_products(groups):
  """Its products have gradients of their own; here JAX's beside them."""
  rng = np.random.default_rng(0)
  q, k, v, weights = (
    rng.normal(size=(2, 11, heads, 5)).astype(np.float32) for heads in (6, groups, groups, 6)
  )
  segments = np.tile(np.repeat([1, 2], [4, 7]).astype(np.int32), (2, 1))
  positions = np.tile(np.array([*range(4), *range(7)], np.int32), (2, 1))
  seen = attention.Visibility(segments, segments, positions, positions, True)

  def plain(q, k, v):
    k, v = (jnp.repeat(a, 6 // groups, axis=2) for a in (k, v))
    scores = jnp.einsum("BTHK,BSHK->BHTS", q, k) * 0.3
    scores = jnp.where(attention.mask_Bx1xTxS(seen), scores, -jnp.inf)
    return jnp.einsum("BHTS,BSHK->BTHK", jax.nn.softmax(scores), v)

  with jax.enable_x64(False):
    expected = jax.grad(lambda *qkv: (plain(*qkv) * weights).sum(), (0, 1, 2))(q, k, v)
    gradients = compiled_for_users(
      jax.grad(lambda *qkv: (attention.attend(*qkv, seen, scale=0.3) * weights).sum(), (0, 1, 2))
    )(q, k, v)
  for gradient, other in zip(gradients, expected):
    np.testing.assert_allclose(gradient, other, atol=2e-5)


def test_auto_takes_bfloat16_operands_only_where_they_are_faster(monkeypatch):
  speeds = {"float32": 200e9, "bfloat16_operands": 400e9}
  monkeypatch.setattr(precision, "product_speeds", lambda: speeds)
  monkeypatch.setattr(precision, "native_bfloat16", lambda: True)

  def taken(platform="cpu"):
    return resolve.resolved(ModelConfig(name="gpt"), 64, platform).dtype

  assert taken() == "bfloat16_operands" and taken("tpu") == "bfloat16"
  line = precision.explained("auto", "bfloat16_operands", "cpu")
  assert "200 GFLOP/s here, of bfloat16 operands at 400" in line
  speeds["bfloat16_operands"] = 210e9
  assert taken() == "float32"
  speeds["bfloat16_operands"] = 400e9
  monkeypatch.setattr(precision, "native_bfloat16", lambda: False)
  assert taken() == "float32"
  assert "no bfloat16 products" in precision.explained("auto", "float32", "cpu")
  assert "emulates" in precision.explained("bfloat16_operands", "bfloat16_operands", "cpu")


def test_speeds_are_measured_inside_a_trace_too():
  jax.jit(lambda x: x * precision._measured_speeds(64, 32, 1)["float32"])(1.0)


def test_a_machine_is_measured_once(monkeypatch, tmp_path):
  """A later run takes the types of the first, however busy the machine is."""
  monkeypatch.setenv("PRETUNE_CACHE", str(tmp_path))
  measured = []

  def measure():
    measured.append({"float32": 100.0 + len(measured), "bfloat16_operands": 300.0})
    return measured[-1]

  monkeypatch.setattr(precision, "_measured_speeds", measure)
  for _ in range(2):
    precision.product_speeds.cache_clear()  # as another process
    assert precision.product_speeds() == {"float32": 100.0, "bfloat16_operands": 300.0}
  assert len(measured) == 1
  precision.product_speeds.cache_clear()


def test_a_jax_that_computes_wrong_is_refused_in_one_line(monkeypatch, capsys):
  monkeypatch.setattr(environment.importlib.metadata, "version", lambda name: "0.10.2")
  with pytest.raises(ImportError, match="wrong numbers"):
    environment.prepare()
  monkeypatch.setattr(sys, "argv", ["-m"])
  with pytest.raises(SystemExit, match="2"):
    environment.prepare()
  (line,) = capsys.readouterr().err.splitlines()
  assert "jaxlib 0.10.2 computes wrong numbers" in line and "pip install" in line


@pytest.mark.parametrize("devices", ["many", "0", "-3", "1.5"])
def test_a_number_of_devices_that_is_none_is_one_line(devices):
  """In a process of its own: JAX reads the variable when it is imported."""
  run = subprocess.run(
    [sys.executable, "-m", "llm.predict", "--text=x"],
    capture_output=True,
    text=True,
    env={**os.environ, "JAX_NUM_CPU_DEVICES": devices},
  )
  assert run.returncode == 2
  assert run.stderr == f"error: JAX_NUM_CPU_DEVICES={devices!r} must be a number from 1 to 1024\n"
