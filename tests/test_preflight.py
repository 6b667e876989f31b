"""Preflight: counts do not depend on how a program is written down, and say what a formula says."""

import dataclasses
import json
import re

import jax
import numpy as np
import pytest

from llm import sharding
from llm.config import MeshConfig
from llm.core import UserError
from llm.performance import flops, hardware, hlo
from llm.training import experiment, plan, program
from tests.conftest import tiny

B, T = 16, 64


def traced(kind, mesh=MeshConfig(data=2, fsdp=2, tensor=2), **overrides):
  """(experiment, mesh, the step traced) of a small model; no data is there."""
  shape = dict(
    model__dropout=0.0,
    model__num_layers=3,
    model__width=64,
    model__num_heads=4,
    model__mlp_dim=128,
    tokenizer__sentinels=20,
    training__batch_size=B,
    training__sequence_length=T,
  )
  made = experiment.without_data(
    dataclasses.replace(tiny(kind, "text:nothing", **(shape | overrides)), mesh=mesh)
  ).on_platform("cpu")
  on = sharding.make_mesh(mesh)
  return made, on, program.traced_step(made, plan.of(made, on), on)


def traffic(step, mesh):
  """(kind, axes) -> bytes that a device sends in a step."""
  found = {}
  for one in hlo.collectives(step.lower().compile().as_text(), mesh):
    key = one.kind, one.axes
    found[key] = found.get(key, 0) + one.sent * one.times
  return found


@pytest.mark.parametrize("kind", ["gpt", "bert", "t5"])
def test_scanned_and_unrolled_layers_count_the_same(kind):
  scanned, unrolled = (traced(kind, model__scan=how) for how in ("scan", "unroll"))
  counts = [flops.dot_flops(step.jaxpr.jaxpr) for _, _, step in (scanned, unrolled)]
  assert counts[0] == counts[1] > 0
  once, often = (traffic(step, mesh) for _, mesh, step in (scanned, unrolled))
  gathers = [
    {key: sent for key, sent in found.items() if key[0] == "all-gather"} for found in (once, often)
  ]
  assert gathers[0] == gathers[1] and gathers[0]
  # Sums of gradients are combined in other ways: a loop must add up each layer's before it goes on.
  assert once["all-reduce", ("tensor",)] == pytest.approx(often["all-reduce", ("tensor",)], rel=0.1)
  assert sum(once.values()) == pytest.approx(sum(often.values()), rel=0.15)


@pytest.mark.parametrize("remat, times", [("none", 3), ("full", 4)])
def test_flops_are_those_of_the_formula(remat, times):
  """6 N a token (Kaplan et al. 2020, section 2.1) and 12 L T D for attention.

  Recomputed blocks count again, without their last product.
  """
  made, _, step = traced("gpt", model__remat=remat)
  cfg, tokens = made.config.model, B * T
  block = 2 * (4 * cfg.width**2 + 2 * cfg.width * cfg.mlp_dim) + 4 * T * cfg.width
  head = 2 * cfg.width * 384  # 262 bytes and special pieces, padded to a multiple of 128
  expected = tokens * (times * cfg.num_layers * block + 3 * head)
  # Nothing needs what the last product of a block gave, nor what the attention gave.
  if remat == "full":
    expected -= tokens * cfg.num_layers * 2 * cfg.width * cfg.mlp_dim
  assert flops.dot_flops(step.jaxpr.jaxpr) == pytest.approx(expected, rel=1e-3)


def test_no_whole_stack_no_logits_and_no_batch_is_gathered():
  """On fsdp x tensor, one layer's weights may be gathered over fsdp.

  Stacked arrays, logits, moments and activations may not.
  """
  made, mesh, step = traced(
    "gpt", MeshConfig(data=1, fsdp=4, tensor=2), model__num_layers=6, model__scan="scan"
  )
  exchanges = hlo.collectives(step.lower().compile().as_text(), mesh)
  gathers = [one for one in exchanges if one.kind == "all-gather"]
  layer, logits = 64 * 128 * 4, B * T * 384 * 4 // 8
  assert gathers and all("fsdp" in one.axes for one in gathers if one.sent > 20_000)
  for one in gathers:
    dims = [int(n) for n in re.search(r"\[([\d,]*)\]", one.shape)[1].split(",") if n]
    assert not (len(dims) >= 3 and dims[0] == 6), one  # a stack, or a moment of one
    # The logits of the batch; the table alone is as large.
    assert np.prod(dims) * 4 < logits or dims[-1] == 64, one
    assert not (B in dims and T in dims), one  # activations of the whole batch
  assert max(one.sent for one in gathers if one.times > 1) <= layer


@pytest.mark.parametrize(
  "text, group",
  [
    ("replica_groups={{0,2},{1,3}}, x", [0, 2]),
    ("replica_groups=[2,4]<=[8], x", [0, 1, 2, 3]),
    ("replica_groups=[4,2]<=[2,4]T(1,0), x", [0, 4]),
    ("replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_0'}, x", [0, 4]),
    ("source_target_pairs={{0,1},{1,2}}", [0, 1]),
    ("replica_groups=mesh['a'=1,'b'=4,'c'=2], device_ids=([4,2]T(1,0)) {'b'}, x", [0, 1, 4, 5]),
    ("replica_groups=mesh['a'=2,'b'=1,'c'=4], device_ids=(0,4,1,5,2,6,3,7) {'a'}, x", [0, 2]),
  ],
)
def test_groups_are_read_in_every_way_that_they_are_written(text, group):
  assert sorted(hlo._group(text)) == group


def test_loops_count_as_often_as_they_run():
  def nested(x):
    def inner(c, _):
      return (c @ c, None)

    def outer(c, _):
      return (jax.lax.scan(inner, c, None, length=5)[0] @ c, None)

    return jax.lax.scan(outer, x, None, length=7)[0]

  assert flops.dot_flops(jax.make_jaxpr(nested)(np.ones((8, 8)))) == (7 * 5 + 7) * 2 * 8**3
  text = jax.jit(nested).lower(np.ones((8, 8), np.float32)).compile().as_text()
  assert sorted(hlo._times(*hlo._computations(text)).values())[-1] >= 35


def test_a_loop_that_the_compiler_unrolled_counts_as_often_as_it_runs():
  """The TPU's compiler writes a product that gathers as it goes in this way.

  One counter of several goes from 0 to 8 by twos.
  """
  text = """
%body (arg: (f32[4], u32[])) -> (f32[4], u32[]) {
  %arg = (f32[4]{0}, u32[]) parameter(0)
  %x = f32[4]{0} get-tuple-element(%arg), index=0
  %counter = u32[] get-tuple-element(%arg), index=1
  %two = u32[] constant(2)
  %next = u32[] add(%counter, %two)
  %moved = f32[4]{0} collective-permute(%x), channel_id=1, \
source_target_pairs={{0,1},{1,2},{2,3},{3,0}}
  ROOT %out = (f32[4]{0}, u32[]) tuple(%moved, %next)
}

%condition (arg.1: (f32[4], u32[])) -> pred[] {
  %arg.1 = (f32[4]{0}, u32[]) parameter(0)
  %counted = u32[] get-tuple-element(%arg.1), index=1
  %limit = u32[] constant(8)
  ROOT %less = pred[] compare(%counted, %limit), direction=LT
}

ENTRY %main (start: (f32[4], u32[])) -> (f32[4], u32[]) {
  %start = (f32[4]{0}, u32[]) parameter(0)
  ROOT %loop = (f32[4]{0}, u32[]) while(%start), condition=%condition, body=%body
}
"""
  (found,) = hlo.collectives(text, sharding.make_mesh(MeshConfig(data=4), jax.devices()[:4]))
  assert (found.kind, found.times, found.sent) == ("collective-permute", 4, 16)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["bert", "gpt", "t5"])
def test_the_compiler_counts_little_more(kind):
  """What is no matrix product is 0 to 5% at width 512."""
  _, _, step = traced(
    kind,
    MeshConfig(data=8),
    model__width=512,
    model__num_heads=8,
    model__mlp_dim=2048,
    model__num_layers=2,
    model__scan="unroll",
    model__max_length=256,
    training__sequence_length=256,
    training__batch_size=8,
  )
  a_device = flops.dot_flops(step.jaxpr.jaxpr) / 8
  assert 1.0 <= step.lower().compile().cost_analysis()["flops"] / a_device <= 1.05


@pytest.mark.parametrize(
  "typed, name",
  [
    ("v5p-1024", "v5p:8x8x8"),
    ("v6e-256", "v6e:16x16"),
    ("v5litepod-16", "v5e:4x4"),
    ("v5p-8", "v5p:2x2x1"),
    ("v4-32", "v4:2x2x4"),
    ("v7x:2x2x1", "tpu7x:2x2x1"),
    ("V5E:4x4", "v5e:4x4"),
  ],
)
def test_topologies_by_the_names_that_people_type(typed, name):
  assert hardware._parsed(typed) == name


@pytest.mark.parametrize(
  "typed, message",
  [
    ("gpu:8", "compiled on that GPU alone"),
    ("H100:8", "compiled on that GPU alone"),
    ("l4", "compiled on that GPU alone"),
    ("v9x:4", "is not known: expected a TPU version"),
    ("v5e:4x4x4", "v5e has 2 dimensions"),
    ("v5e-24", "no power of two"),
    ("", "is not known"),
  ],
)
def test_topologies_that_there_are_not(typed, message):
  with pytest.raises(UserError, match=message):
    hardware.topology(typed, 1)


def test_the_report_adds_up():
  made, mesh, _ = traced("gpt")
  found = program.report(made, hardware.Topology("cpu:8", tuple(mesh.devices.ravel()), None))
  memory = found["memory"]
  assert (
    sum(size for kind, size in memory.items() if kind != "peak") == memory["peak"]
    and found["bounds"] == {}
  )
  held = (
    sum(
      np.prod(leaf.shape)
      for leaf in jax.tree.leaves(
        jax.eval_shape(lambda: made.model.init(jax.random.key(0), made.one_row(), train=False))
      )
    )
    * 4
  )
  assert (
    held / 8 < memory["parameters"] < held
    and memory["optimizer state"] > 1.9 * memory["parameters"]
  )
  json.dumps(found)
