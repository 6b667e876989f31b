"""The kernel for TPUs, interpreted here: it is the reference, and nothing leaks between packed documents."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm import sharding
from llm.config import MeshConfig, ModelConfig
from llm.core import UserError
from llm.models import attention, splash, transformer
from llm.training import loop
from tests.conftest import tiny

B, T, H, K = 4, 256, 4, 32


def inputs(kv_heads, seed=0):
  """q, k, v, segments, positions; some rows are padded."""
  rng = np.random.default_rng(seed)
  q, k, v = (jnp.array(rng.normal(size=(B, T, heads, K)), jnp.float32) for heads in (H, kv_heads, kv_heads))
  segments = np.repeat([[1, 2, 3, 0], [1, 1, 2, 2], [1, 1, 1, 1], [1, 2, 2, 0]], T // 4, axis=1)
  positions = np.array([[i - np.flatnonzero(row == row[i])[0] for i in range(T)] for row in segments])
  return q, k, v, jnp.array(segments, jnp.int32), jnp.array(positions, jnp.int32)


@pytest.mark.parametrize("causal, kv_heads", [(True, 2), (False, 4)])
def test_it_is_the_reference_forward_and_backward(causal, kv_heads):
  q, k, v, segments, positions = inputs(kv_heads)
  seen = attention.Visibility(segments, segments, positions, positions, causal)
  weights = jnp.cos(jnp.arange(q.size)).reshape(q.shape)

  def both(attend):
    return jax.jit(jax.value_and_grad(lambda *qkv: (attend(*qkv) * weights).sum(), (0, 1, 2)))(q, k, v)
  expected = both(lambda *qkv: attention.attend(*qkv, seen, scale=K ** -0.5))
  found = both(lambda *qkv: splash.attend(*qkv, segments, causal=causal, scale=K ** -0.5, interpret=True))
  with jax.set_mesh(sharding.make_mesh(MeshConfig(data=2, tensor=2), jax.devices()[:4])):   # each device its rows and heads
    apart = both(lambda *qkv: splash.attend(*qkv, segments, causal=causal, scale=K ** -0.5, interpret=True))
    one_row = splash.attend(q[:1], k[:1], v[:1], segments[:1], causal=causal, scale=K ** -0.5, interpret=True)
  np.testing.assert_allclose(one_row, attention.attend(q, k, v, seen, scale=K ** -0.5)[:1], atol=2e-5)
  for one in (found, apart):
    for ours, theirs in zip(jax.tree.leaves(one), jax.tree.leaves(expected)):
      np.testing.assert_allclose(ours, theirs, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("causal", [True, False])
def test_documents_that_share_a_row_know_nothing_of_each_other(causal):
  q, k, v, segments, _ = inputs(4)
  run = jax.jit(lambda *qkv: splash.attend(*qkv, segments, causal=causal, scale=K ** -0.5, interpret=True))
  other = (segments == 2)[..., None, None]
  moved = run(*(jnp.where(other, x + 3, x) for x in (q, k, v)))
  before = run(q, k, v)
  rest = np.asarray(segments != 2)
  assert (np.asarray(moved)[rest] == np.asarray(before)[rest]).all() and (moved != before).any()
  if causal:   # nothing later is seen
    at = T // 4 + 10
    assert (np.asarray(run(q, k.at[:, at:].add(1), v.at[:, at:].add(1)))[:, :at] == np.asarray(before)[:, :at]).all()


@pytest.mark.parametrize("config, length, why", [
    (ModelConfig(name="t5"), 128, "T5's position bias"), (ModelConfig(name="gpt", dropout=0.1), 128, "dropout of attention weights"),
    (ModelConfig(name="gpt", dropout=0.0), 200, "a length of 200, no multiple of 128"), (ModelConfig(name="gpt", dropout=0.0), 256, "")])
def test_where_it_cannot_serve_is_said(config, length, why):
  import dataclasses
  assert transformer.splash_cannot(config, length, True) == why
  asked = dataclasses.replace(config, attention="splash")
  if why:
    with pytest.raises(UserError, match="attention=splash cannot serve"):
      transformer.attention_backend(asked, length, True)
  else:
    assert transformer.attention_backend(asked, length, True) == "splash"
  assert transformer.attention_backend(config, length, True) == "reference"   # this is no TPU


def test_it_is_refused_where_there_is_no_tpu(corpus, tmp_path):
  config = tiny("gpt", f"text:{corpus}", model__attention="splash", model__dropout=0.0)
  with pytest.raises(UserError, match="runs on TPUs alone"):
    loop.train(config, tmp_path, say=lambda *_: None)
