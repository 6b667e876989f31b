"""Graders: what a reward of a job gives."""

import json

import pytest

from llm.core import UserError
from llm.server import graders, methods
from llm.server.errors import ApiError


@pytest.mark.parametrize(
  "grader,answer,grade",
  [
    ({"type": "string_check", "operation": "eq"}, "Paris", 1.0),
    ({"type": "string_check", "operation": "eq"}, "paris", 0.0),
    ({"type": "string_check", "operation": "ne"}, "paris", 1.0),
    ({"type": "string_check", "operation": "ilike"}, "it is paris.", 1.0),
    ({"type": "string_check", "operation": "like"}, "it is paris.", 0.0),
    ({"type": "text_similarity", "evaluation_metric": "rouge_1"}, "in Paris", 2 / 3),
    ({"type": "text_similarity", "evaluation_metric": "rouge_l"}, "Rome", 0.0),
    ({"type": "text_similarity", "evaluation_metric": "fuzzy_match"}, "Paris", 1.0),
  ],
)
def test_graders(grader, answer, grade):
  grader = {**grader, "input": "{{ sample.output_text }}", "reference": "{{item.answer.city}}"}
  # A template in an example, or in an answer, is text.
  item = {"answer": {"city": "Paris"}, "other": "{% for i in range(10**9) %}"}
  record = json.loads(json.dumps({"grader": graders.filled(grader, item, "line 1")}))
  assert graders.reward(answer, record) == pytest.approx(grade)
  with pytest.raises(UserError, match="line 1 has no field 'missing'"):
    graders.filled({**grader, "reference": "{{item.missing}}"}, item, "line 1")


def test_what_an_example_holds_is_no_template():
  grader = {"type": "string_check", "operation": "eq", "input": "{{sample.output_text}}"}
  item = {"wanted": "{{sample.output_text}}"}
  record = {"grader": graders.filled({**grader, "reference": "<{{item.wanted}}>"}, item, "line 1")}
  assert graders.reward("Paris", record) == 0
  assert graders.reward("<{{sample.output_text}}>", record) == 1


@pytest.mark.parametrize(
  "text,reference,said",
  [
    ("{{ item['x'] }}", "{{sample.output_text}}", "take {{sample.output_text}} and {{item.FIELD}}"),
    ("{{sample.output_text}}", "{{ item.a | lower }}", "alone, where FIELD"),
    ("{{sample.output_text}}", "{{item.my-field}}", "alone, where FIELD"),
    ("{{sample.output_json}}", "a", "alone, where FIELD"),
    ("{{item.a}}", "a", "does not look at the answer"),
  ],
)
def test_a_grader_that_cannot_be_filled_in_is_refused(text, reference, said):
  grader = {"type": "string_check", "operation": "eq", "input": text, "reference": reference}
  with pytest.raises(ApiError, match=said) as raised:
    methods.settled(job(method={"type": "reinforcement", "reinforcement": {"grader": grader}}))
  assert raised.value.param == "method.reinforcement.grader"


def job(**asked):
  return methods.JobRequest(model="gpt", training_file="file-a", **asked)


def test_settings_stand_in_one_place():
  settings = {"n_epochs": 2}
  assert methods.settled(job(hyperparameters=settings))["supervised"]["hyperparameters"] == {
    "n_epochs": 2,
    "batch_size": "auto",
    "learning_rate_multiplier": "auto",
  }
  for kind in ("supervised", "dpo"):
    with pytest.raises(ApiError, match=f"method.{kind}") as raised:
      methods.settled(job(hyperparameters=settings, method={"type": kind}))
    assert raised.value.param == "hyperparameters"
