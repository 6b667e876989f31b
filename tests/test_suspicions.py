"""Data that can be read but is surely a mistake: a warning, or one line that refuses it."""

import json

import pytest

from llm import core
from llm.config import DataConfig
from llm.core import UserError
from llm.data import answers, sources
from llm.data import tokenizer as tokenizer_lib
from llm.objectives import chat, classification, span_qa
from tests.conftest import tiny

MODEL = tiny("bert", "text:a").model
BYTES = tokenizer_lib.ByteTokenizer()


def write(tmp_path, name, *records):
  path = tmp_path / name
  lines = [r if isinstance(r, str) else json.dumps(r) for r in records]
  path.write_text("\n".join(lines) + "\n")
  kind = {"txt": "text", "jsonl": "jsonl", "csv": "csv"}[path.suffix[1:]]
  return sources.parse_one(f"{kind}:{path}", DataConfig())


TEXTS = [
  ("a.txt", ["one", "", "two\0"], "record 2 has the control character '\\\\x00'"),
  ("a.txt", ["one \x1b[0m"], "control character"),
  ("a.jsonl", ['{"text": "a"}', '{"text": "a", "text": "b"}'], "jsonl:2: the key 'text' is there"),
  ("a.csv", ["text,label,label", "a,b,c"], "the column 'label' is there twice"),
]


@pytest.mark.parametrize("name, lines, message", TEXTS)
def test_strange_text_is_said_once(name, lines, message, tmp_path):
  source = write(tmp_path, name, *lines, *lines[-1:])
  with pytest.warns(core.InputWarning, match=message) as said:
    list(source.records())
  assert len([w for w in said if w.category is core.InputWarning]) == 1


def test_whole_text_is_not_warned_of(tmp_path, recwarn):
  list(write(tmp_path, "a.txt", "one\tand\u00a0a half\x0c", "", "two").records())
  list(write(tmp_path, "a.jsonl", {"text": "a", "meta": {"text": "b"}}).records())
  assert core.InputWarning not in [warning.category for warning in recwarn.list]


def test_all_texts_empty_is_refused(tmp_path):
  source = write(tmp_path, "a.jsonl", {"text": "", "label": "a"}, {"text": " ", "label": "b"})
  with pytest.raises(UserError, match="a.jsonl: all of its texts are empty"):
    list(source.records())


def fit(tmp_path, *labels):
  records = [{"text": "a", "label": label} for label in labels]
  return classification.Objective().fit([write(tmp_path, "a.jsonl", *records)], BYTES)


def test_labels_that_are_no_classes(tmp_path):
  with pytest.warns(core.InputWarning, match="jsonl:3: the label is NaN"):
    fit(tmp_path, "good", "bad", float("nan"))
  with pytest.warns(
    core.InputWarning, match="jsonl:2: the label 0.5 has a fraction.*num_classes=1"
  ):
    fit(tmp_path, 1.0, 0.5, 0.25)
  with pytest.raises(UserError, match=r"jsonl:1: the label \['good'\] must be a text or a number"):
    fit(tmp_path, ["good"], ["bad"])


def test_an_evaluation_of_one_label(tmp_path, recwarn):
  records = [{"text": text, "label": 1.0} for text in "abc"]
  objective = classification.Objective(num_classes=1)
  rows = objective.eval_rows(write(tmp_path, "a.jsonl", *records), BYTES, DataConfig(), MODEL, 32)
  assert "all of its labels are 1.0" in str(recwarn.pop(core.InputWarning).message)
  recwarn.clear()
  outcomes = {"labels": rows.labels, "predicted": rows.labels + [0.1, 0.2, 0.3]}
  assert all(value != value for value in objective.summary(outcomes).values())
  assert not recwarn.list  # those of scipy


def test_empty_texts_are_counted(tmp_path):
  objective = classification.Objective(classes=("a", "b"))
  records = [{"text": text, "label": "a"} for text in ("x", "", "y" * 99)]
  rows = objective.rows(write(tmp_path, "a.jsonl", *records), BYTES, DataConfig(), MODEL, 32)
  assert "1 are empty; 1 were cut" in rows.note


def question(number):
  answer = {"text": "film", "answer_start": 4}
  return {"text": "the film", "question": "what?", "id": str(number), "answers": [answer]}


def test_ids_of_questions(tmp_path):
  source = write(tmp_path, "a.jsonl", question(1), question(2), question(1))
  with pytest.warns(core.InputWarning, match="the id of a question, '1' is there twice"):
    span_qa.Objective().rows(source, BYTES, DataConfig(), MODEL, 64)
  source = write(tmp_path, "b.jsonl", question(1), question(2))
  predictions = tmp_path / "predictions.json"
  predictions.write_text('{"2": "film"}')
  with pytest.warns(core.InputWarning, match="lacks 1 of the 2 questions, e.g. '1'"):
    assert answers.of_file(predictions, source)["f1"].tolist() == [0.0, 1.0]
  predictions.write_text("{}")
  with pytest.raises(UserError, match="lacks 2 of the 2 questions.*answers none"):
    answers.of_file(predictions, source)


def talk(*contents):
  roles = ("user", "assistant")
  return {
    "messages": [{"role": role, "content": content} for role, content in zip(roles, contents)]
  }


def test_conversations_without_anything_to_learn(tmp_path):
  source = write(tmp_path, "a.jsonl", talk("hi", "you"), talk("", "yes"))

  def rows(template):
    objective = chat.Objective(template=template).fit((), BYTES)
    return objective.rows(source, BYTES, DataConfig(), tiny("gpt", "text:a").model, 64)

  with pytest.warns(core.InputWarning, match="jsonl:2: a message is empty; 1 records"):
    rows("")
  with pytest.raises(UserError, match="2 of 2 conversations have no token to learn"):
    with pytest.warns(core.InputWarning):
      rows("{{ messages[0].content }} ..")
