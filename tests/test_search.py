"""Searches: what they draw, which trials go on from where they were, and what matters."""

import json

import numpy as np
import pytest

from configs import study_search
from llm import config as config_lib
from llm.core import Diverged, UserError
from llm.studies import frame, search_space
from llm.training import loop

KEYS = (
  "optimizer.learning_rate=log(1e-4,1)",
  "training.batch_size=8|16",
  "optimizer.beta1=0.8|0.9",
)


@pytest.fixture
def trained(monkeypatch):
  """(workdir, step) of each run, by a stand-in: the loss is lowest at a rate of 0.01."""
  runs = []

  def train(config, workdir, until=0, **_):
    workdir.mkdir(parents=True, exist_ok=True)
    step = until or config.training.steps
    runs.append((workdir.name, step))
    path = workdir / "step.json"
    assert not path.exists() or json.loads(path.read_text()) < step
    path.write_text(json.dumps(step))
    (workdir / "config.json").write_text(json.dumps(config_lib.thaw(config)))
    rate = config.optimizer.learning_rate
    if rate > 0.3:
      raise Diverged("loss is not finite at step 3 (batch 2)")
    loss = 1 + (np.log10(rate) + 2) ** 2 + 10 / step
    return {"eval": {"loss": float(loss), "accuracy": -loss}, "step": step, "flops": 1.0 * step}

  monkeypatch.setattr(loop, "train", train)
  return runs


def settings(**changes):
  config = study_search.get_config()
  config.study.update({"keys": KEYS, "trials": 9, **changes})
  return frame.build("search", config.study.to_dict()), config_lib.freeze(config.run)


def test_the_best_third_goes_on_from_its_checkpoints(trained, tmp_path):
  study, base = settings(seeds=2)
  figures = frame.run(study, base, tmp_path)
  assert [sum(step == rung for _, step in trained) for rung in (60, 180, 540)] == [18, 6, 2]
  values = study.values()
  distance = [abs(np.log10(v["optimizer.learning_rate"]) + 2) for v in values]
  best = int(np.argmin(distance))
  assert figures["best"]["trial"] == best and figures["best"]["step"] == 540
  ended = {name for name, step in trained if step == 540}
  assert ended == {f"{best:03}-0", f"{best:03}-1"}
  assert all((name, 60) in trained and (name, 180) in trained for name in ended)
  text = (tmp_path / "report.md").read_text()
  assert f"--config.optimizer.learning_rate={values[best]['optimizer.learning_rate']}" in text
  assert (tmp_path / "search.svg").exists()


def test_what_matters_is_told_from_what_does_not(trained, tmp_path):
  study, base = settings(trials=24, rungs=1)
  figures = frame.run(study, base, tmp_path)
  by_key = {row["key"]: row for row in figures["what_matters"]}
  rate = by_key["optimizer.learning_rate"]
  assert rate["share"] > 0.8 > rate["chance"]
  assert "**Optimizer.learning_rate matters here**" in (tmp_path / "report.md").read_text()
  assert by_key["optimizer.beta1"]["share"] < by_key["optimizer.beta1"]["chance"]


def test_a_trial_that_diverges_is_the_worst_and_is_named(trained, tmp_path):
  study, base = settings(how="grid", points=3, keys=KEYS[:1], rungs=2)
  figures = frame.run(study, base, tmp_path)
  assert figures["diverged"] == ["002-0-rung0"]
  assert figures["trials"][-1]["metric"] == [None] and figures["best"]["trial"] == 1
  assert (
    "1 runs diverged and are counted as the worst: 002-0-rung0"
    in (tmp_path / "report.md").read_text()
  )


def test_a_highest_metric_is_searched_too(trained, tmp_path):
  study, base = settings(metric="max:accuracy", rungs=1)
  figures = frame.run(study, base, tmp_path)
  values = [row["metric"][0] for row in figures["trials"] if None not in row["metric"]]
  assert values == sorted(values, reverse=True) and values[0] < 0


def test_ranges_and_choices():
  rng = np.random.default_rng(0)
  log = search_space.parse("a.b=log(1e-4,1e-2)")
  drawn = np.array([log.draw(rng) for _ in range(2_000)])
  assert 1e-4 <= drawn.min() and drawn.max() <= 1e-2
  assert (drawn < 1e-3).mean() == pytest.approx(0.5, abs=0.05)
  assert log.points(3) == [1e-4, 1e-3, 1e-2]
  assert search_space.parse("a.b=uniform(0,0.5)").points(3) == [0.0, 0.25, 0.5]
  assert search_space.parse("a.b=8|True|adamw").choices == (8, True, "adamw")


def test_more_trials_keep_those_before_them():
  few, many = settings(trials=4)[0].values(), settings(trials=9)[0].values()
  assert many[:4] == few


@pytest.mark.parametrize(
  "changes, message",
  [
    ({"keys": ()}, "names no key"),
    ({"keys": ("optimizer.learning_rate",)}, "expected GROUP.KEY=a|b|c"),
    ({"keys": ("optimizer.learning_rat=0.1|0.2",)}, "did you mean .*optimizer.learning_rate"),
    ({"keys": ("optimizer.learning_rate=log(0,1)",)}, "from one above 0"),
    ({"keys": ("optimizer.learning_rate=uniform(2,1)",)}, "from a lower to a higher"),
    ({"keys": ("optimizer.name=adamw|adam",)}, "config.optimizer.name must be"),
    ({"keys": ("training.seed=1|2",)}, "training.seed is not searched"),
    ({"keys": ("training.batch_size=16|24.5",)}, "24.5 becomes 24; give whole"),
    ({"keys": ("optimizer.warmup_steps=log(0.1,0.4)",)}, "a logarithm from 1 on"),
    ({"metric": "loss"}, "expected min:NAME or max:NAME"),
    ({"metric": "min:f1"}, "have no f1; they have accuracy, loss"),
    ({"how": "bayes"}, "config.study.how"),
  ],
)
def test_mistakes_are_one_line(trained, tmp_path, changes, message):
  with pytest.raises(UserError, match=message) as error:
    study, base = settings(**changes)
    frame.run(study, base, tmp_path)
  assert "\n" not in str(error.value)


def test_a_config_file_of_any_run():
  config = study_search.get_config("configs/pretrain_bert.py:tiny")
  assert config.run.model.name == "bert"
  with pytest.raises(UserError, match="configs/nothing.py is no config file"):
    study_search.get_config("configs/nothing.py")
