"""Masking, pairing, next tokens and labels: what an example says of its text."""

import collections
import json
import sys

import numpy as np
import pytest
import scipy.stats
import sklearn.metrics

from llm.config import DataConfig, ModelConfig
from llm.core import UserError
from llm.data import sources
from llm.data import tokenizer as tokenizer_lib
from llm.objectives import base, causal_lm, classification, masked_lm
from llm.training import consistency

BERT, GPT = ModelConfig(name="bert"), ModelConfig(name="gpt")


def rows_of(objective, path, tokenizer, length=64, model=BERT):
  data = DataConfig(sentences="lines")
  return objective.rows(sources.parse(f"text:{path}", data)[0], tokenizer, data, model, length)


def unmasked(example):
  tokens = example["tokens"].copy()
  real = example["masked_weights"] > 0
  tokens[example["masked_positions"][real]] = example["masked_targets"][real]
  return tokens


def within(count, total, share, z=4.5):
  return abs(count - total * share) <= z * (total * share * (1 - share)) ** 0.5


@pytest.mark.parametrize("pairs", [True, False])
def test_masking_is_as_published(corpus, byte_tokenizer, pairs):
  objective = masked_lm.Objective(next_sentence=pairs)
  rows = rows_of(objective, corpus, byte_tokenizer)
  kinds = collections.Counter()
  rng = np.random.default_rng(0)
  for _ in range(20):
    for i in range(len(rows)):
      example = rows.example(i, rng)
      real = example["masked_weights"] > 0
      positions, targets = example["masked_positions"][real], example["masked_targets"][real]
      now = example["tokens"][positions]
      assert (np.diff(positions) > 0).all()
      assert not np.isin(targets, byte_tokenizer.special_ids).any()
      kinds["mask"] += int((now == byte_tokenizer.mask).sum())
      kinds["kept"] += int((now == targets).sum())
      kinds["chosen"] += len(targets)
      candidates = (example["segments"] > 0) & ~np.isin(
        unmasked(example), (byte_tokenizer.cls, byte_tokenizer.sep)
      )
      assert len(targets) == max(1, round(0.15 * candidates.sum()))
      kinds["random"] += int(((now != byte_tokenizer.mask) & (now != targets)).sum())
      others = now[(now != byte_tokenizer.mask) & (now != targets)]
      assert not np.isin(others, byte_tokenizer.special_ids).any()
  assert within(kinds["mask"], kinds["chosen"], 0.8)
  assert within(kinds["kept"], kinds["chosen"], 0.1 + 0.1 / 256)
  assert within(kinds["random"], kinds["chosen"], 0.1)


def test_masked_positions_are_uniform(corpus, byte_tokenizer):
  objective = masked_lm.Objective(next_sentence=False)
  rows = rows_of(objective, corpus, byte_tokenizer)
  counts = np.zeros(64)
  rng = np.random.default_rng(0)
  for _ in range(4000):
    example = rows.example(0, rng)
    counts[example["masked_positions"][example["masked_weights"] > 0]] += 1
  free = counts[counts > 0]
  assert scipy.stats.chisquare(free).pvalue > 1e-4


def test_whole_words_are_masked_whole(tmp_path, corpus):
  pieces = [
    "[PAD]",
    "[UNK]",
    "[CLS]",
    "[SEP]",
    "[MASK]",
    *"abcdefghijklmnopqrstuvwxyz.",
    *(f"##{c}" for c in "abcdefghijklmnopqrstuvwxyz"),
  ]
  tokenizer = tokenizer_lib.WordPieceTokenizer("\n".join(pieces).encode())
  objective = masked_lm.Objective(whole_word=True, next_sentence=False, mask_rate=0.3)
  rows = rows_of(objective, corpus, tokenizer)
  rng, whole = np.random.default_rng(0), 0
  for i in range(len(rows)):
    example = rows.example(i, rng)
    tokens, chosen = unmasked(example), np.zeros(64, bool)
    chosen[example["masked_positions"][example["masked_weights"] > 0]] = True
    begins = np.array([not tokenizer.pieces[t].startswith("##") for t in tokens])
    begins[1:] |= np.isin(tokens[:-1], tokenizer.special_ids)  # a piece may begin inside a word
    words = np.cumsum(begins)
    for word in np.unique(words[chosen]):
      assert chosen[words == word].all()
      whole += (words == word).sum() > 1
  assert whole > 50


def test_pairs_are_balanced_and_true(corpus, byte_tokenizer):
  objective = masked_lm.Objective()
  rows = rows_of(objective, corpus, byte_tokenizer, length=96)
  text = [
    byte_tokenizer.decode(rows.documents.tokens_N[a:b])
    for a, b in zip(rows.documents.bounds(), rows.documents.bounds()[1:])
  ]
  rng, labels, inside = np.random.default_rng(0), [], ([], [])
  for _ in range(40):
    for i in range(len(rows)):
      example = rows.example(i, rng)
      tokens = unmasked(example)
      for slot, (doc, _, _) in enumerate(
        rows.plan.anchors[rows.plan.offsets[i] : rows.plan.offsets[i + 1]]
      ):
        used = example["segments"] == slot + 1
        a = byte_tokenizer.decode(tokens[used & (example["types"] == 0)])
        b = byte_tokenizer.decode(tokens[used & (example["types"] == 1)])
        own = text[doc]
        assert a and b and a in own
        if example["next_sentence"][slot]:
          assert a + b in own
        else:
          assert any(b in other for other in text if other is not own)
        labels.append(int(example["next_sentence"][slot]))
        inside[labels[-1]].append(not b[0].isupper())  # sentences begin with the only capitals
        assert used.sum() == len(a) + len(b) + 3 and used[example["firsts"][slot]]
  assert within(sum(labels), len(labels), 0.5)
  # Where B begins does not tell whether it follows A.
  assert abs(np.mean(inside[0]) - np.mean(inside[1])) < 0.02


def test_next_tokens_follow_and_end(corpus, byte_tokenizer):
  objective = causal_lm.Objective()
  rows = rows_of(objective, corpus, byte_tokenizer, length=48, model=GPT)
  ends, seen = 0, collections.Counter()
  for i in range(len(rows)):
    example = rows.example(i, None)
    for segment in range(1, example["segments"].max() + 1):
      at = np.flatnonzero(example["segments"] == segment)
      assert (example["positions"][at] == np.arange(len(at))).all()
      assert (example["targets"][at[:-1]] == example["tokens"][at[1:]]).all()
      ends += example["targets"][at[-1]] == byte_tokenizer.eos
    seen.update(example["tokens"][example["segments"] > 0].tolist())
    assert (example["weights"] == (example["segments"] > 0)).all()
  assert ends == len(rows.documents)
  # No token is dropped or doubled.
  assert seen == collections.Counter(np.asarray(rows.documents.tokens_N).tolist())


def jsonl(tmp_path, records, name="data.jsonl"):
  path = tmp_path / name
  path.write_text("\n".join(map(json.dumps, records)))
  return sources.parse(f"jsonl:{path}", DataConfig())[0]


def test_pairs_of_texts_are_put_together_as_bert_does(tmp_path, byte_tokenizer):
  source = jsonl(
    tmp_path,
    [
      {"text": "abc", "text_pair": "defgh", "label": "x"},
      {"text": "q" * 50, "text_pair": "r" * 9, "label": "y"},
    ],
  )
  objective = classification.Objective().fit([source], None)
  rows = objective.rows(source, byte_tokenizer, DataConfig(), BERT, 16)
  first, second = (rows.apart().example(i, None) for i in range(2))
  cls, sep = byte_tokenizer.cls, byte_tokenizer.sep
  assert first["tokens"][:11].tolist() == [cls, *b"abc", sep, *b"defgh", sep]
  assert first["types"][:11].tolist() == [0] * 5 + [1] * 6 and first["segments"].sum() == 11
  assert (
    second["tokens"].tolist() == [cls, *b"q" * 7, sep, *b"r" * 6, sep]
    or second["segments"].sum() == 16
  )
  assert (first["labels"], second["labels"]) == ([0], [1])
  assert "1 were cut at config.training.sequence_length=16 (50.0%;" in rows.note


def test_classes_come_from_the_data(tmp_path, byte_tokenizer):
  objective = classification.Objective().fit(
    [jsonl(tmp_path, [{"text": "a", "label": n} for n in (10, 9, 2, 10)])], None
  )
  assert objective.classes == ("2", "9", "10") and objective.num_classes == 3
  with pytest.raises(UserError, match="unknown label '7'.*2, 9, 10"):
    objective.rows(
      jsonl(tmp_path, [{"text": "a", "label": 7}]), byte_tokenizer, DataConfig(), BERT, 16
    )


def test_figures_agree_with_hand_worked_ones():
  rows = type(
    "Rows", (), {"labels": np.array([0, 0, 1, 1, 1, 0]), "packed": np.arange(6).reshape(2, 3)}
  )
  objective = classification.Objective(classes=("no", "yes"), num_classes=2)
  guesses = np.array([0, 1, 1, 1, 0, 0])  # tp 2, fp 1, fn 1, tn 2
  figures = objective.score({"probabilities": np.eye(2)[guesses].reshape(2, 3, 2)}, rows)
  assert figures == pytest.approx({"accuracy": 4 / 6, "f1": 2 / 3, "macro_f1": 2 / 3, "mcc": 3 / 9})
  rows.labels = np.array([0.0, 1.0, 2.0, 4.0, 3.0, 9.0])
  predictions = {"score": np.arange(1.0, 7.0).reshape(2, 3)}
  figures = classification.Objective(num_classes=1).score(predictions, rows)
  assert figures["spearman"] == pytest.approx(1 - 6 * 2 / (6 * 35))
  assert figures["pearson"] == pytest.approx(np.corrcoef(rows.labels, np.arange(6))[0, 1])


@pytest.mark.filterwarnings("ignore:A single label")
@pytest.mark.parametrize("classes, predicted", [(2, 2), (3, 3), (5, 3), (2, 1), (1, 1)])
def test_figures_are_scikit_learns(classes, predicted):
  """On draws in which classes are missing, too; undefined figures are 0."""
  rng = np.random.default_rng(0)
  for count in (1, 3, 40):
    labels, found = rng.integers(classes, size=count), rng.integers(predicted, size=count)
    figures = classification.agreement(labels.astype(float), found)
    present = np.union1d(labels, found)
    f1_C = sklearn.metrics.f1_score(labels, found, average=None, labels=present, zero_division=0)
    assert figures["f1"][present] == pytest.approx(f1_C)
    assert figures["macro_f1"] == pytest.approx(f1_C.mean())
    assert figures["accuracy"] == sklearn.metrics.accuracy_score(labels, found)
    expected = sklearn.metrics.matthews_corrcoef(labels, found)
    assert figures["mcc"] == pytest.approx(expected, abs=1e-12)


def test_conversations_are_no_running_text(tmp_path, byte_tokenizer):
  talk = {"messages": [{"role": "user", "content": "Hi."}]}
  source = jsonl(tmp_path, [talk])
  with pytest.raises(UserError, match=r"data.jsonl:1: no field 'text'.* fields are messages"):
    causal_lm.Objective().rows(source, byte_tokenizer, DataConfig(), GPT, 32)


def test_a_row_that_is_not_as_batch_spec_says_is_named(corpus, byte_tokenizer):
  rows = rows_of(causal_lm.Objective(), corpus, byte_tokenizer, 32, GPT)

  class Other(causal_lm.Objective):
    def batch_spec(self, model, length):
      spec = super().batch_spec(model, length)
      return {**spec, "targets": base.float_spec(length), "more": base.int_spec(2)}

  consistency.check_rows(rows, causal_lm.Objective(), GPT, 32)
  with pytest.raises(UserError, match=r"'more' is int32\[2\] by batch_spec and missing by example"):
    consistency.check_rows(rows, Other(), GPT, 32)


OUTSIDE = """
from llm.objectives import causal_lm

class {name}(causal_lm.Objective):
  words: int = 3
"""


@pytest.mark.parametrize(
  "name, message",
  [
    ("Objective", r"of_mine.o.Objective: put @dataclasses.dataclass\(frozen=True\) above"),
    ("Goal", "'of_mine.o' has none"),
    (None, "Python has no module 'of_mine.o': start from the folder that holds of_mine"),
  ],
)
def test_an_objective_from_outside_that_is_none(tmp_path, monkeypatch, name, message):
  if name:
    (tmp_path / "of_mine").mkdir()
    code = OUTSIDE.format(name=name)
    (tmp_path / "of_mine" / "o.py").write_text(code)
  monkeypatch.syspath_prepend(tmp_path)
  for module in ("of_mine", "of_mine.o"):
    monkeypatch.delitem(sys.modules, module, raising=False)
  with pytest.raises(UserError, match=message):
    base.defaults("of_mine.o")


def test_a_helper_of_the_objectives_is_no_objective():
  with pytest.raises(UserError, match="must be one of (?!.*rollouts,).*, not 'rollouts'"):
    base.build({"name": "rollouts"})
