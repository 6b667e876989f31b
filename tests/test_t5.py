"""Corrupted text can be put together again, and packed pairs know nothing of each other."""

import json

import numpy as np
import pytest

from llm.config import DataConfig, ModelConfig
from llm.core import UserError
from llm.data import sources
from llm.data import tokenizer as tokenizer_lib
from llm.objectives import span_corruption, text_to_text
from tests.test_models import batch_of, hidden, model_of, params_of
from tests.test_objectives import within

T5 = ModelConfig(name="t5")
BYTES = tokenizer_lib.ByteTokenizer(extra=20)


def rows_of(objective, path, length=64):
  return objective.rows(
    sources.parse(f"text:{path}", DataConfig())[0], BYTES, DataConfig(), T5, length
  )


def pieces_of(example):
  """(input, target) of every segment, without the end token, which must be there."""
  for number in range(1, example["segments"].max() + 1):
    given, wanted = (
      example["tokens"][example["segments"] == number],
      example["targets"][example["decoder_segments"] == number],
    )
    assert (
      wanted[-1] == BYTES.eos
      and (example["weights"][example["decoder_segments"] == number] == 1).all()
    )
    seen = example["decoder_tokens"][example["decoder_segments"] == number]
    assert seen[0] == BYTES.pad and (seen[1:] == wanted[:-1]).all()
    yield given, wanted[:-1]


def reassembled(given, wanted):
  """The text before corruption: what follows a sentinel in the target replaces it in the input."""
  spans = {}
  for token in wanted:
    if token in BYTES.sentinels:
      spans[token] = []
      last = token
    else:
      spans[last].append(token)
  assert list(spans) == BYTES.sentinels[: len(spans)] and all(spans.values())
  return [t for token in given for t in spans.pop(token, [token])], len(wanted) - len(
    set(wanted) & set(BYTES.sentinels)
  )


def test_every_corrupted_example_reassembles_and_is_as_published(corpus):
  objective = span_corruption.Objective()
  rows = rows_of(objective, corpus)
  rng, cut, spans, total = np.random.default_rng(0), 0, 0, 0
  for _ in range(3):
    for i in range(len(rows)):
      example = rows.example(i, rng)
      found = list(pieces_of(example))
      assert len(found) == len(rows.pieces(i))
      for (given, wanted), piece in zip(found, rows.pieces(i)):
        assert given[-1] == BYTES.eos
        text, gone = reassembled(given[:-1], wanted)
        assert text == piece.tolist()
        cut, total, spans = (
          cut + gone,
          total + len(piece),
          spans + len(set(wanted) & set(BYTES.sentinels)),
        )
  assert abs(cut / total - 0.15) < 0.01 and abs(cut / spans - 3.0) < 0.35
  assert rows.tokens == sum(len(p) for i in range(len(rows)) for p in rows.pieces(i))


def test_lengths_are_the_papers():
  """A raw length of 568 fills an input of 512 and gives 114 targets (Raffel et al.'s code)."""
  objective = span_corruption.Objective()
  assert objective.longest(512) == 568 and objective.lengths(568) == (512, 114)


def test_where_spans_lie_is_uniform():
  """Of all ways to cut 3 of 8 tokens into two spans, each as often as any other."""
  rng, objective = (
    np.random.default_rng(0),
    span_corruption.Objective(noise_density=3 / 8, mean_span=1.5),
  )
  assert objective.noise(8) == (3, 2)
  rows = span_corruption.CorruptedRows(
    None,
    None,
    32,
    objective,
    objective.target_length(32),
    BYTES.pad,
    BYTES.eos,
    np.array(BYTES.sentinels),
  )
  seen = {}
  for _ in range(4000):
    given, _ = rows._corrupt(np.arange(8, dtype=np.int32), rng)
    seen[tuple(given)] = seen.get(tuple(given), 0) + 1
  # The 5 tokens kept are in 2 parts, and so are the 3 cut out.
  assert len(seen) == 4 * 2 and all(within(n, 4000, 1 / 8) for n in seen.values())


def test_prefix_language_modelling_cuts_once(corpus):
  objective = span_corruption.Objective(prefix=True)
  rows = rows_of(objective, corpus)
  for i in range(len(rows)):
    example = rows.example(i, np.random.default_rng(i))
    for (given, wanted), piece in zip(pieces_of(example), rows.pieces(i)):
      assert len(given) and len(wanted) and [*given, *wanted] == piece.tolist()


def test_packed_pairs_are_alone():
  """A pair gives the same alone and packed, and a neighbour's change moves no bit.

  This holds in the encoder, in the decoder and in what passes between them.
  """
  model = model_of("t5")
  params, packed = params_of(model), batch_of(1, segments=[1] * 5 + [2] * 7 + [0] * 4)
  places = {"": ((0, 5), (5, 12)), "decoder_": ((0, 4), (4, 14))}
  packed |= {
    "decoder_segments": np.array([[1] * 4 + [2] * 10 + [0] * 2], np.int32),
    "decoder_positions": np.array([[*range(4), *range(10), 0, 0]], np.int32),
  }
  out = np.asarray(hidden(model, params, packed))
  for number in (0, 1):
    alone = {
      f"{side}{k}": packed[f"{side}{k}"][:, slice(*bounds[number])]
      for side, bounds in places.items()
      for k in ("tokens", "positions")
    }
    alone |= {f"{side}segments": np.ones_like(alone[f"{side}tokens"]) for side in places}
    np.testing.assert_allclose(
      np.asarray(hidden(model, params, alone))[0],
      out[0, slice(*places["decoder_"][number])],
      atol=1e-5,
    )
    for side in places:
      tokens = packed[f"{side}tokens"].copy()
      tokens[:, slice(*places[side][number])] += 7
      moved = np.asarray(hidden(model, params, {**packed, f"{side}tokens": tokens % 100}))
      kept = slice(*places["decoder_"][1 - number])
      assert (moved[0, kept] == out[0, kept]).all() and not (moved == out).all()


def test_the_decoder_never_looks_ahead():
  model = model_of("t5")
  params, batch = params_of(model), batch_of(1)
  out = np.asarray(hidden(model, params, batch))[0]
  for t in (0, 7, 15):
    tokens = batch["decoder_tokens"].copy()
    tokens[0, t] = (tokens[0, t] + 7) % 100
    moved = np.asarray(hidden(model, params, {**batch, "decoder_tokens": tokens}))[0]
    assert (moved[:t] == out[:t]).all() and (moved[t:] != out[t:]).any(-1).all()


@pytest.mark.parametrize(
  "change, message",
  [
    (
      dict(tokenizer=tokenizer_lib.ByteTokenizer()),
      "0 sentinels .* set config.tokenizer.sentinels",
    ),
    (dict(length=4), "too short for span_corruption"),
  ],
)
def test_what_cannot_be_corrupted_is_said(corpus, change, message):
  given = {"tokenizer": BYTES, "model": T5, "length": 64, **change}
  with pytest.raises(UserError, match=message):
    span_corruption.Objective().rows(
      sources.parse(f"text:{corpus}", DataConfig())[0],
      given["tokenizer"],
      DataConfig(),
      given["model"],
      given["length"],
    )


def written(path, *lines):
  path.write_text("".join(json.dumps(line) + "\n" for line in lines))
  return sources.parse(f"jsonl:{path}", DataConfig())[0]


def test_text_to_text_reads_what_it_was_given(tmp_path):
  source = written(
    tmp_path / "a.jsonl",
    *(
      {"text": f"film {n}", "text_pair": "b", "label": "good" if n % 2 else "bad"} for n in range(9)
    ),
  )
  objective = text_to_text.Objective(
    template="rate: {text} and {text_pair}", targets=("good=yes", "bad=no"), target_length=16
  )
  training, evaluation = (
    rows(source, BYTES, DataConfig(), T5, 64) for rows in (objective.rows, objective.eval_rows)
  )
  said = []
  for row in range(len(training)):
    example = training.example(row, None)
    for number, (given, wanted) in zip(training.packed[row], pieces_of(example)):
      said.append((training.pairs[number].record, BYTES.decode(given[:-1]), BYTES.decode(wanted)))
  assert sorted(said) == [(n, f"rate: film {n} and b", "yes" if n % 2 else "no") for n in range(9)]
  learned = sum(evaluation.example(i, None)["weights"].sum() for i in range(len(evaluation)))
  assert len(evaluation.pairs) == 18 and learned == sum(len(p.target) for p in training.pairs)


def test_choices_are_told_by_their_likelihood_and_exact_matches_by_every_token():
  objective = text_to_text.Objective(targets=("a=x", "b=y"))

  def pair(record, gold):
    return text_to_text.Pair(record, gold, np.zeros(3), np.zeros(2))

  rows = text_to_text.PairRows(
    [pair(0, True), pair(0, False), pair(1, True), pair(1, False)],
    [np.array([0, 1]), np.array([2, 3])],
    32,
    4,
    2,
    0,
    0,
    ["in", "side"],
    [("x",), ("x", "the y")],
  )
  batch = {"tokens": np.zeros((2, 32)), "decoder_segments": np.array([[1, 1, 2, 2], [1, 1, 2, 2]])}
  outputs = {
    "losses": np.array([[0.1, 0.2, 3.0, 0.1], [2.0, 0.1, 0.5, 0.5]]),
    "correct": np.array([[1.0, 1, 0, 1], [0, 1, 1, 1]]),
  }
  found = objective.outcomes(
    {k: np.asarray(v) for k, v in objective.predict(outputs, batch).items()}, rows
  )
  assert found["choice_accuracy"].tolist() == [1, 0] and found["exact_match"].tolist() == [1, 0]
  assert objective.summary(found)["loss"] == pytest.approx((0.3 + 2.1) / 4)
  found = objective.written(
    lambda inputs, most: {("in", "side"): ["a x.", "y"]}[tuple(inputs)], rows
  )
  assert found["written_f1"].tolist() == [1, 1] == found["written_exact_match"].tolist()


@pytest.mark.parametrize(
  "record, more, message",
  [
    ({"text": "a"}, {}, "a.jsonl:1: the target is missing or empty"),
    ({"text": "a", "target": " "}, {}, "missing or empty"),
    (
      {"text": "a", "target": "b" * 99},
      {},
      "the target has 100 tokens, more than config.objective.target_length=64",
    ),
    ({"text": "a", "target": "b"}, {"template": "{text} {other}"}, "no field 'other'"),
    ({"text": "a", "label": "c"}, {"targets": ("d=e",)}, "unknown label 'c'"),
    ({"text": "a"}, {"template": "{text"}, "is no template"),
    ({"text": "a"}, {"targets": ("d",)}, "not of the form"),
  ],
)
def test_pairs_that_cannot_be_made_are_said(record, more, message, tmp_path):
  with pytest.raises(UserError, match=message):
    text_to_text.Objective(**more).rows(
      written(tmp_path / "a.jsonl", record), BYTES, DataConfig(), T5, 64
    )
