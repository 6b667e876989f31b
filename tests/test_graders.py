"""Graders: what a reward of a job gives."""

import json

import pytest

from llm.core import UserError
from llm.server import graders


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
