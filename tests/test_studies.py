"""The studies: runs beside others are runs alone, words follow from numbers, as do intervals."""

import dataclasses
import math

import jax
import numpy as np
import pytest
import scipy.stats

from llm import sharding
from llm.config import DataConfig, MeshConfig, ModelConfig
from llm.core import UserError, unflatten
from llm.data import sources
from llm.models import classical
from llm.objectives import classification
from llm.runs import metrics
from llm.studies import fine_tuner, label_curve, report, two_phases
from llm.studies.fine_tuner import Run
from llm.studies.label_curve import Setting
from llm.studies.report import Compared
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
    s: fine_tuner.encode(objective, source, byte_tokenizer, config, 48)
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
  return fine_tuner.FineTuner(objective, config, starts, 8, mesh), splits


def test_runs_do_not_touch_their_neighbours(study):
  """A run beside others, of its own length or another, ends as it does alone."""
  tuner, splits = study

  def draw(n):
    return label_curve.draw(splits["train"], 24, n)

  runs = [
    Run("pretrained", draw(0), 3e-3, 2, 0),
    Run("scratch", draw(1), 1e-3, 2, 1),
    Run("scratch", draw(1), 3e-3, 4, 1),
  ]
  together = tuner.accuracies(runs, splits["train"], splits["eval"], _Bar())
  assert together == [
    tuner.accuracies([run], splits["train"], splits["eval"], _Bar())[0] for run in runs
  ]


def test_tuners_of_one_network_share_their_programs(study):
  """A second tuner, of other starts and another length, compiles nothing."""
  tuner, splits = study
  train, held_out = splits["train"], splits["eval"]
  starts = {"pretrained": unflatten(tuner.starts["scratch"])}
  programs = tuner.programs
  other = fine_tuner.FineTuner(programs.objective, tuner.model_config, starts, 8, tuner.mesh)
  rows = label_curve.draw(train, 24, 0)
  tuner.accuracies([Run("pretrained", rows, 1e-3, 1, 0)], train, held_out, _Bar())
  all_programs = (programs.init_states, programs.train_steps, programs.predictions)
  before = [compiled._cache_size() for compiled in all_programs]
  other.accuracies([Run("pretrained", rows, 3e-3, 2, 1)], train, held_out, _Bar())
  assert [compiled._cache_size() for compiled in all_programs] == before


def test_a_plain_study_learns_and_its_rows_hold_what_was_measured(study):
  tuner, splits = study
  setting = Setting(0, draws=2, searched=1, learning_rates=(1e-5, 1e-2), epochs=(10,))
  rows, differences = label_curve.run(
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


def test_a_rate_that_diverges_is_counted_and_not_chosen(study, capsys):
  """Predictions of NaN would all be class 0, which is right for half of the labels."""
  tuner, splits = study
  train, held_out = splits["train"], splits["eval"]
  setting = Setting(24, draws=2, searched=2, learning_rates=(1e30, 1e-6), epochs=(2,))
  rows, _ = label_curve.run(tuner, [setting], train, held_out, held_out)
  arms = {row["model"]: row for row in rows}
  for arm in ("pretrained", "scratch"):
    chosen = arms[arm]["chosen"]
    assert chosen["learning_rate"] == 1e-6 and (chosen["diverged"], chosen["runs"]) == (2, 4)
    assert arms[arm]["diverged"] == 0
  assert capsys.readouterr().out.count("(2 of the 4 runs of its search diverged)") == 2
  bad = dataclasses.replace(setting, learning_rates=(1e30, 1e31))
  with pytest.raises(UserError, match="pretrained at 24 labels diverged at every .*: 1e.30, 1e.31"):
    label_curve.measure(tuner, bad, train, held_out, held_out, _Bar())
  # Without a search, a run that diverges has labelled nothing right.
  alone = dataclasses.replace(setting, learning_rates=(1e30,))
  row = label_curve.measure(tuner, alone, train, None, held_out, _Bar())[0]
  assert row["accuracies"] == [0.0, 0.0] and row["diverged"] == 2
  assert label_curve.in_words(row).endswith("(2 of its 2 runs diverged and count as 0)")


def test_a_study_that_cannot_be_made_is_one_line_before_any_run(study):
  tuner, splits = study
  train, held_out = splits["train"], splits["eval"]
  of_one_class = np.flatnonzero(train.labels == 1)
  one_class = dataclasses.replace(
    train,
    texts=[train.texts[row] for row in of_one_class],
    labels=train.labels[of_one_class],
    arrays={name: array[of_one_class] for name, array in train.arrays.items()},
  )
  empty = dataclasses.replace(held_out, texts=[], labels=held_out.labels[:0], arrays={})
  fine = Setting(24, draws=1, searched=1, learning_rates=(1e-3, 1e-2), epochs=(1,))
  many = dataclasses.replace(fine, labels=97)
  for settings, learned, validation, message in (
    ([fine, many], train, held_out, "97 labels were asked for, but the training split has 96"),
    ([fine], train, None, "a search needs validation data, and there are none"),
    ([fine], train, empty, "a search needs validation data, and there are none"),
    ([fine], one_class, held_out, "the training split has one class alone"),
  ):
    with pytest.MonkeyPatch.context() as patch:
      patch.setattr(tuner, "accuracies", lambda *_: pytest.fail("a run was trained"))
      with pytest.raises(UserError, match=message) as error:
        label_curve.run(tuner, settings, learned, validation, held_out)
    assert "\n" not in str(error.value)


def test_paired_interval_is_scipys():
  rng = np.random.default_rng(0)
  a, b = rng.random(20), rng.random(20)
  low, high = scipy.stats.ttest_rel(a, b).confidence_interval(0.95)
  np.testing.assert_allclose(
    label_curve.paired_difference(a, b), ((a - b).mean(), low, high), rtol=1e-12
  )


def test_an_interval_over_seeds_is_scipys_where_one_of_both_is_constant():
  """And for the mean of a token, the delta method by hand."""
  values = np.random.default_rng(0).normal(3, 1, 60)
  theirs = scipy.stats.ttest_1samp(values, 0).confidence_interval(0.95)
  np.testing.assert_allclose(metrics.seeds_interval(values[None]), theirs, rtol=1e-12)
  np.testing.assert_allclose(metrics.seeds_interval(values[:, None].repeat(5, 1)), theirs)
  assert np.isnan(metrics.seeds_interval(values[:1, None])).all()
  weights = np.random.default_rng(1).integers(1, 9, 60).astype(float)
  low, high = metrics.seeds_interval((values * weights)[None], weights)
  mean = np.average(values, weights=weights)
  deviation = np.std((values - mean) * weights / weights.mean(), ddof=1)
  half = scipy.stats.t.ppf(0.975, 59) * deviation / 60**0.5
  np.testing.assert_allclose((low, high), (mean - half, mean + half))


@pytest.mark.parametrize("seeds, records", [(2, 3), (2, 6), (3, 200)])
def test_an_interval_over_seeds_holds_the_truth_in_95_of_100_cases(seeds, records):
  """Seeds, records and their meeting all have noise; a bootstrap misses up to 22 of 100."""
  rng = np.random.default_rng(seeds * records)
  held = 0
  for _ in range(500):
    of_seed = 0.5 * rng.normal(size=(seeds, 1)) / records**0.5
    values = of_seed + rng.normal(size=(1, records)) + rng.normal(size=(seeds, records))
    low, high = metrics.seeds_interval(values)
    held += low <= 0 <= high
  assert 0.92 < held / 500


def test_replies_are_compared_by_the_loss_of_a_token():
  """Two seeds; the long reply counts by its tokens."""
  tokens = [9.0, 1.0]
  losses = np.array([[[9.0, 9.0], [5.0, 1.0]], [[18.0, 9.0], [3.0, 1.0]]])
  scratch = losses + [1.0, 0.0]
  compared = two_phases.replies_difference(losses, scratch)
  assert (losses[0, :, 1] == tokens).all()
  assert compared.pretrained == pytest.approx((14 + 21) / 2 / 10)
  assert compared.difference == pytest.approx(-0.2) and compared.lower
  assert compared.low < -0.2 < compared.high


def test_draws_are_distinct_rows_and_differ(study):
  train = study[1]["train"]
  first, second = (label_curve.draw(train, 24, n) for n in (0, 1))
  assert (
    len(set(first)) == 24 and set(first) != set(second) and first == label_curve.draw(train, 24, 0)
  )


def test_labels_that_are_worth_the_same():
  """64 labels reach 60, which the other arm has half way from 100 to 400 labels: at 200."""
  curve = {100: [0.55, 0.55], 400: [0.65, 0.65], 1600: [0.75]}
  equal, low, high = label_curve.equivalent_labels([0.60, 0.60], curve)
  assert equal == pytest.approx(200, rel=1e-3) and (low, high) == (equal, equal)
  assert label_curve.equivalent_labels([0.5], curve)[0] == pytest.approx(100)
  assert label_curve.equivalent_labels([0.9], curve)[0] == pytest.approx(1600)
  # A curve that falls counts as one that stays: fewer labels reach what more do.
  assert label_curve.equivalent_labels([0.6], {100: [0.6], 400: [0.5]})[0] <= 400
  _, low, high = label_curve.equivalent_labels([0.58, 0.62], curve)
  assert low < 200 < high


ABOVE = Compared("sentiment, 64 labels", "accuracy", 0.60, 0.55, 0.05, 0.02, 0.08, {"nbsvm": 0.58})
LOSS = Compared("replies to prompts", "nats a token", 5.0, 5.5, -0.5, -0.6, -0.4, {}, lower=True)


@pytest.mark.parametrize(
  "compared, change, said",
  [
    (ABOVE, {}, "by +5.0 points [+2.0, +8.0]: pretraining helps"),
    (ABOVE, dict(low=-0.01), "[-1.0, +8.0]: not told apart"),
    (ABOVE, dict(difference=-0.05, low=-0.08, high=-0.02), "-5.0 points [-8.0, -2.0]: pretraining"),
    (ABOVE, dict(difference=-0.05, low=-0.08, high=-0.02), "harms"),
    (ABOVE, {}, "the better network is 2.0 points above nbsvm"),
    (ABOVE, dict(others={"nbsvm": 0.63, "tfidf_lr": 0.61}), "is 3.0 points below nbsvm"),
    (LOSS, {}, "by -0.50 [-0.60, -0.40]: pretraining helps"),
    (LOSS, dict(difference=0.5, low=0.4, high=0.6), "pretraining harms"),
    (LOSS, dict(high=0.1), "not told apart"),
    # It was called not told apart.
    (ABOVE, dict(low=math.nan, high=math.nan), "by +5.0 points (one draw); the better network"),
  ],
)
def test_verdicts_follow_from_the_numbers(compared, change, said):
  (sentence,) = report.verdicts([compared._replace(**change)])
  assert said in sentence
  assert (said in report.verdicts([ABOVE])[0]) == (not change and compared is ABOVE)


def test_the_first_line_says_what_the_curve_holds():
  def row(model, labels, *accuracies):
    return {
      "model": model,
      "labels": labels,
      "accuracies": accuracies,
      "accuracy_mean": np.mean(accuracies),
    }

  rows = [
    row("scratch", 64, 0.55, 0.55),
    row("scratch", 256, 0.65, 0.65),
    row("pretrained", 64, 0.60, 0.60),
    row("pretrained", 256, 0.70, 0.70),
    row("published_bert", 64, 0.68, 0.68),
  ]
  sentence = report.worth_sentence(two_phases.worth(rows), 2.0)
  assert "64 labels with 2.0 minutes of pretraining are worth 128 [128 to 128]" in sentence
  assert "with a published checkpoint, 256 or more" in sentence
  rows[2] = row("pretrained", 64, 0.5, 0.5)
  assert "worth 64 or fewer" in report.worth_sentence(two_phases.worth(rows), 2.0)


def test_the_page_holds_the_table_the_picture_and_the_examples(tmp_path):
  (tmp_path / "label_curve.png").write_bytes(b"a picture")
  equal = {"labels": 64, "most": 256, "pretrained": {"labels": 100.0, "low": 80.0, "high": 120.0}}
  pretraining = {"seconds": 60.0, "parameters": 10, "data": {"text": {"tokens": 1e6}}}
  shown = {"Replies": [{"text": "is 1 < 2?", "pretrained": "yes & no", "scratch": ""}]}
  text = report.write(tmp_path, [ABOVE, LOSS], equal, {"BERT": pretraining}, shown, 90.0)
  page = (tmp_path / "report.html").read_text()
  assert text == (tmp_path / "report.md").read_text() and text.index("64 labels with") < 40
  for cell in ("60.0", "+5.0 [+2.0, +8.0]", "-0.50 [-0.60, -0.40]", "pretraining helps"):
    assert cell in text and cell in page
  assert (
    "is 1 &lt; 2?" in page and "yes &amp; no" in page and "data:image/png;base64,YSBwaWN0" in page
  )
