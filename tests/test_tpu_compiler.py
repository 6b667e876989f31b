"""The real compiler for TPUs, without a TPU: programs that cannot run here compile and fit.

The compiler comes with `pip install -e '.[tpu]'`.
"""

import importlib

import jax
import pytest

from llm import config as config_lib
from llm.performance import hardware
from llm.training import experiment, plan, program
from tests.conftest import tiny

pytestmark = pytest.mark.tpu


@pytest.fixture(autouse=True)
def _no_programs_kept():
  """Programs for devices that are not here cannot be read back."""
  jax.config.update("jax_enable_compilation_cache", False)
  yield
  jax.config.update("jax_enable_compilation_cache", True)


def compiled(kind, topology, **overrides):
  """The text of the step of a small model."""
  config = tiny(
    kind,
    "text:nothing",
    model__dropout=0.0,
    model__width=256,
    model__mlp_dim=512,
    model__max_length=512,
    training__sequence_length=512,
    training__batch_size=8,
    mesh__data=-1,
    **overrides,
  )
  there = hardware.topology(topology, 1)
  made = program.explicit(experiment.without_data(config), there)
  mesh = hardware.mesh(config.mesh, there)
  step = program.traced_step(made, plan.of(made, mesh), mesh)
  return made, step.lower().compile().as_text()


@pytest.mark.parametrize("kind", ["gpt", "bert"])
@pytest.mark.parametrize(
  "heads, topology, context", [(4, "v5e:2x2", 1), (2, "v5p:2x2x1", 1), (2, "v6e:2x2", 2)]
)
def test_splash_attention_compiles_forward_and_backward(kind, heads, topology, context):
  """Head width 64 and 128, causal and full, and each device its part of the queries."""
  made, text = compiled(kind, topology, model__num_heads=heads, mesh__fsdp=2, mesh__context=context)
  assert made.config.model.attention == "splash"
  assert text.count("splash_mha_fwd") and text.count("splash_mha_dkv")


@pytest.mark.parametrize("topology, context", [("v5e:2x2", 1), ("v6e:2x2", 2)])
@pytest.mark.parametrize("scan", ["scan", "unroll"])
def test_windows_compile_forward_and_backward(scan, topology, context):
  """Local and global layers have separate kernels; a device may have a part of the queries."""
  made, text = compiled(
    "bert",
    topology,
    model__name="modernbert",
    model__num_layers=4,
    model__global_every=3,
    model__window=128,
    model__scan=scan,
    objective__next_sentence=False,
    mesh__fsdp=2,
    mesh__context=context,
  )
  assert made.config.model.attention == "splash"
  calls = [line for line in text.splitlines() if "custom-call" in line]
  for kernel in ("splash_mha_fwd", "splash_mha_dkv"):
    assert sum(kernel in line for line in calls) >= 2, kernel


def report(name, topology, **changes):
  """Preflight of a config of configs/."""
  path, _, size = name.partition(":")
  config = importlib.import_module(f"configs.{path}").get_config(size)
  for key, value in changes.items():
    group, _, field = key.partition("__")
    config[group][field] = value
  config = config_lib.freeze(config)
  there = hardware.topology(topology, config.mesh.slices)
  return program.report(program.explicit(experiment.without_data(config), there), there)


def test_what_does_not_fit_is_said_and_what_is_advised_fits():
  changes = {"training__batch_size": 4096, "training__sequence_length": 256, "model__dropout": 0.0}
  found = report("pretrain_gpt:tiny", "v5e:2x2", **changes)
  assert not found["fits"] and "which has 15.75GiB" in found["reason"]
  assert any("mesh.fsdp=4" in line for line in found["advice"]) and any(
    "remat=full" in line for line in found["advice"]
  )
  changes |= {"mesh__fsdp": 4, "mesh__data": 1}
  changes |= {"model__remat": "full", "model__loss_chunk": 128}
  found = report("pretrain_gpt:tiny", "v5e:2x2", **changes)
  assert found["fits"] and found["memory"]["peak"] < 15.75 * 2**30


def test_175_billion_parameters_fit_512_chips():
  found = report("pretrain_gpt:175b", "v5p:8x8x8")
  assert found["tokens"] == 512 * 2048 and found["memory"]["peak"] <= 60 * 2**30
  assert found["mfu_bounds"][found["binding"]] >= 0.6
