"""The loss of preferences starts at ln 2 and has the gradient that is derived by hand.

The reference is asked once.
"""

import dataclasses
import json
import math

import jax
import numpy as np
import pytest

from llm.checkpoints import manager
from llm.config import DataConfig, ModelConfig
from llm.core import UserError
from llm.data import sources
from llm.data import tokenizer as tokenizer_lib
from llm.objectives import chat, preference
from llm.training import evaluation, experiment, loop
from tests.conftest import tiny
from tests.test_models import model_of, params_of

BYTES = tokenizer_lib.ByteTokenizer()
PAIRS = [
  {"prompt": f"ask {n}", "chosen": "yes " * (1 + n % 3), "rejected": "no " * (1 + n % 4)}
  for n in range(12)
]
DEEP = {
  "messages": [
    m
    for n in range(5)
    for m in ({"role": "user", "content": f"and {n}?" * 4}, {"role": "assistant", "content": "so"})
  ]
  + [{"role": "user", "content": "why"}],
  "chosen": {"role": "assistant", "content": "for"},
  "rejected": [{"role": "assistant", "content": "nay"}],
}


def source_of(path, *records):
  path.write_text("".join(json.dumps(r) + "\n" for r in records))
  return sources.parse(f"jsonl:{path}", DataConfig())[0]


def rows_of(source, objective, length=256):
  return objective.rows(source, BYTES, DataConfig(), ModelConfig(name="gpt"), length)


def batch_of(rows, objective):
  examples = [rows.example(i, None) for i in range(len(rows))]
  return {k: np.stack([e[k] for e in examples]) for k in examples[0]}


def test_pairs_share_rows_and_only_the_replies_count(tmp_path):
  objective = preference.Objective(template=chat.TEMPLATE)
  rows = rows_of(source_of(tmp_path / "a.jsonl", *PAIRS, DEEP), objective)
  assert rows.note.startswith("13 pairs in") and rows.note.endswith(
    "1 lost their first turns, 0 left out as too long"
  )
  said = []
  for i in range(len(rows)):
    example = rows.example(i, None)
    for segment in range(1, example["segments"].max() + 1):
      said.append(
        BYTES.decode(
          example["targets"][(example["segments"] == segment) & (example["weights"] > 0)][:-1]
        )
      )
  pairs = [tuple(said[n : n + 2]) for n in range(0, len(said), 2)]
  assert sorted(pairs) == sorted([(p["chosen"], p["rejected"]) for p in PAIRS] + [("for", "nay")])


def test_the_loss_starts_at_ln_2_and_its_gradient_is_the_derived_one(tmp_path):
  """The gradient is - beta sigmoid(-margin) (grad log p(chosen) - grad log p(rejected)).

  Source: Rafailov et al. 2023, section 4.
  """
  objective = preference.Objective(template=chat.TEMPLATE, beta=0.3)
  model = model_of("gpt", vocab_size=BYTES.vocab_size, max_length=256)
  rows = rows_of(source_of(tmp_path / "a.jsonl", *PAIRS), objective)
  params, moved = params_of(model, seed=1), params_of(model, seed=2)

  @jax.jit
  def predicted(params, batch):
    return objective.predict(model.apply({"params": params}, batch, train=False), batch)

  rows = objective.with_reference(rows, lambda rows: predicted(params, batch_of(rows, objective)))
  batch = batch_of(rows, objective)

  def loss(params):
    found, metrics = objective.loss(
      model.apply({"params": params}, batch, train=False), batch, objective.totals(batch)
    )
    return found, metrics

  value, metrics = jax.jit(loss)(params)
  assert (
    float(value) == pytest.approx(math.log(2), abs=1e-6) and abs(float(metrics["margin"][0])) < 1e-5
  )
  assert float(metrics["loss"][1]) == len(PAIRS)

  # By hand: each conversation alone in a row, a plain sum of log-probabilities.
  template = chat.Template(objective.template)

  @jax.jit
  def likelihood(params, ids, learned):
    row = {
      "tokens": ids[None, :-1],
      "targets": ids[None, 1:],
      "segments": (ids[None, :-1] >= 0) * 1,
      "positions": np.arange(len(ids) - 1)[None],
    }
    return -(model.apply({"params": params}, row, train=False)["losses"][0] * learned[1:]).sum()

  expected, losses = jax.tree.map(np.zeros_like, moved), []
  for pair in PAIRS:
    found = []
    for turns in preference.talks(pair):
      ids, learned = (
        np.pad(np.array(part), (0, 96 - len(part))) for part in template.tokens(turns, BYTES)
      )
      found.append(
        (
          float(likelihood(params, ids, learned)),
          *jax.value_and_grad(likelihood)(moved, ids, learned),
        )
      )
    (old_c, new_c, grad_c), (old_r, new_r, grad_r) = found
    margin = 0.3 * ((new_c - old_c) - (new_r - old_r))
    losses.append(math.log1p(math.exp(-margin)))
    share = -0.3 / (1 + math.exp(margin)) / len(PAIRS)
    expected = jax.tree.map(
      lambda total, c, r, share=share: total + share * (np.asarray(c) - np.asarray(r)),
      expected,
      grad_c,
      grad_r,
    )
  (value, _), found = jax.jit(jax.value_and_grad(loss, has_aux=True))(moved)
  assert float(value) == pytest.approx(np.mean(losses), rel=1e-4)
  for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(expected)):
    np.testing.assert_allclose(ours, theirs, rtol=2e-3, atol=2e-5)


def test_a_run_prefers_what_was_chosen_and_asks_the_reference_once(tmp_path, corpus, monkeypatch):
  loop.train(
    tiny("gpt", f"text:{corpus}", training__steps=2, model__max_length=256),
    tmp_path / "base",
    say=lambda *_: None,
  )
  source = source_of(tmp_path / "a.jsonl", *PAIRS)
  config = tiny(
    "gpt",
    source.spec,
    data__eval=source.spec,
    transfer__checkpoint=str(tmp_path / "base"),
    model__max_length=256,
    training__sequence_length=256,
    training__steps=8,
    training__log_every=1,
    optimizer__learning_rate=3e-3,
  )
  config = config.__class__(
    **{
      **config.__dict__,
      "objective": {"name": "preference", "beta": 0.1, "template": chat.TEMPLATE},
    }
  )
  asked, of_checkpoint = [], evaluation.of_checkpoint
  monkeypatch.setattr(
    evaluation, "of_checkpoint", lambda *a: (asked.append(1), of_checkpoint(*a))[1]
  )
  result = loop.train(config, tmp_path / "run", say=lambda *_: None)
  assert (
    result["eval"]["accuracy"] > 0.9
    and result["eval"]["margin"] > 0
    and result["eval"]["loss"] < math.log(2)
  )
  first = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[0])
  assert first["loss"] == pytest.approx(math.log(2), abs=0.05)
  loop.train(config, tmp_path / "again", say=lambda *_: None)
  assert len(asked) == 1  # training and evaluation rows are the same here, and so are both runs
  # The base is trained further: what was its step then stays the reference.
  further = tiny("gpt", f"text:{corpus}", training__steps=3, model__max_length=256)
  loop.train(further, tmp_path / "base", say=lambda *_: None)
  longer = dataclasses.replace(config.training, steps=9)
  loop.train(dataclasses.replace(config, training=longer), tmp_path / "again", say=lambda *_: None)
  saved = experiment.from_checkpoint(manager.find(tmp_path / "again"))
  assert saved.config.transfer.checkpoint == str(tmp_path / "base" / "checkpoints" / "2")
  assert len(asked) == 1
  with pytest.raises(UserError, match="needs a reference: give config.transfer.checkpoint"):
    loop.train(
      config.__class__(
        **{
          **config.__dict__,
          "transfer": config.transfer.__class__(),
          "data": DataConfig(train=source.spec),
        }
      ),
      tmp_path / "none",
      say=lambda *_: None,
    )
  other = dataclasses.replace(
    config,
    tokenizer=dataclasses.replace(config.tokenizer, sentinels=21),
    transfer=dataclasses.replace(config.transfer, vocabulary="match"),
  )
  with pytest.raises(UserError, match="has another vocabulary than the run"):
    loop.train(other, tmp_path / "other", say=lambda *_: None)


@pytest.mark.parametrize(
  "record, message",
  [
    ({"prompt": "a", "chosen": "b"}, "a.jsonl:1: rejected must be a text"),
    ({"prompt": [], "chosen": "b", "rejected": "c"}, "expected `messages` or `prompt`"),
    ({"prompt": "a", "chosen": "b", "rejected": "b"}, "chosen and rejected are the same"),
    (
      {"prompt": "a", "chosen": {"role": "user", "content": "b"}, "rejected": "c"},
      "chosen must be a text",
    ),
    ({"prompt": "a" * 300, "chosen": "b", "rejected": "c"}, "no prompt with both its replies fits"),
  ],
)
def test_pairs_that_cannot_be_learned_are_said(record, message, tmp_path):
  with pytest.raises(UserError, match=message):
    rows_of(source_of(tmp_path / "a.jsonl", record), preference.Objective(template=chat.TEMPLATE))
