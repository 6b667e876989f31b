"""Questions and answers: scores by hand, windows that cover every answer, thresholds, files.

Bad files get a message that names the mistake.
"""

import json

import numpy as np
import pytest

from llm.config import DataConfig, ModelConfig
from llm.core import UserError
from llm.data import answers, sources, tokenizer_training
from llm.data import tokenizer as tokenizer_lib
from llm.objectives import span_qa, text_to_text
from tests.conftest import sentences

BERT = ModelConfig(name="bert")
BYTES = tokenizer_lib.ByteTokenizer()


@pytest.mark.parametrize(
  "said, gold, exact, overlap",
  [
    ("The Eiffel Tower!", ["eiffel tower"], 1, 1),  # articles, case, punctuation
    ("in Paris, France", ["Paris", "Paris, France"], 0, 0.8),  # the best of several gold answers
    ("a cat", ["the dog"], 0, 0),
    ("", [], 1, 1),
    ("something", [], 0, 0),
    ("", ["something"], 0, 0),
    ("the", ["a"], 1, 1),  # nothing is left of either
    ("big big dog", ["big dog dog"], 0, 2 / 3),  # words count as often as both have them
  ],
)
def test_scores_by_hand(said, gold, exact, overlap):
  assert answers.exact_match(said, gold) == exact
  assert answers.f1(said, gold) == pytest.approx(overlap)


def test_the_threshold_is_the_best_of_all():
  rng = np.random.default_rng(0)
  for _ in range(50):
    n = int(rng.integers(1, 12))
    margins = rng.integers(-3, 4, n).astype(float)  # with ties
    answered, unanswered = rng.random(n), rng.integers(0, 2, n).astype(float)
    tried = [-np.inf, *margins, np.inf]

    def score(t, margins=margins, answered=answered, unanswered=unanswered):
      return np.where(margins > t, unanswered, answered).mean()

    threshold, best = answers.best_threshold(margins, answered, unanswered)
    assert best == pytest.approx(max(map(score, tried))) == pytest.approx(score(threshold))


def squad(path, items, **more):
  """A file in SQuAD's layout. items: (context, question, [(text, start)])."""
  path.write_text(
    json.dumps(
      {
        "version": "v2.0",
        "data": [
          {
            "title": "t",
            "paragraphs": [
              {
                "context": context,
                "qas": [
                  {
                    "id": f"q{n}",
                    "question": question,
                    **more,
                    "answers": [{"text": t, "answer_start": s} for t, s in found],
                  }
                ],
              }
              for n, (context, question, found) in enumerate(items)
            ],
          }
        ],
      }
    )
  )
  return f"squad:{path}"


@pytest.fixture(scope="module")
def contexts():
  """Texts of many lengths with an answer somewhere in each, words of several bytes among them."""
  rng, items = np.random.default_rng(0), []
  for n in range(30):
    text = " ".join(sentences(n, int(rng.integers(1, 9)))).replace("quiet", "café — naïve")
    words = text.split(" ")
    first = int(rng.integers(len(words) - 1))
    start = len(" ".join(words[:first])) + (first > 0)
    answer = " ".join(words[first : first + 2])
    items.append((text, f"What is {n}?", [(answer, start)]))
  return items


def rows_of(objective, spec, tokenizer=BYTES, length=64):
  return objective.rows(sources.parse(spec, DataConfig())[0], tokenizer, DataConfig(), BERT, length)


@pytest.mark.parametrize("kind", ["bytes", "sentencepiece"])
def test_windows_cover_every_answer_and_know_their_text(kind, contexts, tmp_path):
  tokenizer = BYTES
  if kind == "sentencepiece":
    tokenizer = tokenizer_lib.SentencePieceTokenizer(
      tokenizer_training.train_sentencepiece([c for c, _, _ in contexts], 200, True)
    )
  objective = span_qa.Objective(stride=16)
  rows = rows_of(objective, squad(tmp_path / "a.json", contexts), tokenizer)
  assert sorted(n for row in rows.packed for n in row) == list(range(len(rows.windows)))
  encoded = tokenizer.encode_spans([c for c, _, _ in contexts])
  owned, found = [0] * len(contexts), [set() for _ in contexts]
  for row in range(len(rows)):
    example = rows.example(row, None)
    for slot, number in enumerate(rows.packed[row]):
      window = rows.windows[number]
      text, answer = contexts[window.question][0], contexts[window.question][2][0][0]
      owned[window.question] += int(window.best_context_N.sum())
      start, end = example["starts"][slot], example["ends"][slot]
      assert (
        example["window_weights"][slot] == 1 and example["positions"][example["firsts"][slot]] == 0
      )
      if window.start:
        first, last = (window.spans_Nx2[t - window.offset] for t in (window.start, window.end))
        covered = text[first[0] : last[1]].strip()
        assert covered == answer, (covered, answer)
        found[window.question].add(covered)
        assert (
          example["tokens"][start : end + 1] == window.tokens[window.start : window.end + 1]
        ).all()
        assert example["may_end"][start : end + 1].all()
      else:
        assert start == end == example["firsts"][slot]
  assert owned == [len(ids) for ids, _ in encoded]  # each token is answered with in one window
  assert all(found) and len(rows.windows) > len(contexts)


def test_the_best_answer_is_that_of_all_windows(contexts, tmp_path):
  """Scores that point to the gold span in one window win, whatever lesser ones the others have."""
  objective = span_qa.Objective(stride=16, candidates=5)
  rows = rows_of(objective, squad(tmp_path / "a.json", contexts))
  shape = (len(rows), rows.slots)
  predictions = {
    k: np.zeros((*shape, 5), np.int64 if "places" in k else np.float32)
    for k in ("starts_places", "ends_places", "starts_scores", "ends_scores")
  } | {"none": np.zeros(shape)}
  rng = np.random.default_rng(0)
  for row, numbers in enumerate(rows.packed):
    for slot, number in enumerate(numbers):
      window = rows.windows[number]
      places = rng.integers(window.offset, window.offset + len(window.best_context_N), (2, 5))
      scores = rng.random((2, 5))
      if window.start:
        places[:, 0], scores[:, 0] = (window.start, window.end), 5.0
      for side, p, s in zip(("starts", "ends"), places, scores):
        predictions[f"{side}_places"][row, slot], predictions[f"{side}_scores"][row, slot] = p, s
  figures = objective.score(predictions, rows)
  assert figures == {"exact_match": 1.0, "f1": 1.0}
  out = tmp_path / "predictions.json"
  objective.write(predictions, rows, out)
  gold = {f"q{n}": found[0][0] for n, (_, _, found) in enumerate(contexts)}
  assert json.loads(out.read_text()) == gold
  source = sources.parse(f"squad:{tmp_path}/a.json", DataConfig())[0]
  assert answers.of_file(out, source)["f1"].tolist() == [1.0] * len(contexts)
  out.write_text(json.dumps({**gold, "q99": "more"}))
  with pytest.raises(UserError, match="'q99'"):
    answers.of_file(out, source)
  silent = span_qa.Objective(stride=16, candidates=5, no_answer=True, threshold=-100.0)
  figures = silent.score(predictions, rows)
  assert (
    figures["exact_match"] == 0
    and figures["best_exact_match"] == 1
    and figures["best_f1_threshold"] > -100
  )


def test_predictions_are_the_logits_places():
  """top-k over the tokens of a window that may start or end an answer, and [CLS] for none."""
  objective = span_qa.Objective(candidates=2)
  batch = {
    "segments": [[1, 1, 1, 1, 2, 2, 2, 2]],
    "firsts": [[0, 4]],
    "tokens": [[0] * 8],
    "may_start": [[0, 0, 1, 1, 0, 1, 1, 0]],
    "may_end": [[0, 0, 1, 1, 0, 1, 1, 1]],
  }
  batch = {k: np.array(v, np.int32) for k, v in batch.items()}
  outputs = {
    "starts": np.array([[9.0, 9, 1, 2, 8, 3, 4, 9]]),
    "ends": np.array([[1.0, 9, 2, 1, 2, 3, 4, 5]]),
  }
  found = objective.predict(outputs, batch)
  assert found["starts_places"].tolist() == [[[3, 2], [2, 1]]] and found[
    "ends_places"
  ].tolist() == [[[2, 3], [3, 2]]]
  assert found["none"].tolist() == [[10, 10]]


@pytest.mark.parametrize(
  "items, message",
  [
    (
      [("some text", "what?", [("text", 3)])],
      r"q0: the answer 'text' does not stand at character 3 of its context, but at 5",
    ),
    ([("some text", "what?", [("words", 3)])], "nor anywhere in it"),
    ([("some text", "what?", [(" ", 4)])], "an answer is empty"),
    (
      [("some text", "what?", [])],
      "q0: the question has no answer; set config.objective.no_answer=True",
    ),
    ([("some text", "what? " * 20, [("some", 0)])], "the question has 120 tokens and leaves"),
    ([("some text", "", [("some", 0)])], "the field 'question' must be a text"),
  ],
)
def test_what_is_wrong_with_a_question_is_said(items, message, tmp_path):
  with pytest.raises(UserError, match=message):
    rows_of(span_qa.Objective(), squad(tmp_path / "bad.json", items))


def test_a_question_without_answer_is_one_in_every_layout(tmp_path):
  """TFDS has a dict of empty lists where SQuAD's files have an empty list."""
  for layout, message in (
    ({"text": [], "answer_start": []}, "the question has no answer"),
    (5, "answers must be a list"),
  ):
    path = tmp_path / "q.jsonl"
    path.write_text(json.dumps({"text": "some text", "question": "what?", "answers": layout}))
    with pytest.raises(UserError, match=message):
      rows_of(span_qa.Objective(), f"jsonl:{path}")
    with pytest.raises(UserError, match="the target is missing|answers must be a list"):
      rows_of(text_to_text.Objective(), f"jsonl:{path}")


def test_questions_without_an_id_have_their_number():
  records = [{"id": None}, {}, {"id": 7}]
  assert [answers.id_of(r, n) for n, r in enumerate(records)] == ["0", "1", "7"]


@pytest.mark.parametrize(
  "content, message",
  [
    ("{", "not JSON"),
    ("[1]", "not in SQuAD's layout"),
    ('{"data": [{"paragraphs": [{"qas": []}, {"qas": [{"id": 1}]}]}]}', "`context`|`question`"),
  ],
)
def test_other_layouts_are_refused(content, message, tmp_path):
  (tmp_path / "x.json").write_text(content)
  with pytest.raises(UserError, match=message):
    rows_of(span_qa.Objective(), f"squad:{tmp_path}/x.json")


def test_answers_in_the_layout_of_tfds_are_the_same():
  record = {
    "text": "some text",
    "answers": {"text": [b"text", b"some"], "answer_start": np.array([5, 0])},
  }
  assert answers.given(record) == [("text", 5), ("some", 0)]
