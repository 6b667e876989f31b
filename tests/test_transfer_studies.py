"""The studies of transfer: labels, related tasks, GLUE and architectures, on small stand-ins."""

import json
import random

import numpy as np
import pytest

from configs import study_glue, study_label_efficiency, study_related_tasks
from llm import config as config_lib
from llm.core import UserError
from llm.data import glue as glue_tasks
from llm.studies import few_labels, frame, glue, label_efficiency, related_tasks
from llm.training import loop
from tests.conftest import sentences


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


def build(name, module, **changes):
  """(the study with these settings, the config of its runs)."""
  config = module.get_config()
  config.study.update(changes)
  return frame.build(name, config.study.to_dict()), config.run


@pytest.mark.slow
def test_glue_on_stand_ins(glue_files, bert_start, tmp_path):
  """All nine tasks are trained and scored; RTE starts from MNLI; the report is made again."""
  study, run = build(
    "glue",
    study_glue,
    data=f"jsonl:{glue_files}/{{task}}_{{split}}.jsonl",
    fields="ours",
    rates=("1e-2",),
    epochs=("1",),
    seeds=1,
    from_mnli=("rte",),
  )
  run.transfer.checkpoint = str(bert_start)
  run.training.update(batch_size=8, sequence_length=64)
  figures = frame.run(study, config_lib.freeze(run), tmp_path)
  assert set(figures["tasks"]) == set(glue_tasks.TASKS)
  assert set(figures["tasks"]["stsb"]["figures"]) == {"pearson", "spearman"}
  assert 0 < figures["tasks"]["mnli"]["figures"]["mismatched"]["median"] <= 1
  rte = json.loads((tmp_path / "runs" / "rte-1e-2-1-0" / "config.json").read_text())
  assert rte["transfer"]["checkpoint"].endswith("runs/mnli-1e-2-1-0")
  text = (tmp_path / "report.md").read_text()
  average = glue._average([glue._cell(figures["tasks"][t]["figures"]) for t in glue_tasks.TASKS])
  assert f" {average} " in text and "| BERT tiny, test" in text
  assert frame.run(study, config_lib.freeze(run), tmp_path) == figures
