"""Settings that follow the size: published at published shapes, kept by a run, said before it."""

import collections
import dataclasses
import importlib
import json
import math

import jax
import numpy as np
import pytest
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline

from benchmarks import recipes
from llm import config as config_lib
from llm import core, models
from llm.checkpoints import manager
from llm.config import DataConfig, ModelConfig, RecipeConfig
from llm.core import UserError
from llm.data import duplicates, sources
from llm.models.architecture import init_std_of
from llm.runs.progress import Progress
from llm.training import experiment, inherited, loop, recipe
from tests.conftest import sentences, tiny
from tests.test_two_phases import python


def published(family, size):
  return config_lib.freeze(importlib.import_module(f"configs.{family}").get_config(size))


def with_rate(config, **training):
  """The rate of a config, with other keys of `training`."""
  changed = dataclasses.replace(config.training, **training)
  return recipe.learning_rate(dataclasses.replace(config, training=changed))


@pytest.mark.parametrize(
  "family, size, rate",
  [  # Devlin et al. 2019, appendix A.2; Brown et al. 2020, table 2.1
    ("pretrain_bert", "base", 1e-4),
    ("pretrain_bert", "large", 1e-4),
    ("pretrain_bert", "base-512", 1e-4),
    ("pretrain_bert", "tiny", 3e-3),  # of a run of ours (docs/recipes.md)
    ("pretrain_gpt", "small", 6e-4),
    ("pretrain_gpt", "medium", 3e-4),
    ("pretrain_gpt", "175b", 6e-5),
  ],
)
def test_published_shapes_have_published_rates_and_weights(family, size, rate):
  config = published(family, size)
  assert config.optimizer.learning_rate == -1
  assert with_rate(config) == rate
  assert size == "tiny" or init_std_of(config.model, models.facts(config.model)) == 0.02


def test_rates_follow_width_batch_and_steps():
  """Half as wide, twice the rate; four times as deep, a fourth; a fourth of the batch, half."""
  config = published("pretrain_bert", "base")
  steps, rows = config.training.steps, config.training.batch_size
  narrow = dataclasses.replace(config, model=dataclasses.replace(config.model, width=384))
  assert with_rate(narrow) == 2e-4
  assert with_rate(config, batch_size=rows // 4, steps=4 * steps) == 5e-5
  # Fewer tokens: more for a decoder, and not for BERT, whose recipe says its layers.
  assert with_rate(config, steps=steps // 10) == 1e-4
  assert with_rate(config, steps=steps * 10) == pytest.approx(1e-4 * 10**-0.2, rel=0.03)
  free = dataclasses.replace(config, recipe=dataclasses.replace(config.recipe, num_layers=0))
  assert with_rate(free, steps=steps // 10) == pytest.approx(1e-4 * 10**0.2, rel=0.03)
  deep = dataclasses.replace(config, model=dataclasses.replace(config.model, num_layers=48))
  shallow = dataclasses.replace(config, model=dataclasses.replace(config.model, num_layers=6))
  assert with_rate(deep) == 2.5e-5 and with_rate(shallow) == 1e-4
  high = dataclasses.replace(narrow.recipe, learning_rate=6e-3)
  assert with_rate(dataclasses.replace(narrow, recipe=high)) == recipe.HIGHEST_RATE


def test_weights_that_are_left_open_start_as_their_architecture_does():
  """A T5 whose config said nothing started at BERT's 0.05, not at 1 over the root of its inputs."""
  shape = dict(num_layers=1, width=128, num_heads=2, mlp_dim=256, max_length=16)
  starts = {
    name: inherited.completed(ModelConfig(name=name, **shape), None, 300, False).init_std
    for name in models.NAMES
  }
  by_width = 0.02 * 6**0.5
  assert starts == {name: 1.0 if name == "t5" else by_width for name in models.NAMES}


def test_narrow_weights_keep_the_size_of_a_vector_as_wide_ones_do():
  """|W x| / |x| of a fresh square kernel is that of width 768."""
  config = published("pretrain_bert", "base").model
  gains = []
  for width in (128, 768):
    std = init_std_of(dataclasses.replace(config, width=width), models.facts(config))
    kernel = std * jax.random.normal(jax.random.key(0), (width, width))
    vector = jax.random.normal(jax.random.key(1), (width,))
    gains.append(float(np.linalg.norm(vector @ kernel) / np.linalg.norm(vector)))
  assert gains[0] == pytest.approx(gains[1], rel=0.15)


@pytest.mark.slow
def test_the_rate_of_the_rule_is_the_best_at_every_width(tmp_path):
  """Within a factor 2: rates beyond are tried while the best one has no neighbour."""
  output = tmp_path / "recipes.jsonl"
  shapes = ["--families=gpt", "--widths=64,128", "--depths=2", "--steps=100"]
  python("benchmarks/recipes.py", "pretrain", *shapes, f"--output={output}")
  losses = collections.defaultdict(dict)
  for run in map(json.loads, output.read_text().splitlines()):
    losses[run["run"]][run["factor"]] = run["loss"]
  assert len(losses) == 2
  for of_width in losses.values():
    assert 0.5 <= min(of_width, key=of_width.__getitem__) <= 2, losses


def test_a_sweep_goes_on_until_the_best_rate_has_neighbours():
  def tried(best):
    losses = {}
    while (factor := recipes.next_factor(losses)) is not None:
      # A parabola, and all that is more than 8 times too high diverges.
      loss = math.log2(factor / best) ** 2 if factor <= 8 * best else math.nan
      losses[factor] = {"loss": loss}
    return list(losses)

  assert tried(1) == [1, 0.5, 2]
  assert tried(0.5) == [1, 0.5, 2, 0.25]
  assert tried(4) == [1, 0.5, 2, 4, 8]
  assert tried(1 / 32) == [1, 0.5, 2, 0.25, 0.125, 1 / 16]


def test_small_data_are_seen_more_often():
  def epochs(**keys):
    of = RecipeConfig(epochs=3.0, **keys)
    return [recipe.epochs(of, steps) for steps in (10_000, 334, 100, 1)]

  assert epochs() == [3, 3, 10, recipe.MOST_EPOCHS]
  assert epochs(least_steps=400) == [3, 3, 4, recipe.MOST_EPOCHS]


def test_a_run_that_saves_every_epoch_saves_within_a_long_one():
  config = tiny("gpt", "text:a", training__save_every=-1)
  saved = [
    recipe.resolved(config, steps, "min:loss").training.save_every for steps in (7, 200, 450)
  ]
  assert saved == [7, 200, 150]


def test_a_longer_run_keeps_the_rate_that_it_began_with(corpus, tmp_path):
  config = tiny("gpt", f"text:{corpus}", optimizer__learning_rate=-1.0, training__steps=2)
  loop.train(config, tmp_path)
  step = manager.find(tmp_path)
  rate = manager.describe(step).config.optimizer.learning_rate
  assert rate == json.loads((tmp_path / "resolved.json").read_text())["optimizer"]["learning_rate"]
  assert json.loads((tmp_path / "config.json").read_text())["optimizer"]["learning_rate"] == -1
  recipe_of_more = dataclasses.replace(config.recipe, learning_rate=1e-3, width=32)
  longer = dataclasses.replace(
    config,
    recipe=recipe_of_more,
    training=dataclasses.replace(config.training, steps=4),
  )
  assert experiment.prepare(longer).config.optimizer.learning_rate == 1e-3
  assert experiment.prepare(longer, step).config.optimizer.learning_rate == rate > 0


def test_the_best_epoch_is_what_other_commands_take(reviews, bert_start, tmp_path):
  """It is evaluated every epoch, and a run that gets no better ends early."""
  config = tiny(
    "classifier",
    f"jsonl:{reviews}/train.jsonl",
    data__eval=f"jsonl:{reviews}/eval.jsonl",
    transfer__checkpoint=str(bert_start),
    transfer__skip=("^head/",),
    optimizer__learning_rate=0.0,
    training__steps=0,
    training__epochs=-1.0,
    training__eval_every=-1,
    training__keep_best="auto",
    training__keep=1,
    training__patience=2,
  )
  lines = []
  result = loop.train(config, tmp_path / "tuned", say=lines.append)
  evaluated = [
    line["step"]
    for line in map(json.loads, (tmp_path / "tuned/metrics.jsonl").read_text().splitlines())
    if line["split"] == "eval"
  ]
  # At a rate of 0, the first epoch is the best. Two more are no better.
  assert len(evaluated) == 3 and len(set(np.diff(evaluated))) == 1
  assert result["best"]["step"] == evaluated[0] and result["step"] == evaluated[-1]
  assert any("stopped early" in line for line in lines)
  assert manager.find(tmp_path / "tuned").name == str(evaluated[0])
  assert manager.find(tmp_path / "tuned/checkpoints" / str(evaluated[-1])).name == str(
    evaluated[-1]
  )
  again = []
  assert loop.train(config, tmp_path / "tuned", say=again.append) == result
  assert any("already done" in line for line in again)


def test_progress_survives_a_checkpoint_and_forgets_another_goal():
  progress = Progress("max:f1")
  assert [progress.add(step, {"f1": f1}) for step, f1 in enumerate((0.3, 0.5, 0.5, 0.4))] == [
    True,
    True,
    False,
    False,
  ]
  assert (progress.step, progress.since) == (1, 2)
  saved = manager.Best(**json.loads(json.dumps(progress.saved())))
  assert Progress.of_run("max:f1", saved) == progress
  assert Progress.of_run("min:loss", saved).step == -1
  undefined = Progress("max:pearson")
  values = (math.nan, math.nan, 0.1, math.nan, 0.2)
  better = [undefined.add(step, {"pearson": value}) for step, value in enumerate(values)]
  assert better == [True, False, True, False, True]
  with pytest.raises(UserError, match="no 'f1', it has loss"):
    progress.add(4, {"loss": 1.0})


def test_the_baseline_is_scikit_learns(reviews, bert_start, tmp_path):
  train, held_out = (
    [json.loads(line) for line in (reviews / f"{name}.jsonl").read_text().splitlines()]
    for name in ("train", "eval")
  )
  # Labels of the words, and a tenth of them wrong: neither figure is 0 or 1.
  for number, record in enumerate(train + held_out):
    record["label"] = ("bad" if number % 10 == 0 else record["label"]) + "!"
  for name, records in (("train", train), ("eval", held_out)):
    (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, records)))
  config = tiny(
    "classifier",
    f"jsonl:{tmp_path}/train.jsonl",
    data__eval=f"jsonl:{tmp_path}/eval.jsonl",
    transfer__checkpoint=str(bert_start),
  )
  made = experiment.prepare(config)
  baselines = made.objective.baselines(made.train, made.held_out)
  model = make_pipeline(
    TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True),
    LogisticRegression(C=10.0, max_iter=1000),
  ).fit([r["text"] for r in train], [r["label"] for r in train])
  theirs = model.score([r["text"] for r in held_out], [r["label"] for r in held_out])
  assert 0.5 < theirs < 1 and baselines["tfidf_accuracy"] == pytest.approx(theirs)
  commonest = [r["label"] for r in held_out].count("bad!") / len(held_out)
  assert baselines["majority_accuracy"] == pytest.approx(commonest)
  assert made.remarks()[0] == f"2 classes: bad! {sum(r['label'] == 'bad!' for r in train)}, " + (
    f"good! {sum(r['label'] == 'good!' for r in train)}"
  )


def test_the_length_that_would_cut_few_is_said(reviews, bert_start, tmp_path):
  config = tiny(
    "classifier",
    f"jsonl:{reviews}/train.jsonl",
    transfer__checkpoint=str(bert_start),
    training__sequence_length=32,
  )
  rows = experiment.prepare(config).batches.rows[0]
  texts = [json.loads(line)["text"] for line in (reviews / "train.jsonl").read_text().splitlines()]
  sizes = np.array([len(text.encode()) + 2 for text in texts])  # a byte is a token
  needed = math.ceil(np.quantile(sizes, 0.99))
  assert f"{(sizes > 32).sum()} were cut" in rows.note
  assert rows.note.endswith(f"({(sizes > 32).mean():.1%}; {needed} would cut 1%)")


def test_duplicates_between_train_and_eval_are_found(tmp_path):
  """Two of 20 are planted, one of them in other case and with other signs."""
  train = [{"text": text, "label": "a"} for text in sentences(1, 50)]
  held_out = [{"text": f"unlike {text}", "label": "b"} for text in sentences(2, 18)]
  planted = [train[3]["text"], train[7]["text"].upper().replace(".", " !")]
  held_out[4:4] = [{"text": text, "label": "b"} for text in planted]
  parsed = []
  for name, records in (("train", train), ("eval", held_out)):
    (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, records)))
    parsed.append(sources.parse_one(f"jsonl:{tmp_path}/{name}.jsonl", DataConfig()))
  both, count = duplicates.between(parsed[:1], parsed[1])
  assert [record["text"] for record in both] == planted and count == 20
  named = "2 of the 20 records.*eval.jsonl:5.*eval.jsonl:6"
  with pytest.warns(core.InputWarning, match=named):
    duplicates.warn(parsed[:1], parsed[1])
  with pytest.warns(core.InputWarning, match="20 of the 20 records"):
    duplicates.warn(parsed[1:], parsed[1])
  duplicates.warn([], parsed[1])


def test_messages_may_be_a_text():
  assert duplicates.given_words({"messages": "Name a colour."}) == "name a colour"


def test_a_run_warns_of_duplicates(reviews, corpus, tmp_path):
  loop.train(tiny("bert", f"text:{corpus}", training__steps=1), tmp_path / "bert")
  train = (reviews / "train.jsonl").read_text().splitlines()
  held_out = (reviews / "eval.jsonl").read_text().splitlines()
  (tmp_path / "eval.jsonl").write_text("\n".join([*held_out, *train[:2]]))
  config = tiny(
    "classifier",
    f"jsonl:{reviews}/train.jsonl",
    data__eval=f"jsonl:{tmp_path}/eval.jsonl",
    transfer__checkpoint=str(tmp_path / "bert"),
    transfer__skip=("^head/",),
    training__steps=1,
  )
  with pytest.warns(core.InputWarning, match="2 of the 34 records of.*eval.jsonl:33"):
    loop.train(config, tmp_path / "tuned", say=loop.silent)


@pytest.mark.parametrize(
  "overrides, message",
  [
    (dict(training__patience=2), "patience=2 needs config.data.eval"),
    (dict(optimizer__learning_rate=-0.5), "must be at least 0, or -1 for the default"),
    (dict(training__steps=3, training__epochs=2.0), "set one of them, the other to 0"),
  ],
)
def test_bad_settings_are_one_line(overrides, message, corpus):
  with pytest.raises(UserError, match=message):
    experiment.prepare(tiny("gpt", f"text:{corpus}", **overrides))
