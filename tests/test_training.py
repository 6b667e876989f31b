"""Steps: the same on every mesh and under accumulation; resuming is exact; stopping is clean."""

import dataclasses
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import psutil
import pytest

from llm import config as config_lib
from llm import sharding, storage
from llm.checkpoints import manager
from llm.config import MeshConfig, OptimizerConfig
from llm.core import UserError, flatten
from llm.objectives import base
from llm.performance import flops, hardware
from llm.runs import metrics
from llm.training import experiment, loop, optimizer, partition
from llm.training import plan as plan_lib
from llm.training import state as state_lib
from llm.training import step as step_lib
from tests.conftest import tiny
from tests.test_models import batch_of, model_of, params_of, shapes_of

ROOT = pathlib.Path(__file__).resolve().parents[1]
ALONE = MeshConfig(data=1)
SPLIT = MeshConfig(data=2, fsdp=2, tensor=2)
# (mesh, parts of a batch): each axis is split, alone or beside others, and so is the batch in time.
PLACES = [
  (MeshConfig(data=2), 4),
  (MeshConfig(data=8), 1),
  (SPLIT, 1),
  (MeshConfig(fsdp=2, tensor=2, context=2), 1),
]


def gradients(name, mesh_config, accum, dtype):
  """Loss and gradients of one batch with uneven masked counts on a mesh."""
  objective = base.build(base.defaults("masked_lm" if name == "bert" else "causal_lm"))
  model = model_of(name, dtype=dtype, scan="scan")  # which compiles fastest
  batch = batch_of(8)
  batch["masked_weights"] = (np.arange(24).reshape(8, 3) % 5 > 1).astype(np.float32)
  batch["weights"] = (
    np.random.default_rng(0).random((8, 16)) < np.linspace(0.1, 1, 8)[:, None]
  ).astype(np.float32)
  with jax.enable_x64(False):  # else the draw itself would differ
    params = params_of(model)
  params = jax.tree.map(lambda x: np.asarray(x, dtype), params)
  marks = partition.frozen_layers(params, "")

  class Catch:  # an optimizer that hands out what it is given
    init = staticmethod(lambda params: params)
    update = staticmethod(lambda grads, state, params: (jax.tree.map(jnp.zeros_like, grads), grads))

  size = int(
    np.prod(
      [
        s
        for s in (mesh_config.data, mesh_config.fsdp, mesh_config.tensor, mesh_config.context)
        if s > 0
      ]
    )
  )
  mesh = sharding.make_mesh(mesh_config, jax.devices()[: max(size, 1)])
  with jax.set_mesh(mesh):
    trained, frozen = partition.split(
      jax.device_put(params, sharding.shardings(params, mesh)), marks
    )
    state = step_lib.init_state(trained, frozen, Catch)
    placed = jax.device_put(batch, sharding.batch_sharding(mesh))
    state, found = step_lib.make_train_step(model, objective, lambda _: Catch, marks, accum, None)(
      state, placed, 0, None
    )
  return metrics.means([jax.device_get(found)])["loss"], {
    k: np.asarray(v) for k, v in state.opt_state.items()
  }


@pytest.mark.parametrize("name", ["bert", "gpt", "t5"])
def test_meshes_and_accumulation_agree(name):
  """Gradients in float64 to 1e-9, losses in float32 to 1e-5."""
  loss32, _ = gradients(name, ALONE, 1, "float32")
  assert gradients(name, SPLIT, 1, "float32")[0] == pytest.approx(loss32, rel=1e-5)
  with jax.enable_x64(True):
    loss, expected = gradients(name, ALONE, 1, "float64")
    assert loss == pytest.approx(loss32, rel=1e-5)
    for mesh, accum in PLACES:
      found = gradients(name, mesh, accum, "float64")[1]
      for path, value in expected.items():
        scale = max(np.abs(v).max() for v in expected.values())
        assert np.abs(found[path] - value).max() <= 1e-9 * scale, (path, mesh, accum)


def test_adamw_is_torchs_by_hand():
  """Three steps of one weight, worked out from the paper (algorithm 2, with bias correction)."""
  config = OptimizerConfig(
    learning_rate=0.1,
    schedule="constant",
    warmup_steps=0,
    weight_decay=0.5,
    grad_clip_norm=0.0,
    no_decay="bias$",
  )
  params = {"w/kernel": jnp.array([1.0]), "w/bias": jnp.array([1.0])}
  opt = optimizer.make(config, params, 1, 10)
  state = opt.init(params)
  expected = {k: 1.0 for k in params}
  m = v = 0.0
  for t, g in enumerate((0.3, -0.2, 0.7), 1):
    updates, state = opt.update({k: jnp.array([g]) for k in params}, state, params)
    params = jax.tree.map(jnp.add, params, updates)
    m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
    move = (m / (1 - 0.9**t)) / ((v / (1 - 0.999**t)) ** 0.5 + 1e-6)
    expected = {
      "w/kernel": expected["w/kernel"] - 0.1 * (move + 0.5 * expected["w/kernel"]),
      "w/bias": expected["w/bias"] - 0.1 * move,
    }
  assert {k: float(x[0]) for k, x in params.items()} == pytest.approx(expected, rel=1e-5)


def test_first_moments_may_be_kept_in_bfloat16():
  params = {"w/kernel": jnp.linspace(-1, 1, 64).reshape(8, 8)}
  states, moved = [], []
  for dtype in ("float32", "bfloat16"):
    opt = optimizer.make(
      OptimizerConfig(learning_rate=1e-4, moment_dtype=dtype, schedule="constant", warmup_steps=0),
      params,
      1,
      10,
    )
    state, now = opt.init(params), params
    for step in range(4):
      updates, state = opt.update({"w/kernel": jnp.cos(step + 3 * params["w/kernel"])}, state, now)
      now = jax.tree.map(jnp.add, now, updates)
    states.append(state)
    moved.append(now["w/kernel"] - params["w/kernel"])
  kinds = [{str(leaf.dtype) for leaf in jax.tree.leaves(state) if leaf.ndim} for state in states]
  assert kinds == [{"float32"}, {"float32", "bfloat16"}]
  assert 0 < np.abs(moved[0] - moved[1]).max() < 0.02 * np.abs(moved[0]).max()


def test_schedules():
  def rate(schedule, **keys):
    config = OptimizerConfig(schedule=schedule, **keys)
    return np.array([float(optimizer.schedule(config, 2.0, 10, 4)(s)) for s in range(11)])

  assert rate("linear") == pytest.approx([0.5, 1, 1.5, 2, 2, 5 / 3, 4 / 3, 1, 2 / 3, 1 / 3, 0])
  assert rate("cosine")[[3, 4, 7, 10]] == pytest.approx([2, 2, 1.1, 0.2])
  assert rate("constant")[[0, 4, 10]] == pytest.approx([0.5, 2, 2])
  assert rate("rsqrt")[[0, 4, 9]] == pytest.approx([2, 2, 4 / 3])
  # The last tenth of 10 steps is one of them; a share of 1 is all after the warm-up.
  assert rate("wsd") == pytest.approx([0.5, 1, 1.5, 2, 2, 2, 2, 2, 2, 2, 0])
  assert rate("wsd", decay_share=0.4) == pytest.approx([0.5, 1, 1.5, 2, 2, 2, 2, 1.5, 1, 0.5, 0])
  assert rate("wsd", decay_share=1.0) == pytest.approx(rate("linear"))
  t5 = optimizer.schedule(OptimizerConfig(schedule="rsqrt"), 0.01, 10**6, 10_000)
  # 1 / sqrt(max(step, 10,000))
  assert [float(t5(s)) for s in (0, 40_000)] == pytest.approx([0.01, 0.005])


def test_adafactor_sees_the_matrices_of_single_layers():
  """Two steps on stacked kernels with head dimensions are optax's own on each layer's matrix."""
  rng = np.random.default_rng(0)
  shapes = {
    "backbone/layers/attention/query/kernel": (2, 160, 4, 40),
    "backbone/layers/attention/out/kernel": (2, 4, 40, 160),
    "backbone/layers/mlp_norm/scale": (2, 160),
    "backbone/token/embedding": (128, 160),
  }

  def draw():
    return {k: jnp.asarray(rng.normal(size=s), jnp.float32) for k, s in shapes.items()}

  params, grads = draw(), [draw(), draw()]

  def alone(leaves):
    out = {}
    for path, leaf in leaves.items():
      rows = (-1, 160) if "out" in path else (160, -1)
      layers = leaf if "layers" in path else [leaf]
      out |= {
        f"{path}{i}": x.reshape(rows) if "kernel" in path else x for i, x in enumerate(layers)
      }
    return out

  config = OptimizerConfig(
    name="adafactor",
    learning_rate=0.01,
    schedule="constant",
    warmup_steps=0,
    weight_decay=0.0,
    grad_clip_norm=0.0,
  )
  ours, theirs = optimizer.make(config, params, 2, 10), optax.adafactor(0.01)
  their_params = alone(params)
  state, their_state = ours.init(params), theirs.init(their_params)
  for step in grads:
    updates, state = ours.update(step, state, params)
    expected, their_state = theirs.update(alone(step), their_state, their_params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), alone(updates), expected)
    params, their_params = (
      jax.tree.map(jnp.add, p, u) for p, u in ((params, updates), (their_params, expected))
    )
  moments = sum(x.size for x in jax.tree.leaves(state))
  assert moments < 0.05 * sum(x.size for x in params.values())  # factored, all of them


def test_multipliers_and_layer_decay_address_single_layers():
  leaves = flatten(params_of(model_of("gpt")))
  config = OptimizerConfig(layer_decay=0.5, multipliers=(r"layers/1/mlp=10.0",))
  found = optimizer.multipliers(config, leaves, 3)
  assert found["backbone/layers/mlp/up/kernel"].ravel().tolist() == [0.125, 2.5, 0.5]
  assert found["backbone/layers/attention/query/kernel"].ravel().tolist() == [0.125, 0.25, 0.5]
  assert found["backbone/token/embedding"] == 0.0625
  with pytest.raises(UserError, match="'nothing' matches no"):
    optimizer.multipliers(OptimizerConfig(multipliers=("nothing=2.0",)), leaves, 3)


def test_layers_keep_their_numbers_where_others_are_frozen():
  params = params_of(model_of("gpt"))
  masks = partition.frozen_layers(params, "layers/0/|embedding")
  trained, _ = partition.split(params, masks)
  config = OptimizerConfig(layer_decay=0.5, multipliers=(r"layers/2/mlp=10.0",))
  found = optimizer.multipliers(config, trained, 3, masks)
  assert found["backbone/layers/mlp/up/kernel"].ravel().tolist() == [0.25, 5.0]
  with pytest.raises(UserError, match="'layers/0/mlp' matches no"):
    optimizer.multipliers(OptimizerConfig(multipliers=("layers/0/mlp=2",)), trained, 3, masks)


def test_layer_decay_of_a_table_of_its_own_and_of_an_encoder_below():
  config = OptimizerConfig(layer_decay=0.5)
  leaves = flatten(params_of(model_of("t5", tied=False)))
  found = optimizer.multipliers(config, leaves, 3)
  assert found["backbone/output/embedding"] == 1
  stacks = {path.split("/")[1]: value for path, value in found.items() if "layers/mlp/up" in path}
  assert stacks["decoder"].ravel().tolist() == [0.125, 0.25, 0.5]
  assert stacks["encoder"].ravel().tolist() == [0.125 / 8, 0.25 / 8, 0.5 / 8]


def test_a_rule_of_no_decay_that_matches_nothing():
  leaves = flatten(params_of(model_of("gpt")))
  with pytest.raises(UserError, match="no_decay='layers/0/' matches no trained parameter"):
    optimizer.make(OptimizerConfig(no_decay="layers/0/", learning_rate=1.0), leaves, 3, 10)


@pytest.mark.parametrize("freeze", [r"^backbone/", r"layers/[01]/|embedding", r"layers/1/"])
def test_frozen_parameters_stay_and_cost_no_moments(freeze, corpus, tmp_path):
  config = tiny(
    "gpt", f"text:{corpus}", model__num_layers=3, optimizer__freeze=freeze, training__steps=2
  )
  if freeze == r"^backbone/":
    config = tiny("bert", f"text:{corpus}", optimizer__freeze=freeze, training__steps=2)
  mesh = sharding.make_mesh(config.mesh)
  made = experiment.prepare(config).on(mesh)
  with jax.set_mesh(mesh):
    planned = plan_lib.of(made, mesh)
    state, _ = state_lib.first_state(made, planned, None, tmp_path, print)
    before = jax.device_get(state)
  loop.train(config, tmp_path)
  after = flatten(manager.restore(manager.find(tmp_path), "params"))
  marks = partition.frozen_layers(manager.restore(manager.find(tmp_path), "params"), freeze)
  start = flatten(partition.merge(before.trained, before.frozen, marks))
  moved = 0
  for path, mark in marks.items():
    for layer, frozen in enumerate(mark):
      same = (
        np.array_equal(start[path][layer], after[path][layer])
        if len(mark) > 1
        else np.array_equal(start[path], after[path])
      )
      assert same or not frozen, path
      moved += not same
  assert moved

  def sizes(tree):
    return sum(x.size for x in jax.tree.leaves(tree))

  assert sizes(before.opt_state) <= 2 * sizes(before.trained) + 8


def test_flops_are_the_formula():
  """Counted in the trace = 6 x weights x tokens + attention, by hand."""
  for name, scan in (("gpt", "scan"), ("gpt", "unroll"), ("bert", "scan")):
    model = model_of(name, scan=scan)
    batch, width, layers = batch_of(4), 32, 3
    tokens = 4 * 16
    block = 2 * tokens * (4 * width**2 + 2 * width * 64)
    attention = 4 * tokens * 16 * width
    if name == "gpt":
      expected = 3 * (layers * (block + attention / 2) + 2 * tokens * width * 128)
    else:
      head = 2 * 12 * (width**2 + width * 128) + 2 * 4 * (width**2 + 2 * width)
      expected = 3 * (layers * (block + attention) + head)
    count = flops.model_flops(model, shapes_of(model), batch, model.backbone.config)
    assert count == pytest.approx(expected, rel=1e-9)


def test_flops_outside_a_window_are_not_needed():
  whole, windowed = (
    flops.model_flops(model, shapes_of(model), batch_of(4), model.backbone.config)
    for model in (model_of("modernbert"), model_of("modernbert", global_every=3, window=4))
  )
  assert whole - windowed == 3 * 4 * 4 * 16 * (16 - 4) * 32 * 2  # two layers of three are local


@pytest.mark.parametrize(
  "kind, expected",
  [("NVIDIA L4", 121e12), ("NVIDIA L40S", 362e12), ("NVIDIA L40", None), ("TPU v5 lite", 197e12)],
)
def test_a_chip_is_known_by_its_whole_name(kind, expected):
  chip = hardware.chip_of(kind)
  assert (chip and chip.flops) == expected


def test_the_best_checkpoint_stays_until_a_better_one_is_saved(byte_tokenizer, tmp_path):
  params = {"a": jnp.ones(3)}
  saves = manager.Manager(tmp_path, 1, byte_tokenizer)
  for step in (1, 2):
    saves.save(step, params, None, {}, best=1)
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(saves._writer, "save", lambda *_: 1 / 0)
    with pytest.raises(UserError, match="cannot save step 3"):
      saves.save(3, params, None, {}, best=3)
  assert manager.steps(tmp_path / "checkpoints") == [2, 1]
  saves.close()


def test_a_save_of_small_arrays_compiles_nothing(byte_tokenizer, tmp_path):
  """A program would slice each array for each device that holds it."""
  whole = jax.NamedSharding(sharding.make_mesh(MeshConfig(data=8)), jax.P())
  params = jax.device_put({"a": np.ones((64, 32)), "b": np.ones(48)}, whole)
  compiled = []

  def count(event, seconds, **_):
    if event.endswith("backend_compile_duration"):
      compiled.append(seconds)

  jax.monitoring.register_event_duration_secs_listener(count)
  saves = manager.Manager(tmp_path, 1, byte_tokenizer)
  saves.save(1, params, None, {})
  saves.close()
  jax.monitoring.unregister_event_duration_listener(count)
  assert same(manager.restore(manager.find(tmp_path), "params"), params)
  assert not compiled


def final_state(workdir):
  step = manager.find(workdir)
  return int(step.name), manager.restore(step, "params"), manager.restore(step, "opt_state")


def same(a, b):
  return jax.tree.all(jax.tree.map(lambda x, y: np.array_equal(np.asarray(x), np.asarray(y)), a, b))


@pytest.mark.parametrize("name", ["bert", "gpt", "t5"])
def test_a_run_continued_is_the_run_uninterrupted(name, corpus, tmp_path):
  """In one process: stop at step 4 of 6 by a shorter run of the same schedule."""
  config = tiny(name, f"text:{corpus}", optimizer__schedule="constant", optimizer__warmup_steps=0)
  loop.train(config, tmp_path / "whole")
  short = config_lib.freeze(
    {**config_lib.thaw(config), "training": {**config_lib.thaw(config)["training"], "steps": 4}}
  )
  loop.train(short, tmp_path / "parts")
  loop.train(config, tmp_path / "parts")
  assert same(final_state(tmp_path / "whole"), final_state(tmp_path / "parts"))
  steps = [
    json.loads(line)["step"]
    for line in (tmp_path / "parts" / "metrics.jsonl").read_text().splitlines()
  ]
  assert steps == [2, 4, 6]


RUN = """
import os, signal, sys
import jax
jax.config.update("jax_num_cpu_devices", 2)
from llm import command, config
command.use_compilation_cache()
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
from llm.training import loop
from llm.training import step
from llm.checkpoints import manager
import llm.data.batches
{patch}
import json
loop.train(config.freeze(json.loads(sys.argv[1])), sys.argv[2])
assert "torch" not in sys.modules  # it takes two seconds to import
"""

# Where the process is killed, as a patch of the running program.
KILLS = {
  "in a step": """
take_step = loop._Run.take_step
def killing(run, number):
  if number == 3:
    # The save runs beside the steps.
    while not os.path.exists(sys.argv[2] + "/checkpoints/2"): pass
    os.kill(os.getpid(), signal.SIGKILL)
  take_step(run, number)
loop._Run.take_step = killing
""",
  "in an asynchronous save": """
finish = manager.Manager._finish
def killing(self):
  if self._pending[0] == 4: os.kill(os.getpid(), signal.SIGKILL)
  finish(self)
manager.Manager._finish = killing
""",
  "in the writing of digests": """
write = manager.write_manifest
def killing(folder):
  if "4.orbax" in str(folder):
    (folder / "manifest.json").write_text("{")
    os.kill(os.getpid(), signal.SIGKILL)
  write(folder)
manager.write_manifest = killing
""",
  "in evaluation": """
evaluate = loop.evaluation.evaluate
count = [0]
def killing(*args, **kw):
  count[0] += 1
  if count[0] == 2: os.kill(os.getpid(), signal.SIGKILL)
  return evaluate(*args, **kw)
loop.evaluation.evaluate = killing
""",
  "at an epoch's end": """
read = llm.data.batches.Batches.read
def killing(self, number, rows):
  if number == int(self.steps_an_epoch()):
    while not os.path.exists(sys.argv[2] + "/checkpoints/2"): pass   # read ahead of the steps
    os.kill(os.getpid(), signal.SIGKILL)
  return read(self, number, rows)
llm.data.batches.Batches.read = killing
""",
}


def start(config, workdir, patch="", **more):
  return subprocess.Popen(
    [
      sys.executable,
      "-c",
      RUN.format(patch=patch),
      json.dumps(config_lib.thaw(config)),
      str(workdir),
    ],
    cwd=ROOT,
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
    env={**os.environ, "PYTHONPATH": str(ROOT)},
    **more,
  )


@pytest.fixture(scope="module")
def killable(tmp_path_factory, corpus):
  text = corpus.read_text().split("\n\n")
  path = tmp_path_factory.mktemp("kill") / "some.txt"
  path.write_text("\n\n".join(text[:3]))
  config = tiny(
    "bert",
    f"text:{path}",
    data__eval=f"text:{path}",
    training__steps=8,
    training__save_every=2,
    training__eval_every=3,
    optimizer__grad_accum_steps=2,
    data__prefetch=1,
  )
  assert 2 < experiment.prepare(config).batches.steps_an_epoch() < 7
  workdir = tmp_path_factory.mktemp("whole")
  process = start(config, workdir)
  assert process.wait() == 0, process.stdout.read()
  return config, final_state(workdir)


OFTEN = ("in an asynchronous save",)  # two processes each: the others run with -m slow


@pytest.mark.parametrize(
  "where", [w if w in OFTEN else pytest.param(w, marks=pytest.mark.slow) for w in KILLS]
)
def test_killed_and_resumed_ends_bit_equal(where, killable, tmp_path):
  config, expected = killable
  first = start(config, tmp_path, KILLS[where])
  assert first.wait() == -signal.SIGKILL, first.stdout.read()
  second = start(config, tmp_path)
  output = second.communicate()[0]
  assert second.returncode == 0 and "resumed from" in output, output
  assert same(final_state(tmp_path), expected)


def test_sigterm_saves_and_says_how_to_go_on(killable, tmp_path):
  config, expected = killable
  patch = KILLS["in a step"].replace("SIGKILL", "SIGTERM")
  first = start(config, tmp_path, patch)
  output = first.communicate()[0]
  assert (
    first.returncode == 128 + signal.SIGTERM and "the same command goes on from there" in output
  ), output
  assert final_state(tmp_path)[0] == 4
  assert start(config, tmp_path).wait() == 0
  assert same(final_state(tmp_path), expected)


def test_a_run_that_goes_on_counts_what_it_took_before(gpt_start, corpus, tmp_path):
  """Its first step is said to have taken 5,000 seconds, 2,000 of them the evaluation's."""
  shutil.copytree(gpt_start, tmp_path, dirs_exist_ok=True)
  step = storage.folder(tmp_path / "checkpoints" / "1")
  description = json.loads((step / "description.json").read_text())
  assert 0 < description["seconds"]["start"] < description["seconds"]["whole"]
  description["seconds"] = {"whole": 5_000.0, "evaluation": 2_000.0}
  (step / "description.json").write_text(json.dumps(description))
  manager.write_manifest(step)
  config = tiny("gpt", f"text:{corpus}", training__steps=2, model__max_length=128)
  result = loop.train(config, tmp_path, say=loop.silent)
  assert result["step"] == 2 and 5_000 < result["seconds"] < 5_500
  assert 0.35 < result["shares"]["evaluation"] <= 0.4 and result["shares"]["start"] > 0
  saved = manager.describe(step.parent / "2").seconds
  assert saved["whole"] > 5_000 and saved["evaluation"] == 2_000


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_workers_end_with_their_run(number, killable, tmp_path):
  """A signal to every process of a job, as Slurm sends it, lets the run save.

  A signal that ends the run by force ends its workers too.
  """
  config, expected = killable
  config = dataclasses.replace(config, data=dataclasses.replace(config.data, workers=2))
  kill = (
    KILLS["in a step"]
    if number == signal.SIGKILL
    else KILLS["in a step"].replace(
      "os.kill(os.getpid(), signal.SIGKILL)", "os.killpg(0, signal.SIGTERM)"
    )
  )
  first = start(config, tmp_path, kill, start_new_session=True)
  output = first.communicate(timeout=120)[0]  # to which its workers write too
  assert first.returncode == (128 + number if number == signal.SIGTERM else -number), output

  def members():
    return [
      p.pid
      for p in psutil.process_iter(["pid"])
      if p.pid != first.pid and _group(p.pid) == first.pid
    ]

  for _ in range(100):
    if not members():
      break
    time.sleep(0.1)
  assert not members()
  if number == signal.SIGTERM:
    assert start(config, tmp_path).wait() == 0
    assert same(final_state(tmp_path), expected)


def _group(pid: int) -> int:
  try:
    return os.getpgid(pid)
  except OSError:
    return -1


def test_a_loss_that_is_not_finite_stops_before_anything_is_saved_over(corpus, tmp_path):
  config = tiny("gpt", f"text:{corpus}", training__save_every=2)
  loop.train(config, tmp_path)
  kept = final_state(tmp_path)
  longer = tiny(
    "gpt",
    f"text:{corpus}",
    training__save_every=2,
    training__steps=20,
    optimizer__learning_rate=1e38,
  )
  with pytest.raises(UserError, match=r"not finite at step \d+ \(batch \d+\)"):
    loop.train(longer, tmp_path, go_on=True)
  assert same(final_state(tmp_path), kept)


def test_the_best_checkpoint_stays(corpus, tmp_path):
  config = tiny(
    "gpt",
    f"text:{corpus}",
    data__eval=f"text:{corpus}",
    training__eval_every=1,
    training__keep=1,
    training__keep_best="max:loss",
    training__steps=6,
  )
  loop.train(config, tmp_path)
  losses = {
    line["step"]: line["loss"]
    for line in map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())
    if line["split"] == "eval"
  }
  assert set(manager.steps(tmp_path / "checkpoints")) == {6, max(losses, key=losses.get)}


def test_runs_of_one_shape_share_their_programs(corpus, tmp_path):
  """Another rate, length, warm-up and seed compile nothing."""
  programs = []

  def listen(event, _, **__):
    programs.extend([event] * event.endswith("backend_compile_duration"))

  def compiled(**changes):
    programs.clear()
    plain = {"training__steps": 2, "data__eval": f"text:{corpus}", "model__dropout": 0.0}
    config = tiny("gpt", f"text:{corpus}", **{**plain, **changes})
    loop.train(config, tmp_path / str(changes), say=lambda *_: None)
    return len(programs)

  jax.monitoring.register_event_duration_secs_listener(listen)
  try:
    assert compiled(model__mlp_dim=80) >= 4
    others = {"training__steps": 3, "training__seed": 5, "optimizer__learning_rate": 3e-3}
    assert compiled(model__mlp_dim=80, optimizer__warmup_steps=1, **others) == 0
  finally:
    jax.monitoring.unregister_event_duration_listener(listen)


def test_a_profile_is_written(corpus, tmp_path):
  loop.train(tiny("gpt", f"text:{corpus}", training__profile="2:4", training__steps=4), tmp_path)
  assert list((tmp_path / "profile").rglob("*.xplane.pb"))


def test_a_batch_out_of_memory_is_one_line(corpus, tmp_path, monkeypatch, capsys):
  from llm import command

  def explode(*args):
    raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes")

  monkeypatch.setattr(loop._Run, "take_step", explode)
  with pytest.raises(SystemExit) as stop:
    command.run(lambda: loop.train(tiny("gpt", f"text:{corpus}"), tmp_path), ["train"])
  assert stop.value.code == 2 and "remat=full" in capsys.readouterr().err
