"""The label study: many runs at a time equal the runs alone, the interval is scipy's."""

import jax
import numpy as np
import pytest
import scipy.stats

from llm import sharding
from llm.config import DataConfig, MeshConfig, ModelConfig
from llm.data import sources
from llm.models import classical
from llm.objectives import classification
from llm.studies import label_efficiency
from llm.studies.label_efficiency import Run, Setting
from llm.training import experiment
from llm.training import step as step_lib


class _Bar:
  def update(self):
    pass


@pytest.fixture(scope="module")
def study(reviews, byte_tokenizer):
  """(tuner over two devices, the splits)."""
  found = {
    s: sources.parse(f"jsonl:{reviews}/{s}.jsonl", DataConfig())[0] for s in ("train", "eval")
  }
  objective = classification.Objective(pooling="mean").fit([found["train"]], None)
  config = ModelConfig(
    name="bert",
    num_layers=1,
    width=32,
    num_heads=2,
    mlp_dim=64,
    max_length=48,
    vocab_size=byte_tokenizer.vocab_size,
    dropout=0.0,
  )
  splits = {
    s: label_efficiency.encode(objective, source, byte_tokenizer, config, 48)
    for s, source in found.items()
  }
  one = {k: v[:1] for k, v in splits["train"].arrays.items()}
  starts = {
    arm: jax.tree.map(
      np.asarray,
      step_lib.init_params(experiment.build(objective, config), one, jax.random.key(seed)),
    )
    for seed, arm in enumerate(("pretrained", "scratch"))
  }
  mesh = sharding.make_mesh(MeshConfig(data=2), jax.devices()[:2])
  return label_efficiency.FineTuner(objective, config, starts, 8, mesh), splits


def test_runs_do_not_touch_their_neighbours(study):
  """A run beside others, of its own length or another, ends as it does alone."""
  tuner, splits = study

  def draw(n):
    return label_efficiency.draw(splits["train"], 24, n)

  runs = [
    Run("pretrained", draw(0), 3e-3, 2, 0),
    Run("scratch", draw(1), 1e-3, 2, 1),
    Run("scratch", draw(1), 3e-3, 4, 1),
  ]
  together = tuner.accuracies(runs, splits["train"], splits["eval"], _Bar())
  assert together == [
    tuner.accuracies([run], splits["train"], splits["eval"], _Bar())[0] for run in runs
  ]


def test_a_plain_study_learns_and_its_rows_hold_what_was_measured(study):
  tuner, splits = study
  setting = Setting(0, draws=2, searched=1, learning_rates=(1e-5, 1e-2), epochs=(10,))
  rows, differences = label_efficiency.run(
    tuner, [setting], splits["train"], splits["eval"], splits["eval"]
  )
  found = {r["model"]: r for r in rows}
  assert set(found) == {"pretrained", "scratch", *classical.MODELS}
  for arm in ("pretrained", "scratch"):
    assert found[arm]["chosen"]["learning_rate"] == 1e-2 and found[arm]["accuracy_mean"] > 0.9
    assert (
      found[arm]["accuracy_mean"] == np.mean(found[arm]["accuracies"]) and found[arm]["seeds"] == 2
    )
  assert min(found[m]["accuracy_mean"] for m in classical.MODELS) > 0.8
  assert differences[0]["labels"] == 96


def test_paired_interval_is_scipys():
  rng = np.random.default_rng(0)
  a, b = rng.random(20), rng.random(20)
  low, high = scipy.stats.ttest_rel(a, b).confidence_interval(0.95)
  np.testing.assert_allclose(
    label_efficiency.paired_difference(a, b), ((a - b).mean(), low, high), rtol=1e-12
  )


def test_draws_are_distinct_rows_and_differ(study):
  train = study[1]["train"]
  first, second = (label_efficiency.draw(train, 24, n) for n in (0, 1))
  assert (
    len(set(first)) == 24
    and set(first) != set(second)
    and first == label_efficiency.draw(train, 24, 0)
  )
