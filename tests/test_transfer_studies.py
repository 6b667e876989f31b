"""The studies of transfer: labels, related tasks, GLUE and architectures, on small stand-ins."""

import dataclasses
import importlib
import json
import random
import types

import numpy as np
import pytest

from llm import config as config_lib
from llm.core import UserError
from llm.data import embedded
from llm.data import glue as glue_tasks
from llm.studies import (
  architecture_tasks,
  architectures,
  few_labels,
  frame,
  glue,
)
from llm.studies.related_tasks import STARTS
from llm.training import loop
from tests.conftest import sentences
from tests.test_two_phases import CACHE


@pytest.fixture(scope="module")
def labelled(tmp_path_factory):
  """A folder of two tasks, three splits each. One word of a text tells its label."""
  folder = tmp_path_factory.mktemp("labelled")
  for task, words in (("a", ("praise", "slowly")), ("b", ("warmth", "scene"))):
    for seed, (split, count) in enumerate((("train", 64), ("validation", 32), ("test", 64))):
      lines = []
      for i, text in enumerate(sentences(seed, count)):
        label = ("good", "bad")[i % 2]
        lines.append(json.dumps({"text": f"{words[i % 2]} {text}", "label": label}))
      (folder / f"{task}_{split}.jsonl").write_text("\n".join(lines) + "\n")
  return folder


def build(name, run=(), **changes):
  """(the study with these settings, the config of its runs). run: "group.key" -> value."""
  config = importlib.import_module(f"configs.study_{name}").get_config()
  config.study.update(changes)
  config.run.update_from_flattened_dict(dict(run))
  return frame.build(name, config.study.to_dict()), config_lib.freeze(config.run)


@pytest.fixture
def trained(monkeypatch):
  """The configs that were trained, by a stand-in. Its figures are those of `figures`, a dict."""
  configs = {}
  figures = {}

  def train(config, workdir, **_):
    path = workdir / "result.json"
    if path.exists():
      return json.loads(path.read_text())
    configs[workdir.name] = config
    workdir.mkdir(parents=True)
    result = {"eval": figures[workdir.name], "flops": 1.0, "seconds": 1.0}
    result |= {"parameters": 10, "data": {"text": {"tokens": 100.0}}}
    (workdir / "config.json").write_text(json.dumps(config_lib.thaw(config)))
    path.write_text(json.dumps(result))
    return result

  monkeypatch.setattr(loop, "train", train)
  return configs, figures


def measured(accuracy):
  """A stand-in for Cell.measured: accuracies of the draws by accuracy(cell), with their noise."""

  def figures(cell):
    noise = np.random.default_rng(0).normal(0, 0.002, cell.setting.draws)
    accuracies = (accuracy(cell) + noise).tolist()
    row = {
      "model": "arm",
      "labels": cell.setting.labels,
      "seeds": len(accuracies),
      "accuracy_mean": float(np.mean(accuracies)),
      "accuracy_std": float(np.std(accuracies)),
      "accuracies": accuracies,
      "chosen": {"learning_rate": 1e-3, "epochs": 1},
    }
    return {"rows": [row], "eval": {"accuracy": row["accuracy_mean"]}, "flops": 1.0}

  return figures


def reaches(labels):
  """Accuracy that rises by a tenth for every doubling of the labels, from 0.5 at 16."""
  return 0.5 + 0.05 * np.log2(labels / 16)


def test_labels_that_are_worth_the_same_are_found(trained, labelled, tmp_path, monkeypatch):
  """Pretraining counts as 4 times the labels, and the middle phase as 8 times."""
  worth = {"pretrained": 4, "pretrained_and_middle": 8, "scratch": 1, "classical": 1}
  plain = measured(lambda cell: reaches(cell.setting.labels * worth[cell.facts["arm"]]))
  monkeypatch.setattr(few_labels.Cell, "measured", plain)
  monkeypatch.setattr(few_labels.Classical, "measured", plain)
  monkeypatch.setattr("llm.checkpoints.locate.find", lambda path, *_: path)
  config = types.SimpleNamespace(objective={"name": "masked_lm"})
  step = types.SimpleNamespace(config=config)
  monkeypatch.setattr("llm.checkpoints.manager.describe", lambda _: step)
  configs, figures = trained
  figures |= {name: {"loss": 1.0} for name in ("pretrained", "pretrained_and_middle")}
  study, base = build(
    "label_efficiency",
    target=f"jsonl:{labelled}/a_{{split}}.jsonl",
    checkpoints=("pretrained=here",),
    labels=("16x8:1", "64x8:1", "256x8:1", "1024x8:1"),
  )
  result = frame.run(study, base, tmp_path)
  middle = configs["pretrained_and_middle"]
  assert middle.transfer.checkpoint == str(tmp_path / "runs" / "pretrained")
  assert middle.data.train.endswith("a_train.jsonl") and middle.training.steps == 300
  for point in result["worth"]:
    factor = worth[point["arm"]]
    assert point["equal"] == pytest.approx(min(1024, factor * point["labels"]), rel=0.05)
    assert point["low"] <= point["equal"] * 1.001 and point["high"] >= point["equal"] * 0.999
  text = (tmp_path / "report.md").read_text()
  assert "- **16 labels with `pretrained` are worth 6" in text
  again = []

  def measured_again(cell):
    again.append(cell.name)
    return plain(cell)

  monkeypatch.setattr(few_labels.Cell, "measured", measured_again)
  assert frame.run(study, base, tmp_path) == result and not again
  more = dataclasses.replace(study, labels=(*study.labels[:3], "1024x9:1"))
  frame.run(more, base, tmp_path)
  assert len(again) == 3 and all("-1024x9-" in name for name in again)


def test_what_helps_what_is_found(trained, labelled, tmp_path, monkeypatch):
  """a helps b by 10 points, and b does nothing for a."""

  def accuracy(cell):
    helped = (cell.facts["source"], cell.facts["target"]) == ("a", "b")
    return 0.6 + 0.1 * helped + 0.001 * cell.facts["seed"]

  monkeypatch.setattr(few_labels.Cell, "measured", measured(accuracy))
  configs, figures = trained
  names = [f"{start}-{task}-{n}" for start in STARTS for task in "ab" for n in (0, 1)]
  figures |= {name: {"accuracy": 0.8} for name in names}
  study, base = build(
    "related_tasks",
    tasks=tuple(f"{task}=jsonl:{labelled}/{task}_{{split}}.jsonl" for task in "ab"),
    checkpoint="bert",
    labels=("16x4:1",),
  )
  result = frame.run(study, base, tmp_path)
  assert configs["scratch-a-0"].transfer.skip == ("",) != configs["pretrained-a-0"].transfer.skip
  assert {(g["source"], g["target"]) for g in result["gains"]} == {("a", "b"), ("b", "a")}
  for gain in result["gains"]:
    expected = 0.1 if gain["source"] == "a" else 0.0
    assert gain["gain"] == pytest.approx(expected, abs=0.002)
    assert (gain["low"] > 0) == (gain["source"] == "a")
  text = (tmp_path / "report.md").read_text()
  assert "**Of 4 pairs of source and target, 2 help and 0 harm; 2 are not told apart" in text
  starts = [run for run in result["runs"] if run["role"] == "fine-tuning" and run["source"] == "a"]
  assert len(starts) == 4  # two starts, two seeds


def test_glue_takes_the_best_rate_and_the_median_of_seeds(trained, glue_files, tmp_path):
  def figures_of(name):
    value = 0.7 + 0.01 * int(name[-1]) + 0.1 * ("-1e-4-" in name)
    return {metric: value for metric in ("accuracy", "f1", "mcc", "pearson", "spearman")}

  configs, figures = trained
  tasks = ("sst2", "stsb", "rte", "mnli")
  for task in tasks:
    for rate in ("3e-4", "1e-4", "3e-5"):
      for seed in range(3):
        name = f"{task}-{rate}-4-{seed}"
        figures[name] = figures_of(name)
  study, base = build(
    "glue",
    run={"transfer.checkpoint": "bert"},
    data=f"jsonl:{glue_files}/{{task}}_{{split}}.jsonl",
    fields="ours",
    tasks=tasks,
    rates=("3e-4", "1e-4", "3e-5"),
    seeds=3,
    from_mnli=("rte",),
  )
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(glue.WithMismatched, "score", lambda *_: {"mismatched": 0.75})
    result = frame.run(study, base, tmp_path)
  for task in tasks:
    assert result["tasks"][task]["rate"] == "1e-4" and result["tasks"][task]["seeds"] == 3
    figure = result["tasks"][task]["figures"][glue_tasks.TASKS[task].metric]
    assert [figure[name] for name in ("low", "median", "high")] == pytest.approx([0.8, 0.81, 0.82])
  assert sum(name.startswith("sst2") for name in configs) == 3 + 2
  start = configs["rte-3e-4-4-0"].transfer.checkpoint
  assert start == str(tmp_path / "runs" / "mnli-1e-4-4-0")
  assert configs["stsb-1e-4-4-0"].objective["num_classes"] == 1
  assert "| 81.0/75.0 " in (tmp_path / "report.md").read_text()


@pytest.mark.parametrize("task, split", [("sst2", "train"), ("mnli", glue_tasks.MISMATCHED)])
def test_glue_misses_a_split_before_anything_is_trained(task, split, glue_files, tmp_path):
  for path in glue_files.iterdir():
    if path.name != f"{task}_{split}.jsonl":
      (tmp_path / path.name).write_text(path.read_text())
  study, base = build(
    "glue",
    run={"transfer.checkpoint": "bert"},
    data=f"jsonl:{tmp_path}/{{task}}_{{split}}.jsonl",
    fields="ours",
    tasks=(task,),
  )
  with pytest.raises(UserError, match=f"{task}_{split}.jsonl: no such file"):
    study.next_runs(base, [], tmp_path)


def test_the_average_is_that_of_the_paper():
  """Devlin et al. 2019 (table 1) print 79.6 for base and 82.1 for large."""
  averages = {name: glue._average(text.split()) for name, text in glue.PUBLISHED.items()}
  assert averages["BERT base"] == "79.6" and averages["BERT large"] == "82.1"


@pytest.mark.parametrize("model", architectures.Study().models[::2])
def test_architectures_get_the_same_flops(model):
  """The steps of each follow from FLOPs that are counted without data."""
  study, base = build("architectures", run={"model.width": 64, "tokenizer.vocab_size": 512})
  config = study._pretraining(base, model, "1e-3", 0).config
  text = json.dumps(config_lib.thaw(config))
  flops = config.training.steps * architectures.flops_a_step(text)
  assert flops == pytest.approx(float(study.budget), rel=0.01)


def test_each_architecture_is_trained_with_what_suits_it(tmp_path, monkeypatch):
  """T5 with Adafactor at rates of its own, as many as the others have, from its own start."""
  monkeypatch.setattr(architecture_tasks, "write_files", lambda *_: None)
  study, base = build("architectures", models=("t5:2:span_corruption", "gpt:2:causal_lm"))
  runs = study.next_runs(base, [], tmp_path)
  trained = [
    (run.config.model.name, run.config.optimizer.name, run.config.optimizer.learning_rate)
    for run in runs
  ]
  assert trained == [
    ("t5", "adafactor", 0.02),
    ("t5", "adafactor", 0.04),
    ("gpt", "adamw", 0.001),
    ("gpt", "adamw", 0.003),
  ]
  quick = study.quick()
  assert quick.rates == ("3e-3", "t5=4e-2") and quick.tuning_rates == ("1e-3", "t5=1e-2")


def test_architectures_compare_what_was_best_on_validation(trained, tmp_path, monkeypatch):
  """bert is better on sentiment at the second rate, and gpt beside t5 on replies not told apart."""
  configs, figures = trained
  monkeypatch.setattr(architectures, "flops_a_step", lambda config: 1e11)
  monkeypatch.setattr(architecture_tasks.Writes, "score", lambda *_: {"written_f1": 0.5})
  monkeypatch.setattr(architecture_tasks, "write_files", lambda *_: None)
  monkeypatch.setattr(architecture_tasks, "_targets", lambda _: ("a=a", "b=b"))
  monkeypatch.setattr(architecture_tasks, "_rows", lambda *_: 4)

  def figures_of(name):
    rng = np.random.default_rng(len(name) + sum(map(ord, name)))
    best = "3e-3" in name
    value = 0.6 + 0.1 * best + 0.1 * ("bert" in name) + 0.005 * rng.normal()
    loss = 3.0 - 0.1 * best + 0.01 * rng.normal()
    return {"accuracy": value, "choice_accuracy": value, "f1": value, "loss": loss}

  for model in ("bert-2-masked_lm", "gpt-2-causal_lm", "t5-1-span_corruption"):
    for task in ("pretraining", "sentiment", "questions", "replies"):
      for rate in ("1e-3", "3e-3"):
        for seed in range(3):
          for split in ("", "-validation", "-test"):
            name = f"{model}-{task}-{rate}-{seed}{split}"
            figures[name] = figures_of(name)
  models = ("bert:2:masked_lm", "gpt:2:causal_lm", "t5:1:span_corruption")
  rates = ("1e-3", "3e-3")
  study, base = build("architectures", models=models, rates=rates, tuning_rates=rates)
  result = frame.run(study, base, tmp_path)
  sentiment = result["tasks"]["sentiment"]
  assert {of["rate"] for of in sentiment.values()} == {"3e-3"}
  assert all(len(of["values"]) == 3 for of in sentiment.values())
  assert {entry["best"] for entry in result["compared"]["sentiment"]} == {models[0]}
  assert all(entry["told_apart"] for entry in result["compared"]["sentiment"])
  assert set(result["tasks"]["replies"]) == set(models[1:])
  assert not any("masked_lm-replies" in name for name in configs)
  start = configs["gpt-2-causal_lm-replies-3e-3-2-test"].transfer.checkpoint
  assert start.endswith("gpt-2-causal_lm-pretraining-3e-3-2")


def test_questions_keep_their_answer_in_a_short_context():
  text = " ".join(f"w{number}" for number in range(300))
  for answer in ("w0", "w150 w151", "w299"):
    record = {"text": text, "question": "who?", "id": "1"}
    record["answers"] = [{"text": answer, "answer_start": text.index(answer)}]
    short = architecture_tasks._question(record)
    (given,) = short["answers"]
    assert short["text"][given["answer_start"] :].startswith(answer)
    assert len(short["text"].split()) <= architecture_tasks.CONTEXT and short["target"] == answer


MISTAKES = [
  ("label_efficiency", {"target": "jsonl:a.jsonl"}, "write {split} where"),
  ("label_efficiency", {"target": "jsonl:nowhere_{split}.jsonl"}, "no such file"),
  ("label_efficiency", {"labels": ("64",)}, "not LABELSxDRAWS:EPOCHS"),
  ("label_efficiency", {"labels": ("64x2:1",)}, "needs 2 label counts at least"),
  ("label_efficiency", {"rates": ("fast",)}, "are no numbers"),
  ("label_efficiency", {"labels": ("64x0:1",)}, "must be positive"),
  ("label_efficiency", {"checkpoints": ("scratch=here",)}, "the name 'scratch' is taken"),
  ("label_efficiency", {"checkpoints": ("runs/bert",)}, "not NAME=VALUE"),
  ("label_efficiency", {"checkpoints": ()}, "checkpoints is empty"),
  ("label_efficiency", {"middle": ("other",)}, "is none of the arms"),
  ("related_tasks", {"tasks": ("a=embedded:reviews[{split}]",)}, "transfer needs 2 tasks"),
  ("related_tasks", {"starts": ("random",)}, "must be of scratch, pretrained"),
  ("glue", {"tasks": ("sst3",)}, "no task 'sst3'; the tasks are cola"),
  ("glue", {}, "give what is fine-tuned: --config.run.transfer.checkpoint"),
  ("glue", {"data": "tfds:glue"}, "must have {task} and {split}"),
  ("glue", {"tasks": ("rte",), "from_mnli": ("rte",)}, "and mnli where from_mnli"),
  ("architectures", {"models": ("bert:2",)}, "not NAME:LAYERS:OBJECTIVE"),
  ("architectures", {"budget": "much"}, "must be a number of FLOPs"),
  ("architectures", {"epochs": ("poems=3",)}, "not TASK=EPOCHS"),
  ("architectures", {"rates": ("fast",)}, "'fast' is no learning rate"),
  ("architectures", {"rates": ("1e-3", "t5=1e-2", "t5=2e-2")}, "equal search needs as many"),
  ("architectures", {"tuning_rates": ("t5=1e-2",)}, "equal search needs as many"),
  ("architectures", {"adafactor": ("t6",)}, "'t6' is no architecture: they are bert"),
  ("architectures", {"rates": ("1e-3", "T5=1e-2")}, "'T5' is no architecture: they are bert"),
]


def test_a_quick_study_leaves_out_what_it_cannot_do():
  """It ended in an error about keys that nobody had set."""
  glue_study, _ = build("glue", from_mnli=("rte", "mrpc"))
  assert not glue_study.quick().from_mnli
  labels, base = build(
    "label_efficiency", middle=("pretrained", "published"), labels=("8x2:2", "16x2:2")
  )
  assert labels.quick().middle == ("pretrained",) and labels.quick().labels == labels.labels
  shapes, _ = build("architectures", epochs=("sentiment=3",))
  assert shapes.quick().epochs == ("sentiment=1",)


@pytest.mark.parametrize("name, changes, message", MISTAKES)
def test_mistakes_are_one_line(name, changes, message, tmp_path):
  with pytest.raises(UserError) as error:
    study, base = build(name, **changes)
    study.next_runs(base, [], tmp_path)
  assert message in str(error.value) and "\n" not in str(error.value)


@pytest.fixture(scope="module")
def glue_files(tmp_path_factory):
  """Stand-ins of the tasks of GLUE: a word of the text tells its label."""
  folder = tmp_path_factory.mktemp("glue")
  rng = random.Random(0)
  words = ("praise", "slowly", "plot")
  for task, facts in glue_tasks.TASKS.items():
    splits = {"train": 48, facts.validation: 24}
    if task == "mnli":
      splits[glue_tasks.MISMATCHED] = 24
    for seed, (split, count) in enumerate(splits.items()):
      lines = []
      for text in sentences(seed, count):
        number = rng.randrange(3 if task == "mnli" else 2)
        record = {"text": f"{words[number]} {text}", "label": str(number)}
        if "text_pair" in facts.fields:
          record["text_pair"] = text
        lines.append(json.dumps(record))
      (folder / f"{task}_{split}.jsonl").write_text("\n".join(lines) + "\n")
  return folder


@pytest.mark.slow
def test_glue_on_stand_ins(glue_files, bert_start, tmp_path):
  """Classes, scores, pairs and MNLI's two splits are trained and scored; RTE starts from MNLI."""
  tasks = ("cola", "stsb", "mnli", "rte")
  study, base = build(
    "glue",
    run={
      "transfer.checkpoint": str(bert_start),
      "training.batch_size": 8,
      "training.sequence_length": 64,
    },
    data=f"jsonl:{glue_files}/{{task}}_{{split}}.jsonl",
    fields="ours",
    tasks=tasks,
    rates=("1e-2",),
    epochs=("1",),
    seeds=1,
    from_mnli=("rte",),
  )
  result = frame.run(study, base, tmp_path)
  assert set(result["tasks"]) == set(tasks)
  assert set(result["tasks"]["stsb"]["figures"]) == {"pearson", "spearman"}
  assert 0 < result["tasks"]["mnli"]["figures"]["mismatched"]["median"] <= 1
  config = json.loads((tmp_path / "runs" / "rte-1e-2-1-0" / "config.json").read_text())
  assert config["transfer"]["checkpoint"].endswith("runs/mnli-1e-2-1-0")
  assert "| BERT tiny, test" in (tmp_path / "report.md").read_text()
  assert frame.run(study, base, tmp_path) == result


@pytest.mark.slow
def test_cells_are_trained_for_real(labelled, bert_start, tmp_path):
  """Two arms and the classical models at two label counts, from the sources to the report."""
  study, base = build(
    "label_efficiency",
    target=f"jsonl:{labelled}/a_{{split}}.jsonl",
    checkpoints=(f"bert={bert_start}",),
    middle=(),
    labels=("16x2:2", "0x1:2"),
    rates=("0.1",),
    length=64,
    batch_size=8,
  )
  result = frame.run(study, base, tmp_path)
  rows = {(row["model"], row["labels"]): row for row in result["curve"]}
  assert set(rows) == {
    (model, labels) for model in ("bert", "scratch", "nbsvm", "tfidf_lr") for labels in (16, 64)
  }
  assert rows["nbsvm", 64]["accuracy_mean"] > 0.9  # one word tells the label
  flops = {(run["arm"], run["labels"]): run["flops"] for run in result["runs"]}
  # 2 draws of 2 epochs of 2 batches, and 1 draw of 2 epochs of 8.
  assert flops["bert", 0] == pytest.approx(2 * flops["bert", 16])


@pytest.mark.slow
def test_the_four_labelled_sets_are_read():
  """All sentences but those that people scored 0; the labels are the signs of the scores."""
  counts = {}
  for name in ("reviews", "products", "editorials", "tweets"):
    records = [r for split in embedded.SPLITS for r in embedded.records(name, split, CACHE)]
    assert all((record["score"] > 0) == (record["label"] == "positive") for record in records)
    counts[name] = len(records)
  assert counts["reviews"] == 5_242 + 5_326
  assert 3_500 < counts["products"] <= 3_708 and 4_900 < counts["editorials"] <= 5_190
  assert 3_900 < counts["tweets"] <= 4_200
