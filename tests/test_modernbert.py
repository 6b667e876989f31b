"""Local layers beside global ones, on every backend and in the layout of transformers."""

import dataclasses
import functools
import importlib
import json
import shutil
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from llm import config as config_lib
from llm import sharding
from llm.checkpoints import export, families, huggingface, manager
from llm.checkpoints.families import modernbert as modernbert_family
from llm.config import MeshConfig, ModelConfig
from llm.core import UserError
from llm.models import attention, build_backbone, cudnn, modernbert, qwen3, splash, transformer
from llm.objectives import base
from llm.performance import flops
from llm.training import experiment, inherited, loop
from llm.training import step as step_lib
from tests import test_backends
from tests.conftest import tiny
from tests.test_huggingface import GOLDEN, _batch, _close, _loaded, _log_probs

T = 256
WINDOW = 32  # 16 tokens on each side
CONFIG = ModelConfig(
  name="modernbert",
  num_layers=4,
  width=32,
  num_heads=2,
  mlp_dim=48,
  vocab_size=100,
  max_length=T,
  dropout=0.0,
  rope_theta=160_000.0,
  global_every=3,
  window=WINDOW,
  dtype="float32",
  scan="unroll",
  attention="reference",
)
DOCUMENTS = (slice(0, 100), slice(100, 190), slice(190, 230))  # and padding
SEGMENTS = np.array([[1] * 100 + [2] * 90 + [3] * 40 + [0] * 26], np.int32)
POSITIONS = np.array([[*range(100), *range(90), *range(40), *range(26)]], np.int32)
TOKENS = np.random.default_rng(0).integers(0, 100, (1, T)).astype(np.int32)
BATCH = {"tokens": TOKENS, "segments": SEGMENTS, "positions": POSITIONS}


@pytest.fixture(autouse=True)
def _interpreted(monkeypatch):
  """Splash attention runs here, slowly."""
  monkeypatch.setattr(splash, "attend", functools.partial(splash.attend, interpret=True))


@functools.cache
def params():
  """Of the backbone. Norms are no ones, so that one which is left out shows."""
  fresh = jax.jit(lambda: build_backbone(CONFIG).init(jax.random.key(0), BATCH, train=False))()
  rng = np.random.default_rng(1)
  return jax.tree.map(
    lambda leaf: leaf + 0.1 * rng.normal(size=leaf.shape).astype(np.float32), fresh["params"]
  )


@functools.cache
def program(**changes):
  """(params, batch) -> (hidden states, gradients of their weighted sum)."""
  backbone = build_backbone(dataclasses.replace(CONFIG, **changes))
  weights = jnp.cos(jnp.arange(T * CONFIG.width, dtype=jnp.float32)).reshape(1, T, CONFIG.width)

  def loss(params, batch):
    hidden = backbone.apply({"params": params}, batch, train=False)[0]
    return (hidden * weights).sum(), hidden

  def run(params, batch):
    gradients, hidden = jax.grad(loss, has_aux=True)(params, batch)
    return hidden, gradients

  return jax.jit(run)


BACKENDS = {"reference": {}, "splash": {"attention": "splash", "scan": "scan"}}


@pytest.mark.parametrize("backend", BACKENDS)
def test_documents_that_share_a_row_are_alone(backend):
  """Bit by bit, whatever stands beside them; and as if each had a row of its own."""
  run = program(**BACKENDS[backend])
  packed = np.asarray(run(params(), BATCH)[0])[0]
  for place, here in enumerate(DOCUMENTS):
    others = np.ones(T, bool)
    others[here] = False
    moved = {**BATCH, "tokens": np.where(others, TOKENS, (TOKENS + 7) % 100)}
    beside = np.asarray(run(params(), moved)[0])[0]
    assert (beside[others] == packed[others]).all()
    assert (beside[here] != packed[here]).any(-1).all(), place
    length = here.stop - here.start
    alone = {name: np.pad(a[:, here], ((0, 0), (0, T - length))) for name, a in BATCH.items()}
    alone["segments"] = (np.arange(T) < length).astype(np.int32)[None]
    found = np.asarray(run(params(), alone)[0])[0, :length]
    np.testing.assert_allclose(found, packed[here], atol=1e-5)


@pytest.mark.parametrize(
  "changes", [BACKENDS["splash"], {"scan": "scan"}, {"scan": "scan", "remat": "full"}], ids=str
)
def test_how_it_is_computed_does_not_matter(changes):
  """Hidden states of what is no padding, and all gradients."""
  expected, found = (run(params(), BATCH) for run in (program(), program(**changes)))
  np.testing.assert_allclose(found[0][0, :230], expected[0][0, :230], atol=2e-5)
  for ours, theirs in zip(jax.tree.leaves(found[1]), jax.tree.leaves(expected[1])):
    np.testing.assert_allclose(ours, theirs, atol=2e-4 * float(jnp.abs(theirs).max()))


def gradients_of_norms(gradients):
  """L x D: of the scales that precede attention."""
  return np.asarray(gradients["layers"]["attention_norm"]["scale"])


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_norm_precedes_the_first_attention(backend):
  gradients = gradients_of_norms(program(**BACKENDS[backend])(params(), BATCH)[1])
  assert (gradients[0] == 0).all() and (gradients[1:] != 0).all()


def test_a_local_layer_sees_its_window_and_a_global_one_all():
  """Which inputs of a block have a gradient, of every output, in two documents of a row."""
  length, config = 40, dataclasses.replace(CONFIG, window=9)  # 4 on each side
  segments = np.array([[1] * 25 + [2] * 15], np.int32)
  positions = np.array([[*range(25), *range(15)]], np.int32)
  seen = attention.self_visibility({"segments": segments, "positions": positions}, causal=False)
  block = transformer.Block(config, modernbert.FACTS, train=False)
  of_layer = jax.tree.map(lambda leaf: leaf[0], params()["layers"])
  x = np.random.default_rng(2).normal(size=(1, length, 32)).astype(np.float32)
  weights = np.random.default_rng(3).normal(size=32).astype(np.float32)

  @jax.jit
  def slopes(layer):
    def run(x):
      return block.apply({"params": of_layer}, x, seen, layer=layer)[0][0] @ weights

    return jax.jacrev(run)(x)[:, 0]

  pattern = transformer.pattern_of(config, modernbert.FACTS)
  distance = np.abs(positions[0][:, None] - positions[0])
  same = segments[0][:, None] == segments[0]
  for number, reach in enumerate((length, 4, 4, length)):
    layer = jax.tree.map(lambda leaf, number=number: leaf[number], pattern)
    sees = np.abs(np.asarray(slopes(layer))).sum(-1) > 0
    np.testing.assert_array_equal(sees, same & (distance <= reach), err_msg=str(number))


def test_positions_of_local_layers_turn_at_their_own_pace():
  pattern = transformer.pattern_of(CONFIG, modernbert.FACTS)
  assert pattern.theta.tolist() == [160_000, 10_000, 10_000, 160_000]
  plain = dataclasses.replace(CONFIG, global_every=1, window=0)
  only_norm = transformer.pattern_of(plain, modernbert.FACTS)
  assert only_norm.reach is None and only_norm.normed.tolist() == [False, True, True, True]
  assert transformer.pattern_of(ModelConfig(name="bert", num_layers=4), qwen3.FACTS) is None


@pytest.mark.parametrize("reach", [WINDOW // 2, transformer.EVERYWHERE])
def test_every_backend_has_windows(reach):
  """Splash, forward and backward, on one device and on a mesh that splits queries; cuDNN's call."""
  q, k, v, segments, positions = test_backends.inputs(4)
  seen = attention.Visibility(segments, segments, positions, positions, reach=jnp.int32(reach))
  weights = jnp.cos(jnp.arange(q.size)).reshape(q.shape)

  def both(attend):
    def loss(*qkv):
      return (attend(*qkv) * weights).sum()

    return jax.jit(jax.value_and_grad(loss, (0, 1, 2)))(q, k, v)

  def by_splash(q, k, v):
    where = dict(causal=False, window=WINDOW, reach=jnp.int32(reach))
    return splash.attend(q, k, v, segments, scale=0.2, **where)

  expected = both(lambda *qkv: attention.attend(*qkv, seen, scale=0.2))
  with jax.set_mesh(sharding.make_mesh(MeshConfig(data=2, tensor=2, context=2))):
    apart = both(by_splash)
  asked = both(lambda *qkv: cudnn.attend(*qkv, seen, scale=0.2, implementation="xla"))
  for found in (both(by_splash), apart, asked):
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(expected)):
      np.testing.assert_allclose(ours, theirs, atol=2e-5, rtol=1e-5)


LOCAL = dict(model__name="modernbert", model__num_layers=4, model__global_every=3, model__window=8)


@pytest.mark.parametrize(
  "kind, changes, words",
  [
    ("bert", {**LOCAL, "model__window": 0}, "local layers need both, a pattern and a window"),
    ("bert", {**LOCAL, "model__global_every": 1}, "local layers need both"),
    ("bert", {**LOCAL, "model__num_layers": 2}, "global_every=3 is more than the 2 layers"),
    ("bert", {**LOCAL, "model__tied": False}, "the output layer of modernbert is its embedding"),
    (
      "gpt",
      {**LOCAL, "model__name": "qwen3"},
      "only encoders have local layers, and qwen3 is none",
    ),
    ("gpt", {**LOCAL, "model__name": "qwen3", "model__global_every": 1}, "local layers need both"),
    ("gpt", {"model__name": "qwen3", "model__num_kv_heads": 4}, "a multiple of num_kv_heads=4"),
  ],
)
def test_what_does_not_fit_is_one_line(kind, changes, words):
  with pytest.raises(UserError, match=words) as caught:
    experiment.without_data(tiny(kind, "text:nothing", **changes))
  assert "\n" not in str(caught.value)


def test_it_learns_and_is_fine_tuned(corpus, reviews, tmp_path):
  """Masks at 30% without pairs in packed rows; then labels, from the checkpoint."""
  shape = {**LOCAL, "objective__next_sentence": False, "objective__mask_rate": 0.3}
  pretraining = tiny("bert", f"text:{corpus}", **shape, training__steps=20, training__log_every=5)
  loop.train(pretraining, tmp_path / "start", say=lambda *_: None)
  lines = [json.loads(x) for x in (tmp_path / "start/metrics.jsonl").read_text().splitlines()]
  assert lines[-1]["loss"] < lines[0]["loss"] - 0.5
  tuning = tiny(
    "classifier",
    f"jsonl:{reviews}/train.jsonl",
    transfer__checkpoint=str(tmp_path / "start"),
    transfer__skip=("^head/",),
    training__steps=1,
  )
  loop.train(tuning, tmp_path / "tuned", say=lambda *_: None)
  tuned = experiment.from_checkpoint(manager.find(tmp_path / "tuned")).config.model
  assert (tuned.name, tuned.window, tuned.global_every) == ("modernbert", 8, 3)


# As transformers' classes count them, with their heads. Ours also have the first layer's unused
# scale.
PUBLISHED = {"17m": 16_913_600, "base": 149_655_232, "large": 395_881_664}


@pytest.mark.parametrize("size", PUBLISHED)
def test_parameter_counts_are_the_published_ones(size):
  shape = modernbert.SIZES[size]
  config = ModelConfig(name="modernbert", vocab_size=50_368, scan="scan", **shape)
  objective = base.build({"name": "masked_lm", "next_sentence": False, "mask_rate": 0.3})
  model = experiment.build(objective, config)
  row = base.zero_row(objective.batch_spec(config, 16))
  shapes = jax.eval_shape(lambda: step_lib.init_params(model, row, jax.random.key(0)))
  assert flops.count_parameters(shapes, 50_368) == PUBLISHED[size] + shape["width"]


@pytest.mark.parametrize("name, sizes", [("modernbert", modernbert.SIZES), ("qwen3", qwen3.SIZES)])
def test_every_size_has_a_config(name, sizes):
  module = importlib.import_module(f"configs.pretrain_{name}")
  for size in sizes:
    made = experiment.without_data(config_lib.freeze(module.get_config(size)))
    assert made.config.model.name == name and made.config.training.steps
  with pytest.raises(ValueError, match="unknown size 'huge'"):
    module.get_config("huge")
  if name == "modernbert":
    assert made.objective.mask_rate == 0.3 and not made.objective.next_sentence


@pytest.mark.parametrize("name", ["modernbert", "qwen3"])
def test_packed_texts_have_torchs_log_probabilities(name):
  """Three golden texts, of which torch computed each in a row of its own, in one row here."""
  made, loaded, expected = _loaded(name)
  rows = _batch(expected)
  real = rows["segments"] > 0
  packed = {key: rows[key][real][None] for key in ("tokens", "types", "positions")}
  packed["segments"] = np.nonzero(real)[0].astype(np.int32)[None] + 1
  log_probs, _ = _log_probs(made, loaded, packed, made.config.model.vocab_size)
  _close(log_probs[0], expected["log_probs"][real])


def theirs(**changes):
  """A config.json of theirs, changed; None takes a key away."""
  found = json.loads((GOLDEN / "modernbert" / "config.json").read_text()) | changes
  return {key: value for key, value in found.items() if value is not None}


FULL, LOCAL_KIND = modernbert_family.GLOBAL, modernbert_family.LOCAL


@pytest.mark.parametrize(
  "changes, every, thetas",
  [
    ({}, 3, (160_000, 10_000)),
    ({"layer_types": [FULL] * 7}, 1, (160_000, 10_000)),
    ({"layer_types": [FULL] + [LOCAL_KIND] * 6}, 7, (160_000, 10_000)),
    ({"layer_types": None}, 3, (160_000, 10_000)),
    (  # as transformers 4 wrote it
      {
        "layer_types": None,
        "rope_parameters": None,
        "global_attn_every_n_layers": 2,
        "global_rope_theta": 5e5,
        "local_rope_theta": 2e4,
      },
      2,
      (500_000, 20_000),
    ),
    ({"layer_types": None, "global_attn_every_n_layers": 9}, 7, (160_000, 10_000)),
  ],
)
def test_layer_patterns_of_theirs_are_ours_and_theirs_again(changes, every, thetas):
  given = theirs(**changes)
  model = families.find(given).model(given)
  assert (model.global_every, model.rope_theta, model.local_rope_theta) == (every, *thetas)
  assert model.window == (0 if every == 1 else 4)
  written = modernbert_family.FAMILY.config(model)
  assert modernbert_family.FAMILY.model(written) == model
  if "layer_types" in given:
    assert written["layer_types"] == given["layer_types"]


@pytest.mark.parametrize(
  "changes, words",
  [
    (
      {"layer_types": [FULL, LOCAL_KIND, FULL, FULL] + [LOCAL_KIND] * 3},
      "layer_types=.*first and every n-th",
    ),
    ({"layer_types": [LOCAL_KIND] * 7}, "layer_types=.*the first"),
    ({"layer_types": -1}, "layer_types=-1 is not supported"),
    ({"num_hidden_layers": 10**12}, "layer_types=.*only 1000000000000 layers"),
    ({"layer_types": [FULL] * 6}, "layer_types=.*only 7 layers"),
    ({"norm_bias": True}, "norm_bias=True"),
    ({"hidden_activation": "silu"}, "hidden_activation='silu'"),
    ({"local_attention": 0}, "local_attention must be a positive integer"),
    ({"rope_parameters": {FULL: {"rope_type": "yarn"}}}, "of type 'yarn' are not supported"),
  ],
)
def test_what_is_not_ours_is_refused(changes, words):
  given = theirs(**changes)
  with pytest.raises(UserError, match=words):
    families.find(given)


def qwen3_of(tmp_path, rows, **changes):
  """The golden folder of Qwen3, its embedding of so many rows."""
  folder = shutil.copytree(GOLDEN / "qwen3", tmp_path / "qwen3")
  weights = safetensors.numpy.load_file(folder / "model.safetensors")
  name = "model.embed_tokens.weight"
  weights[name] = np.resize(weights[name], (rows, 16))
  safetensors.numpy.save_file(weights, folder / "model.safetensors", {"format": "pt"})
  config = json.loads((folder / "config.json").read_text()) | {"vocab_size": rows} | changes
  (folder / "config.json").write_text(json.dumps(config))
  return folder


def test_rows_without_a_piece_are_left_out(tmp_path):
  """Published embeddings of Qwen3 have a few hundred; many more are those of another tokenizer."""
  found, config, _ = huggingface.read(qwen3_of(tmp_path, 640))
  expected, golden, _ = huggingface.read(GOLDEN / "qwen3")
  assert config.model == golden.model and golden.model.vocab_size == 270
  np.testing.assert_array_equal(
    found["backbone"]["token"]["embedding"], expected["backbone"]["token"]["embedding"]
  )
  shutil.rmtree(tmp_path / "qwen3")
  with pytest.raises(
    UserError, match="the tokenizer has 270 pieces, but the embedding has 1400 rows"
  ):
    huggingface.read(qwen3_of(tmp_path, 1400))


def test_sliding_windows_of_decoders_are_refused(tmp_path):
  with pytest.raises(UserError, match="use_sliding_window=True is not supported"):
    huggingface.read(qwen3_of(tmp_path, 384, use_sliding_window=True))


@pytest.mark.parity
@pytest.mark.parametrize(
  "name, changes",
  [
    ("modernbert", dict(num_layers=5, global_every=2, window=6, local_rope_theta=500.0)),
    ("modernbert", dict(global_every=1, window=0)),
    ("qwen3", dict(num_layers=3, num_kv_heads=1, head_width=10, tied=False)),
  ],
)
def test_what_begins_here_is_theirs(name, changes, tmp_path):
  """A model that was never theirs: logits of packed texts here, and of each alone there."""
  import torch
  import transformers

  _, config, tokenizer = huggingface.read(GOLDEN / name)
  config = dataclasses.replace(config, model=dataclasses.replace(config.model, **changes))
  objective = base.build(config.objective)
  made = experiment.Experiment(config, objective, tokenizer, config, None).on_platform("cpu")
  row = base.zero_row(objective.batch_spec(config.model, 16))
  fresh = step_lib.init_params(made.model, row, jax.random.key(3))
  rng = np.random.default_rng(3)
  fresh = jax.tree.map(
    lambda leaf: np.asarray(leaf + 0.2 * rng.normal(size=leaf.shape), np.float32), fresh
  )
  huggingface.write(fresh, config, tokenizer, tmp_path / "ours", "")
  (tmp_path / "theirs").mkdir()
  export.to_transformers(manager.find(tmp_path / "ours"), tmp_path / "theirs")
  kind = (
    transformers.AutoModelForMaskedLM if name == "modernbert" else transformers.AutoModelForCausalLM
  )
  model, info = kind.from_pretrained(tmp_path / "theirs", output_loading_info=True)
  assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
  vocab, lengths = config.model.vocab_size, (13, 5, 2)
  texts = [rng.integers(5, vocab, length) for length in lengths]
  with torch.no_grad():
    logits = [model.eval()(torch.tensor(text[None])).logits[0, :, :vocab] for text in texts]
  expected = torch.cat([torch.log_softmax(part.double(), -1) for part in logits]).numpy()
  packed = {
    "tokens": np.concatenate(texts)[None].astype(np.int32),
    "segments": np.repeat([1, 2, 3], lengths)[None].astype(np.int32),
    "positions": np.concatenate([np.arange(n) for n in lengths])[None].astype(np.int32),
  }
  log_probs, _ = _log_probs(made, fresh, packed, vocab)
  _close(log_probs[0], expected)


def test_a_run_that_names_the_architecture_takes_its_details_from_the_checkpoint():
  """With the default of the windows, every weight would be copied into another network."""
  shape = dict(num_layers=3, width=32, num_heads=2, mlp_dim=64, max_length=64, vocab_size=64)
  checkpoint = ModelConfig(name="modernbert", window=8, global_every=3, rope_theta=1e5, **shape)
  config = config_lib.freeze(config_lib.defaults(base.defaults("masked_lm")))
  described = dataclasses.replace(config, model=checkpoint)
  start = types.SimpleNamespace(config=described)
  for name in ("", "modernbert"):
    model = inherited.completed(ModelConfig(name=name), start, checkpoint.vocab_size, True)
    assert (model.window, model.global_every, model.rope_theta) == (8, 3, 1e5)
    wider = inherited.completed(ModelConfig(name=name, window=16), start, 64, True)
    assert (wider.window, wider.global_every) == (16, 3)
