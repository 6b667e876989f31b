"""Emergence: tasks by rule, exact match beside the loss, and what is a jump."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from configs import study_emergence
from llm import config as config_lib
from llm.config import DataConfig
from llm.core import UserError
from llm.data import made, sources
from llm.objectives import base
from llm.studies import emergence, frame
from llm.training import loop
from tests.conftest import tiny


def test_no_held_out_prompt_is_trained_on_and_targets_are_right():
  for name in made.KINDS:
    train, held_out = (made.records(name, split) for split in ("train", "validation"))
    assert not {r["text"] for r in train} & {r["text"] for r in held_out}
    assert len(train) > 40_000 and len(held_out) == made.VALIDATION
  for record in made.records("reversed_addition", "validation")[:50]:
    a, b = record["text"].rstrip("=").split("+")
    assert int(record["target"][::-1]) == int(a) + int(b)
  for record in made.records("copying", "validation")[:50]:
    word, cue = record["text"].split("|")
    assert cue + record["target"] in word and len(record["target"]) == 8
  with pytest.raises(UserError, match="there is addition, reversed_addition, copying"):
    made.records("division", "train")


def test_exact_match_and_loss_are_those_of_a_count_by_hand(byte_tokenizer):
  """Made-up outputs of a network, counted token by token."""
  config = tiny("gpt", "made:addition", objective__name="completion")
  objective = base.build(base.defaults("completion"))
  source = sources.parse_one("made:addition[validation]", DataConfig())
  rows = objective.rows(source, byte_tokenizer, config.data, config.model, 64)
  rng = np.random.default_rng(0)
  batch = {
    name: np.stack([rows.example(i, rng)[name] for i in range(6)]) for name in rows.example(0, rng)
  }
  shape = batch["tokens"].shape
  outputs = {"losses": rng.random(shape), "correct": (rng.random(shape) < 0.8).astype(np.float32)}
  figures = objective.score(jax.device_get(objective.predict(outputs, batch)), rows)
  exact, losses, right = [], [], []
  for row in range(6):
    for segment in range(1, 1 + len(rows.packed[row])):
      at = (batch["segments"][row] == segment) & (batch["weights"][row] > 0)
      assert at.sum() == 4  # digits of a sum
      exact.append(outputs["correct"][row][at].all())
      losses += list(outputs["losses"][row][at])
      right += list(outputs["correct"][row][at])
  assert 0 < np.mean(exact) < 1
  assert figures["exact_match"] == pytest.approx(np.mean(exact))
  assert figures["loss"] == pytest.approx(np.mean(losses), rel=1e-5)
  assert figures["accuracy"] == pytest.approx(np.mean(right))


def test_a_short_text_is_learned_too(tmp_path, byte_tokenizer):
  (tmp_path / "a.jsonl").write_text('{"text": "1+1=", "target": "2"}\n' * 5)
  config = tiny("gpt", f"jsonl:{tmp_path}/a.jsonl", objective__name="completion")
  objective = base.build(base.defaults("completion"))
  source = sources.parse_one(config.data.train, DataConfig())
  rows = objective.rows(source, byte_tokenizer, config.data, config.model, 16)
  assert sorted(map(len, rows.packed)) == [1, 2, 2]


def train_as(curve):
  """A stand-in of loop.train whose right tokens are curve(parameters, share of the steps)."""

  def train(config, workdir, **_):
    workdir.mkdir(parents=True)
    model, training = config.model, config.training
    parameters = 12 * model.num_layers * model.width**2
    rng = np.random.default_rng(training.seed)
    lines = []
    for step in range(training.eval_every, training.steps + 1, training.eval_every):
      p = np.clip(curve(parameters, step / training.steps) + 0.002 * rng.normal(), 0.01, 0.999)
      figures = {"loss": -np.log(p), "accuracy": p, "exact_match": p**10}
      lines.append(json.dumps({"step": step, "split": "eval", **figures}))
    (workdir / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    (workdir / "config.json").write_text(json.dumps(config_lib.thaw(config)))
    return {"eval": figures, "parameters": parameters, "flops": 1.0}

  return train


CURVES = {
  # The loss of a token falls evenly, by size and by length.
  "a sharp metric": lambda n, share: np.exp(
    -1.61 + 0.32 * np.log2(n / 12288) + 0.05 * np.log2(share)
  ),
  "a jump in both": lambda n, share: 0.98 if n * share > 2e5 else 0.1,
  "not learned": lambda n, share: 0.3 + 0.02 * np.log2(n / 12288),
}


@pytest.mark.parametrize("verdict", CURVES)
def test_a_jump_is_told_from_a_sharp_metric(verdict, tmp_path, monkeypatch):
  monkeypatch.setattr(loop, "train", train_as(CURVES[verdict]))
  config = study_emergence.get_config()
  study = emergence.Study(
    tasks=("copying",), sizes=("1x32", "1x64", "2x64", "1x128", "2x128"), seeds=3
  )
  figures = frame.run(study, config_lib.freeze(config.run), tmp_path)
  views = figures["tasks"]["copying"]["views"]
  assert views["sizes"]["verdict"] == verdict
  text = (tmp_path / "report.md").read_text()
  assert f"**Over 5 sizes: {verdict}.**" in text
  assert (tmp_path / "emergence.svg").exists()


def test_a_curve_that_begins_above_the_threshold_shows_none():
  """76, 95 and 99%: its largest step is most of the change, and says nothing of a threshold."""
  match_SxP = np.tile([0.76, 0.95, 0.99], (3, 1))
  steps = (0.8, 0.75, 0.85)
  assert emergence.verdict(steps, steps, match_SxP) == "no threshold here"
  assert emergence.verdict(steps, steps, match_SxP - [0.7, 0, 0]) == "a jump in both"
  assert emergence.verdict(steps, steps, match_SxP[:1]) == "one seed"
  assert emergence.interval_of_mean(np.array([0.9, 1.0, 1.0]))[2] == 1.0


def test_the_largest_step_of_a_line_and_of_a_jump():
  line = np.linspace(0, 1, 5)[None]
  np.testing.assert_allclose(emergence.largest_step(line), 0.25)
  np.testing.assert_allclose(emergence.largest_step(-line[:, ::-1]), 0.25)
  np.testing.assert_allclose(emergence.largest_step(np.array([[0, 0, 1, 1.0]])), 1)
  assert np.isnan(emergence.largest_step(np.ones((1, 4)))).all()


def test_too_few_sizes_and_steps(tmp_path):
  config = study_emergence.get_config()
  run = config_lib.freeze(config.run)
  study = frame.build("emergence", config.study.to_dict())
  with pytest.raises(UserError, match="needs 3 sizes"):
    frame.run(dataclasses.replace(study, sizes=("1x32",)), run, tmp_path)
  short = dataclasses.replace(run, training=dataclasses.replace(run.training, steps=8))
  with pytest.raises(UserError, match="steps=8 must be at least"):
    frame.run(study, short, tmp_path)
