"""The cache changes no text, rows know nothing of each other, draws follow their distribution."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

import llm
from llm import sharding
from llm.config import MeshConfig
from llm.core import UserError
from llm.data import tokenizer as tokenizer_lib
from llm.data import tokenizer_training
from llm.inference import filling, writer
from llm.models import decoding, precision
from llm.models.decoding import Sampling
from llm.training import experiment
from tests.conftest import outputs_of
from tests.test_huggingface import GOLDEN
from tests.test_models import model_of, params_of

BYTES = tokenizer_lib.ByteTokenizer()
PROMPTS = ["a", "what is it", "no one knows"]
NEW = 12


def writer_of(name):
  model = model_of(name, vocab_size=BYTES.vocab_size, max_length=64, tied=name == "gpt")
  # Without growth, every token is the one before.
  growth = {"kernel": 1.0 if name == "t5" else 6.0, "position": 50.0}

  def grown(path, x):
    return x * next((g for part, g in growth.items() if part in jax.tree_util.keystr(path)), 1.0)

  params = jax.tree_util.tree_map_with_path(grown, params_of(model, seed=2))
  asked = dataclasses.replace(model.backbone.config, dtype="auto")
  config = dataclasses.make_dataclass("Config", ["model"])(asked)
  return writer.Writer(experiment.Bundle(model, params, BYTES, config)), model, params


@functools.cache
def following_of(backbone):
  """The token that follows a text; of T5, what it has written so far."""
  t5 = backbone.config.name == "t5"

  @jax.jit
  def following(params, tokens, count, own, own_count):
    place = jnp.arange(64)
    batch = {
      "tokens": tokens[None],
      "segments": (place < count)[None].astype(jnp.int32),
      "positions": place[None],
    }
    if t5:
      batch |= {
        "decoder_tokens": own[None],
        "decoder_segments": (place < own_count)[None].astype(jnp.int32),
        "decoder_positions": place[None],
      }
    hidden, table, _ = backbone.apply({"params": params["backbone"]}, batch, train=False)
    last = own_count if t5 else count
    return (hidden[0, last - 1] @ table.T)[: BYTES.vocab_size].argmax()

  return following


def uncached(model, params, prompt, new):
  """Greedy tokens by the whole text again for each."""
  t5 = model.backbone.config.name == "t5"
  read, wrote = [*prompt, BYTES.eos] if t5 else list(prompt), [BYTES.pad] if t5 else []
  following = following_of(model.backbone)

  def fixed(ids):
    return jnp.array(np.r_[ids, np.zeros(64 - len(ids))].astype(np.int32))

  for _ in range(new):
    text = read if t5 else read + wrote
    token = int(following(params, fixed(text), len(text), fixed(wrote), len(wrote)))
    wrote.append(token)
    if token == BYTES.eos:
      break
  return wrote[1:] if t5 else wrote


@pytest.mark.parametrize("name", ["gpt", "llama", "qwen3", "t5"])
def test_one_row_on_one_device_is_written_as_in_a_batch(name, monkeypatch):
  together = writer_of(name)[0].write(PROMPTS, NEW)
  one_device = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
  monkeypatch.setattr(writer, "_mesh", lambda config: one_device)
  alone = writer_of(name)[0]
  for prompt, expected in zip(PROMPTS, together):
    assert alone.write([prompt], NEW)[0].tokens == expected.tokens
  assert "for_one_row" in vars(alone) and "params" not in vars(alone)
  monkeypatch.setattr(precision, "native_bfloat16", lambda: True)
  half = writer_of(name)[0]
  config, params = half.for_one_row
  kernels = [
    leaf
    for path, leaf in jax.tree_util.tree_leaves_with_path(params)
    if "kernel" in jax.tree_util.keystr(path)
  ]
  assert config.dtype == "bfloat16_operands" and {k.dtype for k in kernels} == {
    jnp.dtype("bfloat16")
  }
  exact, rounded = (dict(w.write([PROMPTS[2]], NEW)[0].choices[0]) for w in (alone, half))
  likeliest = max(exact, key=exact.get)
  assert rounded[likeliest] == pytest.approx(exact[likeliest], abs=0.1) and rounded != exact


@pytest.mark.parametrize("name", ["gpt", "llama", "qwen3", "t5"])
def test_the_cache_and_the_batch_change_no_token(name, monkeypatch):
  traced, step = [], decoding.step  # once for a program
  monkeypatch.setattr(decoding, "step", lambda *args: (traced.append(1), step(*args))[1])
  made, model, params = writer_of(name)
  together = made.write(PROMPTS, NEW)
  for prompt, found in zip(PROMPTS, together):
    expected = uncached(model, params, BYTES.encode([prompt])[0], NEW)
    assert found.tokens == [t for t in expected if t != BYTES.eos]
    assert made.write([prompt], NEW)[0].tokens == found.tokens
    # Greedy took the likeliest.
    assert [step[0][0] for step in found.choices][: len(found.tokens)] == found.tokens
  assert len({t for found in together for t in found.tokens}) > 8
  # Prompts of another length in the same bucket, and another count of tokens, compile nothing.
  before = len(traced)
  made.write(["quite", "other", "words"], NEW - 3)
  assert len(traced) == before > 0


def test_draws_follow_their_distribution_and_repeat():
  logits = np.log([0.4, 0.3, 0.2, 0.07, 0.03])

  def draw(sampling, seed=0):
    return np.asarray(
      decoding.draw(jnp.tile(jnp.array(logits), (20_000, 1)), jax.random.key(seed), sampling)
    )

  odds = np.exp(logits)
  for sampling, expected in (
    (Sampling(1.0), odds),
    (Sampling(0.5), odds**2),
    (Sampling(1.0, top_k=2), odds * [1, 1, 0, 0, 0]),
    (Sampling(1.0, top_p=0.7), odds * [1, 1, 0, 0, 0]),
    (Sampling(1.0, top_p=0.71), odds * [1, 1, 1, 0, 0]),
    (Sampling(2.0, top_k=4, top_p=0.9), odds**0.5 * [1, 1, 1, 1, 0]),
  ):
    counts, expected = np.bincount(draw(sampling), minlength=5), expected / expected.sum()
    assert (counts[expected == 0] == 0).all()
    assert (
      scipy.stats.chisquare(counts[expected > 0], 20_000 * expected[expected > 0]).pvalue > 1e-4
    ), sampling
  assert (draw(Sampling(1.0)) == draw(Sampling(1.0))).all() and (
    draw(Sampling(1.0)) != draw(Sampling(1.0), 1)
  ).any()
  assert (draw(Sampling(0.0)) == 0).all()


def test_writing_ends_at_the_end_token_a_stop_string_or_the_length():
  made, *_ = writer_of("gpt")
  (whole,) = made.write(["what is it"], NEW)
  assert whole.ended == "length" and len(whole.tokens) == NEW
  mark = whole.text[3:5]
  (stopped,) = made.write(["what is it"], NEW, stops=[mark])
  assert stopped.ended == "stop" and stopped.text == whole.text[: whole.text.index(mark)]
  assert stopped.tokens == whole.tokens[: len(stopped.tokens)] and len(stopped.tokens) < NEW
  assert len(stopped.choices) == len(stopped.tokens)
  made.tokenizer = tokenizer_lib.ByteTokenizer()
  made.tokenizer.eos = whole.tokens[4]
  (ended,) = made.write(["what is it"], NEW)
  assert (
    ended.ended == "end" and ended.tokens == whole.tokens[: whole.tokens.index(whole.tokens[4])]
  )


def test_a_bert_fills_masks_by_its_own_odds():
  bundle = llm.load(GOLDEN / "bert_pretraining")
  (found,) = filling.fill(bundle, "the [MASK] sat", count=3)
  ids = bundle.tokenizer.encode(["the", "sat"])
  row = [bundle.tokenizer.cls, *ids[0], bundle.tokenizer.mask, *ids[1], bundle.tokenizer.sep]
  assert (
    len(found) == 3 and found[0][1] >= found[1][1] >= found[2][1] and sum(o for _, o in found) < 1
  )
  batch = {
    "tokens": np.array([row], np.int32),
    "segments": np.ones((1, len(row)), np.int32),
    "positions": np.arange(len(row), dtype=np.int32)[None],
    "types": np.zeros((1, len(row)), np.int32),
    "firsts": np.zeros((1, 1), np.int32),
    "masked_positions": np.array([[1 + len(ids[0])]], np.int32),
    "masked_targets": np.array([[bundle.tokenizer.pieces.index(found[0][0])]], np.int32),
  }
  losses = outputs_of(bundle.model, bundle.params, batch)["losses"]
  assert found[0][1] == pytest.approx(float(np.exp(-losses[0, 0])), rel=1e-4)


def test_what_follows_a_mask_at_once_has_no_space():
  """SentencePiece begins every text with one, which training did not see there."""
  model = tokenizer_training.train_sentencepiece(["paris is big.", "it is paris, yes."], 40, True)
  tokenizer = tokenizer_lib.SentencePieceTokenizer(model, lowercase=True)
  whole, after, spaced = tokenizer.encode(["it is paris, yes.", ", yes.", "yes."])
  assert after[0] != whole[-len(after) + 1]
  joined = filling._at_once(tokenizer, after)
  assert joined == whole[-len(joined) :] and tokenizer.pieces[joined[0]][0] == ","
  assert filling._at_once(tokenizer, []) == [] and tokenizer.pieces[spaced[0]][0] == "▁"


@pytest.mark.parametrize(
  "call, message",
  [
    (lambda: writer_of("gpt")[0].write([""], 4), "is empty"),
    (
      lambda: writer_of("gpt")[0].write(["a" * 60], 40),
      "60 tokens and --max_tokens=40 more do not fit the model's 64 positions",
    ),
    (
      lambda: writer.Writer(llm.load(GOLDEN / "bert_classifier")),
      "bert is an encoder and does not write",
    ),
    (
      lambda: filling.fill(llm.load(GOLDEN / "bert_classifier"), "a [MASK]"),
      "no masked-language-model head",
    ),
    (lambda: filling.fill(llm.load(GOLDEN / "bert_pretraining"), "a cat"), "no .MASK. to fill"),
  ],
)
def test_what_cannot_be_written_is_said(call, message):
  with pytest.raises(UserError, match=message):
    call()
