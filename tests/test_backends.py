"""The kernels for TPUs (interpreted here) and GPUs equal the reference and leak nothing.

Nothing passes between packed documents.
"""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm import sharding
from llm.config import MeshConfig, ModelConfig
from llm.core import UserError
from llm.models import attention, cudnn, resolve, splash
from llm.performance import hardware
from llm.training import experiment, loop, program
from tests.conftest import tiny

B, T, H, K = 4, 256, 4, 32


def inputs(kv_heads, seed=0):
  """q, k, v, segments, positions; some rows are padded."""
  rng = np.random.default_rng(seed)
  q, k, v = (
    jnp.array(rng.normal(size=(B, T, heads, K)), jnp.float32) for heads in (H, kv_heads, kv_heads)
  )
  segments = np.repeat([[1, 2, 3, 0], [1, 1, 2, 2], [1, 1, 1, 1], [1, 2, 2, 0]], T // 4, axis=1)
  positions = np.array(
    [[i - np.flatnonzero(row == row[i])[0] for i in range(T)] for row in segments]
  )
  return q, k, v, jnp.array(segments, jnp.int32), jnp.array(positions, jnp.int32)


@pytest.mark.parametrize("causal, kv_heads", [(True, 2), (False, 4)])
def test_it_is_the_reference_forward_and_backward(causal, kv_heads):
  q, k, v, segments, positions = inputs(kv_heads)
  seen = attention.Visibility(segments, segments, positions, positions, causal)
  weights = jnp.cos(jnp.arange(q.size)).reshape(q.shape)

  def both(attend):
    return jax.jit(jax.value_and_grad(lambda *qkv: (attend(*qkv) * weights).sum(), (0, 1, 2)))(
      q, k, v
    )

  expected = both(lambda *qkv: attention.attend(*qkv, seen, scale=K**-0.5))
  found = both(
    lambda *qkv: splash.attend(*qkv, segments, causal=causal, scale=K**-0.5, interpret=True)
  )
  # Each device has its rows, heads and queries.
  with jax.set_mesh(sharding.make_mesh(MeshConfig(data=2, tensor=2, context=2))):
    apart = both(
      lambda *qkv: splash.attend(*qkv, segments, causal=causal, scale=K**-0.5, interpret=True)
    )
    one_row = splash.attend(
      q[:1], k[:1], v[:1], segments[:1], causal=causal, scale=K**-0.5, interpret=True
    )
  np.testing.assert_allclose(one_row, attention.attend(q, k, v, seen, scale=K**-0.5)[:1], atol=2e-5)
  for one in (found, apart):
    for ours, theirs in zip(jax.tree.leaves(one), jax.tree.leaves(expected)):
      np.testing.assert_allclose(ours, theirs, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("causal", [True, False])
def test_documents_that_share_a_row_know_nothing_of_each_other(causal):
  q, k, v, segments, _ = inputs(4)
  run = jax.jit(
    lambda *qkv: splash.attend(*qkv, segments, causal=causal, scale=K**-0.5, interpret=True)
  )
  other = (segments == 2)[..., None, None]
  moved = run(*(jnp.where(other, x + 3, x) for x in (q, k, v)))
  before = run(q, k, v)
  rest = np.asarray(segments != 2)
  assert (np.asarray(moved)[rest] == np.asarray(before)[rest]).all() and (moved != before).any()
  if causal:  # nothing later is seen
    at = T // 4 + 10
    assert (
      np.asarray(run(q, k.at[:, at:].add(1), v.at[:, at:].add(1)))[:, :at]
      == np.asarray(before)[:, :at]
    ).all()


GPT = ModelConfig(name="gpt", dropout=0.0, dtype="bfloat16", width=128, num_heads=2)


@pytest.mark.parametrize(
  "backend, config, length, context, why",
  [
    ("splash", ModelConfig(name="t5"), 128, 1, "a bias of positions"),
    ("cudnn", ModelConfig(name="t5"), 128, 1, "a bias of positions"),
    ("splash", dataclasses.replace(GPT, dropout=0.1), 128, 1, "dropout of attention weights"),
    ("splash", GPT, 256, 1, ""),
    ("splash", GPT, 256, 2, ""),
    ("splash", GPT, 384, 2, "a length of 384 on 2 devices, no multiple of 128 on each"),
    ("splash", GPT, 257, 2, "a length of 257 on 2 devices, no multiple of 128 on each"),
    ("cudnn", GPT, 201, 1, "an odd length, 201"),
    (
      "cudnn",
      dataclasses.replace(GPT, num_heads=32),
      200,
      1,
      "a head width of 4, no multiple of 8 up to 128",
    ),
    ("cudnn", GPT, 200, 1, ""),
    ("cudnn", GPT, 256, 2, "a context axis"),
    ("cudnn", dataclasses.replace(GPT, dtype="float32"), 64, 1, "float32"),
    (
      "cudnn",
      dataclasses.replace(GPT, num_heads=1, width=256),
      64,
      1,
      "a head width of 256, no multiple of 8 up to 128",
    ),
  ],
)
def test_where_one_cannot_serve_is_said(backend, config, length, context, why):
  assert resolve.cannot(backend, config, length, context, True) == why
  asked = dataclasses.replace(config, attention=backend)
  with jax.set_mesh(
    sharding.make_mesh(MeshConfig(data=1, context=context), jax.devices()[:context])
  ):
    if why:
      with pytest.raises(UserError, match=f"attention={backend} cannot serve {why}"):
        resolve.resolved(asked, length, resolve.PLATFORMS[backend], context)
    else:
      there = resolve.resolved(asked, length, resolve.PLATFORMS[backend], context)
      assert there.attention == backend
    assert resolve.resolved(config, length, "cpu", context).attention == "reference"


@pytest.mark.parametrize("backend, platform", [("splash", "TPU"), ("cudnn", "GPU")])
def test_it_is_refused_on_another_platform(backend, platform, corpus, tmp_path):
  config = tiny("gpt", f"text:{corpus}", model__attention=backend, model__dropout=0.0)
  with pytest.raises(UserError, match=f"runs on a {platform} alone, this is a CPU"):
    loop.train(config, tmp_path, say=lambda *_: None)
  with pytest.raises(UserError, match=f"runs on a {platform} alone, this is a CPU"):
    program.explicit(experiment.without_data(config), hardware.topology("cpu:8", 1))


@pytest.mark.parametrize("causal, kv_heads", [(True, 2), (False, 4)])
def test_what_cudnn_is_asked_is_the_reference(causal, kv_heads):
  """In JAX's own implementation, the same call has the reference's mask, scale and shared heads."""
  q, k, v, segments, positions = inputs(kv_heads)
  seen = attention.Visibility(segments, segments, positions, positions, causal)
  np.testing.assert_allclose(
    cudnn.attend(q, k, v, seen, scale=0.3, implementation="xla"),
    attention.attend(q, k, v, seen, scale=0.3),
    atol=2e-5,
  )


@pytest.mark.gpu
@pytest.mark.parametrize("causal, kv_heads", [(True, 2), (False, 4)])
def test_cudnn_is_the_reference_forward_and_backward(causal, kv_heads):
  q, k, v, segments, positions = (
    x if x.dtype == jnp.int32 else x.astype(jnp.bfloat16) for x in inputs(kv_heads)
  )
  seen = attention.Visibility(segments, segments, positions, positions, causal)

  def both(attend):
    return jax.jit(
      jax.value_and_grad(
        lambda *qkv: attend(*qkv, seen, scale=K**-0.5).astype(jnp.float32).var(), (0, 1, 2)
      )
    )

  for ours, theirs in zip(
    *(jax.tree.leaves(both(attend)(q, k, v)) for attend in (cudnn.attend, attention.attend))
  ):
    np.testing.assert_allclose(
      ours.astype(jnp.float32), theirs.astype(jnp.float32), atol=2e-2 * float(jnp.abs(theirs).max())
    )


@pytest.mark.gpu
def test_cudnn_serves_a_step_on_a_mesh(corpus, tmp_path):
  """All devices that there are, data and fsdp; losses as those of the reference, in bfloat16."""
  losses = {}
  for backend in ("cudnn", "reference"):
    config = tiny(
      "gpt",
      f"text:{corpus}",
      model__attention=backend,
      model__dropout=0.0,
      model__width=64,
      model__dtype="bfloat16",
      mesh__fsdp=2 if jax.device_count() % 2 == 0 else 1,
      training__batch_size=8 * jax.device_count(),
    )
    loop.train(config, tmp_path / backend, say=lambda *_: None)
    lines = (tmp_path / backend / "metrics.jsonl").read_text().splitlines()
    losses[backend] = [json.loads(line)["loss"] for line in lines]
  np.testing.assert_allclose(losses["cudnn"], losses["reference"], rtol=2e-2)


@pytest.mark.gpu
@pytest.mark.parametrize("causal", [True, False])
def test_cudnn_leaks_nothing(causal):
  q, k, v, segments, positions = (
    x if x.dtype == jnp.int32 else x.astype(jnp.bfloat16) for x in inputs(4)
  )

  def run(*qkv):
    return cudnn.attend(
      *qkv, attention.Visibility(segments, segments, positions, positions, causal), scale=K**-0.5
    )

  other = (segments == 2)[..., None, None]
  moved, before = run(*(jnp.where(other, x + 3, x) for x in (q, k, v))), run(q, k, v)
  rest = np.asarray(segments != 2)
  assert (np.asarray(moved)[rest] == np.asarray(before)[rest]).all() and (moved != before).any()
