"""What the models must not do: look ahead, mix documents, depend on how they are computed."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm.config import ModelConfig
from llm.core import UserError
from llm.models import bert, build_backbone, gpt, llama, qwen3, t5
from llm.objectives import base
from llm.performance import flops
from llm.training import experiment
from llm.training import step as step_lib
from tests.conftest import outputs_of

SMALL = dict(
  num_layers=3, width=32, num_heads=4, mlp_dim=64, vocab_size=100, max_length=16, dropout=0.0
)
T = 16


def batch_of(rows: int, seed: int = 0, segments=None):
  """A batch with everything that both objectives need."""
  rng = np.random.default_rng(seed)
  tokens = rng.integers(0, 100, (rows, T)).astype(np.int32)
  segments = (
    np.ones((rows, T), np.int32)
    if segments is None
    else np.tile(segments, (rows, 1)).astype(np.int32)
  )
  positions = np.stack(
    [np.concatenate([np.arange((s == v).sum()) for v in dict.fromkeys(s)]) for s in segments]
  )
  return {
    "tokens": tokens,
    "segments": segments,
    "positions": positions.astype(np.int32),
    "types": np.zeros_like(tokens),
    "targets": np.roll(tokens, -1, 1),
    "weights": np.ones((rows, T), np.float32),
    "masked_positions": np.tile(np.array([1, 4, 9], np.int32), (rows, 1)),
    "masked_targets": tokens[:, [1, 4, 9]],
    "masked_weights": np.ones((rows, 3), np.float32),
    **{
      f"decoder_{k}": v
      for k, v in (
        ("tokens", np.roll(tokens, 3, 1)),
        ("segments", segments),
        ("positions", positions.astype(np.int32)),
      )
    },
    "firsts": np.zeros((rows, 1), np.int32),
    "pair_weights": np.ones((rows, 1), np.float32),
    "next_sentence": (np.arange(rows) % 2).astype(np.int32)[:, None],
  }


def model_of(name: str, **changes):
  shape = {**SMALL, "num_kv_heads": 2 if name in ("llama", "qwen3") else 0}
  shape |= dict(head_width=12, init_std=1.0, tied=False) if name == "t5" else {}
  shape |= dict(head_width=12) if name == "qwen3" else {}
  config = dataclasses.replace(ModelConfig(name=name, **shape), **changes)
  return experiment.build(
    base.build(base.defaults("masked_lm" if name == "bert" else "causal_lm")), config
  )


@functools.cache
def params_of(model, seed=0):
  """Fresh parameters, drawn once a model. Not for use in a trace."""
  return jax.jit(lambda: step_lib.init_params(model, batch_of(1), jax.random.key(seed)))()


def shapes_of(model):
  return jax.eval_shape(lambda: step_lib.init_params(model, batch_of(1), jax.random.key(0)))


def hidden(model, params, batch):
  """What the backbone gives, BxTxD."""
  return outputs_of(model.backbone, params["backbone"], batch)[0]


@pytest.mark.parametrize("name", ["gpt", "llama", "qwen3"])
def test_decoders_never_look_ahead(name):
  model = model_of(name)
  params, batch = params_of(model), batch_of(1)
  table = params["backbone"]["token"]["embedding"]

  def outputs(embedded):  # gradients with respect to each position's token embedding
    moved = {**params["backbone"], "token": {"embedding": jnp.concatenate([table, embedded])}}
    there = {**batch, "tokens": len(table) + np.arange(T, dtype=np.int32)[None]}
    return model.backbone.apply({"params": moved}, there, train=False)[0][0]

  big = dataclasses.replace(model.backbone.config, vocab_size=len(table) + T)
  model = model.clone(backbone=build_backbone(big), parent=None)
  rows = -(-(len(table) + T) // 128) * 128 - len(table)
  embedded = jnp.concatenate([table[batch["tokens"][0]], jnp.zeros((rows - T, 32))])
  weights = np.random.default_rng(0).normal(size=32)  # a plain sum would be constant after the norm
  slopes = jax.jit(jax.jacobian(lambda e: outputs(e) @ weights))(embedded)  # T x rows x D
  reach = np.abs(np.asarray(slopes))[:, :T].sum(-1) > 0
  assert (reach == np.tril(np.ones((T, T), bool))).all()


@pytest.mark.parametrize("name", ["bert", "gpt", "llama", "qwen3"])
def test_packed_documents_are_alone(name):
  model = model_of(name)
  params = params_of(model)
  packed = batch_of(1, segments=[1] * 5 + [2] * 7 + [0] * 4)
  out = np.asarray(hidden(model, params, packed))
  for start, stop in ((0, 5), (5, 12)):
    alone = {k: packed[k][:, start:stop] for k in ("tokens", "types", "positions")}
    alone["segments"] = np.ones((1, stop - start), np.int32)
    np.testing.assert_allclose(
      np.asarray(hidden(model, params, alone))[0], out[0, start:stop], atol=2e-6
    )
  for perturbed, kept in (
    (slice(0, 5), slice(5, 12)),
    (slice(5, 12), slice(0, 5)),
    (slice(12, 16), slice(0, 12)),
  ):
    tokens = packed["tokens"].copy()
    tokens[:, perturbed] = (tokens[:, perturbed] + 7) % 100
    moved = np.asarray(hidden(model, params, {**packed, "tokens": tokens}))
    assert (moved[0, kept] == out[0, kept]).all()
    assert not (moved[0, perturbed] == out[0, perturbed]).all()


@pytest.mark.parametrize("name", ["bert", "gpt", "llama"])
def test_padding_changes_nothing(name):
  model = model_of(name)
  params = params_of(model)
  short = {k: batch_of(1)[k][:, :9] for k in ("tokens", "types", "positions")}
  short["segments"] = np.ones((1, 9), np.int32)
  padded = {k: np.pad(v, ((0, 0), (0, 7))) for k, v in short.items()}
  np.testing.assert_allclose(
    np.asarray(hidden(model, params, padded))[0, :9],
    np.asarray(hidden(model, params, short))[0],
    atol=2e-6,
  )


@functools.cache
def gradients_of(name, **changes):
  """(loss, gradients) of two layers."""
  objective = base.build(base.defaults("masked_lm" if name == "bert" else "causal_lm"))
  model, batch = model_of(name, num_layers=2, **changes), batch_of(4)

  def loss(params):
    outputs = model.apply({"params": params}, batch, train=False)
    return objective.loss(outputs, batch, objective.totals(batch))[0]

  return jax.jit(jax.value_and_grad(loss))(params_of(model_of(name, num_layers=2, scan="unroll")))


@pytest.mark.parametrize("name", ["bert", "gpt", "llama", "t5"])
@pytest.mark.parametrize(
  "change",
  [
    {"scan": "scan"},
    {"remat": "full"},
    {"remat": "dots"},
    {"remat": "full", "scan": "scan"},
    {"loss_chunk": 5},
  ],
)
def test_how_it_is_computed_does_not_matter(name, change):
  expected, found = (gradients_of(name, **{"scan": "unroll", **c}) for c in ({}, change))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), expected, found)


# Stated exactly: google-research/bert and its miniatures with both pretraining heads (as
# BertForPreTraining counts them), GPT-2 as openai/gpt-2, SmolLM2, Llama 2 and Llama 3 as their
# cards, Qwen3 as Qwen3ForCausalLM counts it, T5 as T5ForConditionalGeneration.
PUBLISHED = {
  ("bert", "tiny"): 4_433_468,
  ("bert", "mini"): 11_267_900,
  ("bert", "small"): 29_058_876,
  ("bert", "medium"): 41_668_412,
  ("bert", "base"): 110_106_428,
  ("bert", "large"): 336_226_108,
  ("gpt", "small"): 124_439_808,
  ("gpt", "medium"): 354_823_168,
  ("gpt", "large"): 774_030_080,
  ("gpt", "xl"): 1_557_611_200,
  ("llama", "135m"): 134_515_008,
  ("llama", "7b"): 6_738_415_616,
  ("llama", "8b"): 8_030_261_248,
  ("llama", "70b"): 68_976_648_192,
  ("qwen3", "0.6b"): 596_049_920,
  ("qwen3", "1.7b"): 1_720_574_976,
  ("qwen3", "4b"): 4_022_468_096,
  ("qwen3", "8b"): 8_190_735_360,
  ("qwen3", "14b"): 14_768_307_200,
  ("qwen3", "32b"): 32_762_123_264,
  ("t5", "small"): 76_961_152,
  ("t5", "base"): 247_577_856,
  ("t5", "large"): 783_150_080,
  ("t5", "3b"): 2_849_757_184,
  ("t5", "11b"): 11_135_332_352,
  ("t5", "small-v1.0"): 60_506_624,
  ("t5", "base-v1.0"): 222_903_552,
  ("t5", "large-v1.0"): 737_668_096,
  ("t5", "3b-v1.0"): 2_851_598_336,
  ("t5", "11b-v1.0"): 11_307_321_344,
}


@pytest.mark.parametrize("name, size", list(PUBLISHED))
def test_parameter_counts_are_the_published_ones(name, size):
  module = {"bert": bert, "gpt": gpt, "llama": llama, "qwen3": qwen3, "t5": t5}[name]
  shape = module.SIZES[size]
  vocab = {
    "bert": 30_522,
    "gpt": 50_257,
    "qwen3": 151_936,
    "t5": 32_128,
    "135m": 49_152,
    "8b": 128_256,
  }.get(name if name != "llama" else size, 32_000)
  config = ModelConfig(name=name, vocab_size=vocab, scan="scan", **shape)
  model = experiment.build(
    base.build(base.defaults("masked_lm" if name == "bert" else "causal_lm")), config
  )
  assert flops.count_parameters(shapes_of(model), vocab) == PUBLISHED[name, size]


def test_padding_of_the_vocabulary_takes_no_probability():
  model = model_of("gpt")
  params = params_of(model)
  batch = batch_of(2)
  losses = outputs_of(model, params, batch)["losses"]
  table = params["backbone"]["token"]["embedding"]
  logits = (
    np.asarray(hidden(model, params, batch), np.float64) @ np.asarray(table, np.float64)[:100].T
  )
  expected = (
    np.log(np.exp(logits).sum(-1))
    - np.take_along_axis(logits, batch["targets"][..., None], -1)[..., 0]
  )
  np.testing.assert_allclose(losses, expected, rtol=1e-5)


@pytest.mark.parametrize(
  "objective, name, fitting",
  [
    ("span_corruption", "bert", "encoder-decoder models, not config.model.name=bert: .* t5"),
    ("causal_lm", "t5", "decoder models, not config.model.name=t5: .* gpt, llama"),
    ("masked_lm", "gpt", "encoder models, not config.model.name=gpt: .* bert"),
    ("classification", "t5", "encoder or decoder models, not config.model.name=t5"),
  ],
)
def test_an_objective_trains_its_kinds_of_architecture(objective, name, fitting):
  with pytest.raises(UserError, match=fitting):
    base.check_kind(base.build(base.defaults(objective)), ModelConfig(name=name))
