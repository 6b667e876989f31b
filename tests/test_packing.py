"""Examples that share a row: none sees another, each counts once, and every draw has room."""

import dataclasses
import json
import pickle

import jax
import numpy as np
import pytest

from llm import sharding
from llm.config import DataConfig, MeshConfig, ModelConfig
from llm.core import UserError
from llm.data import batches as batches_lib
from llm.data import documents as documents_lib
from llm.data import masking, packing, sentence_pairs, sources
from llm.data import tokenizer as tokenizer_lib
from llm.objectives import classification, masked_lm
from llm.runs import metrics
from llm.training import evaluation, experiment, loop
from llm.training import step as step_lib
from tests.conftest import sentences, tiny

BYTES = tokenizer_lib.ByteTokenizer()
T = 64
SHAPE = dict(
  num_layers=2,
  width=32,
  num_heads=4,
  mlp_dim=64,
  vocab_size=BYTES.vocab_size,
  max_length=T,
  dropout=0.0,
  init_std=0.3,
)


def texts(count, seed=0, longest=20):
  """Texts of 1 to `longest` characters, each told from the others by its first two."""
  rng = np.random.default_rng(seed)
  sizes = rng.integers(1, longest + 1, count)
  return [f"{n:02d}" + "".join(rng.choice(list("abcdefgh"), size)) for n, size in enumerate(sizes)]


def labelled(objective, given, name="bert", length=T, labels=None):
  """(objective, its rows) of texts; without labels, those are the parity of the texts' numbers."""
  labels = [int(t[:2]) % 2 for t in given] if labels is None else labels
  records = [{"text": t, "label": str(label)} for t, label in zip(given, labels)]
  if not objective.regression:
    objective = dataclasses.replace(objective, classes=("0", "1"), num_classes=2)
  source = type("Source", (), {"records": lambda self: iter(records), "spec": "records"})()
  return objective, objective.rows(source, BYTES, DataConfig(), ModelConfig(name=name), length)


def pair_rows(tmp_path, given, length=T, short_share=0.1):
  """(objective, its rows) of documents, each a list of sentences."""
  path = tmp_path / "documents.txt"
  path.write_text("\n\n".join("\n".join(document) for document in given) + "\n")
  data = DataConfig(sentences="lines", cache=str(tmp_path / "cache"))
  objective = masked_lm.Objective(short_share=short_share)
  (source,) = sources.parse(f"text:{path}", data)
  return objective, objective.rows(source, BYTES, data, ModelConfig(name="bert"), length)


def network(objective, batch, name="bert"):
  """A function from a batch to the outputs of a small model."""
  model = experiment.build(objective, ModelConfig(name=name, **SHAPE))
  params = step_lib.init_params(model, batch, jax.random.key(0))
  return jax.jit(lambda b: model.apply({"params": params}, b, train=False))


def alone(example, slot):
  """One example of a row, moved to the front of a row of its own, in its first slot."""
  first, size = example["firsts"][slot], int((example["segments"] == slot + 1).sum())
  out = {}
  for key in ("tokens", "types", "positions", "segments"):
    out[key] = np.zeros(len(example[key]), np.int32)
    out[key][:size] = example[key][first : first + size]
  out["segments"][:size] = 1
  return {**out, "firsts": np.zeros_like(example["firsts"])}


def perturbed(example, slot):
  """The row with other letters in one of its examples."""
  there = (example["segments"] == slot + 1) & ~np.isin(example["tokens"], BYTES.special_ids)
  assert there.any()
  return {**example, "tokens": np.where(there, (example["tokens"] + 5) % 256, example["tokens"])}


def one_row(example):
  return {key: np.asarray(value)[None] for key, value in example.items()}


@pytest.mark.parametrize(
  "name, pooling",
  [("bert", "first"), ("bert", "mean"), ("bert", "last"), ("gpt", "last"), ("gpt", "mean")],
)
def test_labelled_texts_of_a_row_know_nothing_of_each_other(name, pooling):
  objective, rows = labelled(classification.Objective(pooling=pooling), texts(12), name)
  example = rows.example(0, None)
  count = int(example["label_weights"].sum())
  assert count >= 3 and (np.diff(example["firsts"][:count]) > 0).all()
  run = network(objective, one_row(example), name)
  logits_NxC = np.asarray(run(one_row(example))["logits"])[0]
  for slot in range(count):
    moved_NxC = np.asarray(run(one_row(perturbed(example, slot)))["logits"])[0]
    others = np.arange(count) != slot
    assert (moved_NxC[:count][others] == logits_NxC[:count][others]).all()
    assert (moved_NxC[slot] != logits_NxC[slot]).all()
    by_itself_NxC = np.asarray(run(one_row(alone(example, slot)))["logits"])[0]
    np.testing.assert_allclose(by_itself_NxC[0], logits_NxC[slot], atol=2e-5)


def test_pairs_of_a_row_know_nothing_of_each_other(tmp_path):
  objective, rows = pair_rows(tmp_path, [[t, t[::-1]] for t in texts(20, longest=8)])
  example = rows.example(0, np.random.default_rng(0))
  count = int(example["pair_weights"].sum())
  assert count >= 3
  run = network(objective, one_row(example))
  outputs = run(one_row(example))
  at = example["segments"][example["masked_positions"]]  # the pair of each masked position
  real = example["masked_weights"] > 0
  for slot in range(count):
    moved = run(one_row(perturbed(example, slot)))
    others = np.arange(count) != slot
    same = np.asarray(moved["pair_logits"] == outputs["pair_logits"])[0, :count]
    assert same[others].all() and not same[slot].any()
    kept = np.asarray(moved["losses"] == outputs["losses"])[0]
    assert kept[real & (at != slot + 1)].all()
    by_itself = {**example, **alone(example, slot)}
    np.testing.assert_allclose(
      np.asarray(run(one_row(by_itself))["pair_logits"])[0, 0],
      np.asarray(outputs["pair_logits"])[0, slot],
      atol=2e-5,
    )


def segments_of(example):
  """(tokens, types, positions) of each segment of a row."""
  for number in range(1, example["segments"].max() + 1):
    here = example["segments"] == number
    yield tuple(example[key][here] for key in ("tokens", "types", "positions"))


def test_positions_and_types_restart_and_every_text_is_there_once():
  given = [*texts(60), "a" * 100]
  objective, rows = labelled(classification.Objective(), given, labels=[0] * 60 + [1])
  seen = []
  for i in range(len(rows)):
    example = rows.example(i, None)
    found = list(segments_of(example))
    assert len(found) == example["label_weights"].sum()
    for slot, (tokens, types, positions) in enumerate(found):
      assert (positions == np.arange(len(tokens))).all() and not types.any()
      assert tokens[0] == BYTES.cls == example["tokens"][example["firsts"][slot]]
      seen.append((BYTES.decode(tokens), int(example["labels"][slot])))
  assert sorted(seen) == sorted([*((t, 0) for t in given[:-1]), ("a" * (T - 2), 1)])
  assert "61 examples in" in rows.note and "1 were cut" in rows.note


def test_pairs_restart_and_every_run_of_sentences_is_there_once_an_epoch(tmp_path):
  objective, rows = pair_rows(tmp_path, [[t, t[::-1]] for t in texts(50)])
  batches = batches_lib.Batches([rows], [1.0], 1, 0)
  for epoch in range(3):
    for step in range(epoch * len(rows), (epoch + 1) * len(rows)):
      for tokens, types, positions in segments_of(batches[step]):
        assert (positions == np.arange(len(tokens))).all()
        assert types[0] == 0 and types[-1] == 1 and (np.diff(types) >= 0).all()
        assert tokens[types == 0][-1] == BYTES.sep != tokens[types == 1][0]
  doc, starts, stops = rows.plan.anchors[np.argsort(rows.plan.anchors[:, 1])].T
  assert (starts[1:] == stops[:-1]).all() and starts[0] == 0  # no token twice, none left out
  assert stops[-1] == len(rows.documents.tokens_N) and set(doc) == set(range(50))
  assert rows.plan.offsets[0] == 0 and rows.plan.offsets[-1] == len(rows.plan.anchors)
  assert (np.diff(rows.plan.offsets) > 0).all()


def random_documents(rng) -> documents_lib.Documents:
  """Documents of sentences of many lengths, of one token and longer than a row among them."""
  counts = rng.integers(1, 12, int(rng.integers(2, 20)))
  kinds = rng.choice([1, 2, 5, 12, 40, 150], counts.sum())
  ends = np.cumsum([0, *rng.integers(1, kinds + 1)])
  tokens = rng.integers(0, 256, ends[-1])
  return documents_lib.Documents(tokens, ends, np.cumsum([0, *counts]), "", None)


@pytest.mark.parametrize("seed", range(40))
def test_every_draw_of_pairs_has_room(seed, tmp_path):
  rng = np.random.default_rng(seed)
  documents, length = random_documents(rng), int(rng.integers(8, 80))
  short_share = float(rng.choice([0.0, 0.1, 1.0]))
  plan = sentence_pairs.plan_pairs(documents, length, short_share, tmp_path)
  anchors, offsets, _ = plan
  hides = masking.masking(BYTES, 0.15, 0.8, 0.1, whole_word=False)
  rows = sentence_pairs.PairRows(documents, plan, length, hides)
  slots = packing.slots(length, sentence_pairs.LEAST)
  for _, start, stop in anchors:
    assert 2 <= stop - start <= length - 3
  if not short_share:  # a run that does not end its document fills a row, or leaves two tokens
    bounds = documents.bounds()
    left = bounds[anchors[:, 0] + 1] - anchors[:, 2]
    sizes = anchors[:, 2] - anchors[:, 1]
    assert ((left == 0) | (sizes == length - 3) | (left == 2) & (sizes == length - 4)).all()
  drawn = set()
  for i in range(len(rows)):
    for epoch in range(6):
      example = rows.example(i, np.random.default_rng((seed, epoch, i)))
      pairs = list(segments_of(example))
      of_row = anchors[offsets[i] : offsets[i + 1]]
      assert len(pairs) == example["pair_weights"].sum() == len(of_row) <= slots
      for (tokens, types, _), (_, start, stop) in zip(pairs, of_row):
        assert 5 <= len(tokens) <= stop - start + 3 and 0 < types.sum() < len(types)
      drawn.add(example["tokens"].tobytes())
  assert len(drawn) > 2 * len(rows)  # drawn anew


def test_some_runs_are_short(tmp_path):
  """With a chance of 1, the lengths that runs aim at are even between 2 and a row."""
  tokens, ends = np.zeros(200_000, np.uint8), np.arange(200_001)  # sentences of one token
  bounds = np.array([0, 100_000, 200_000])
  documents = documents_lib.Documents(tokens, ends, bounds, "", None)
  sizes = {
    share: np.diff(sentence_pairs.plan_anchors(documents.bounds(), 50, share)[:, 1:]).ravel()
    for share in (0.0, 0.1, 1.0)
  }
  assert (sizes[0.0] == 50).all()
  counts = np.bincount(sizes[1.0], minlength=51)
  assert counts[:2].sum() == 0 and abs(counts[2:] / counts.sum() - 1 / 49).max() < 0.005
  assert (sizes[0.1] < 50).mean() == pytest.approx(0.1 * 48 / 49, abs=0.01)


def test_plans_are_the_same_again_and_rows_of_short_sentences_are_full(tmp_path):
  folders = [tmp_path / name for name in ("once", "again")]
  for folder in folders:
    folder.mkdir()
  long_ones = [sentences(n, 20) for n in range(20)]
  once, again = (pair_rows(folder, long_ones, 256, short_share=0.5)[1] for folder in folders)
  assert (once.plan.anchors == again.plan.anchors).all() and (
    once.plan.offsets == again.plan.offsets
  ).all()
  documents = [sentences(n, 1) for n in range(400)]
  objective, rows = pair_rows(tmp_path, documents, length=256)
  examples = (rows.example(i, np.random.default_rng(i)) for i in range(len(rows)))
  used = [(example["segments"] > 0).mean() for example in examples]
  fill = (rows.tokens + 3 * len(rows.plan.anchors)) / (len(rows) * 256)
  assert fill > 0.9 and np.mean(used) > 0.85  # a document that has less than is wanted gives less
  assert f"{fill:.1%} full" in rows.note
  _, rows = labelled(
    classification.Objective(),
    [d[0] for d in documents],
    length=256,
    labels=[n % 2 for n in range(400)],
  )
  assert rows.tokens / (len(rows) * 256) > 0.9
  of_short_ones = packing.into_rows(np.full(100, 2), 64, 8)
  assert sorted(map(len, of_short_ones)) == [4] + [8] * 12 and packing.slots(64, 8) == 8


@pytest.mark.parametrize("regression", [False, True])
def test_metrics_count_examples(regression):
  """The loss is the mean over the examples, one at a time; so is what is right."""
  objective = classification.Objective(num_classes=1 if regression else 0)
  objective, rows = labelled(objective, texts(30))
  batch = batches_lib.stack([rows.example(i, None) for i in range(len(rows))])
  assert len(rows) < 20 and batch["label_weights"].sum() == 30
  run = network(objective, batch)
  loss, found = objective.loss(run(batch), batch, objective.totals(batch))
  single = rows.apart()
  losses, right = [], []
  for n in range(30):
    example = one_row(single.example(n, None))
    logits = np.asarray(run(example)["logits"], np.float64)[0, 0]
    label = example["labels"][0, 0]
    losses.append(
      (logits[0] - label) ** 2 if regression else np.log(np.exp(logits).sum()) - logits[int(label)]
    )
    right.append(logits.argmax() == label)
  means = metrics.means([found])
  assert (float(loss), means["loss"]) == pytest.approx([np.mean(losses)] * 2, rel=1e-4)
  if not regression:
    assert means["accuracy"] == pytest.approx(np.mean(right)) and 0 < np.mean(right) < 1


@pytest.mark.parametrize("limit", [0, 1])
@pytest.mark.parametrize("regression", [False, True])
def test_what_is_predicted_goes_to_its_record(regression, limit):
  """Texts of many lengths, out of order in their rows; what is predicted is the text's number."""
  given = texts(70, longest=30)
  labels = [int(t[:2]) if regression else int(t[:2]) % 2 for t in given]
  objective = classification.Objective(num_classes=1 if regression else 0)
  objective, rows = labelled(objective, given, labels=labels)
  assert np.concatenate(rows.packed).tolist() != list(range(70))

  def told(trained, frozen, batch):
    tokens_BxT, firsts_BxN = np.asarray(batch["tokens"]), np.asarray(batch["firsts"])
    tens, ones = (np.take_along_axis(tokens_BxT, firsts_BxN + at, 1) - ord("0") for at in (1, 2))
    number = 10 * tens + ones
    logits = number[..., None] if regression else np.eye(2)[number % 2] * 9
    predicted = objective.predict({"logits": jax.numpy.asarray(logits, "float32")}, batch)
    return {"weight": (batch["label_weights"].sum(), jax.numpy.float32(1))}, predicted

  mesh = sharding.make_mesh(MeshConfig())
  figures, predictions = evaluation.run_over(told, {}, {}, rows, 8, mesh, limit)
  outcomes = objective.outcomes(predictions, rows)
  seen = sorted(np.concatenate(rows.packed[: 8 * limit or None]))
  assert outcomes["labels"].tolist() == [labels[n] for n in seen] == outcomes["predicted"].tolist()
  batch_count = 1 if limit else -(-len(rows) // 8)
  assert figures["weight"] * batch_count == len(seen)
  if not limit:
    results = objective.results(predictions, rows)
    said = [r["score"] if regression else int(r["label"]) for r in results]
    assert said == labels


class Shared:
  """Rows that several examples share, to their number."""

  def __init__(self, rows, examples):
    self.rows, self.examples, self.tokens = rows, examples, 10 * rows

  def __len__(self):
    return self.rows

  def __getitem__(self, i):
    return i


@pytest.mark.parametrize(
  "examples, parts, rows, weights, expected",
  [
    (33, 1, [Shared(50, 50)], [1.0], 33),
    # A row is an example: as many, divided or not.
    (33, 1, [Shared(53, 53), Shared(60, 60)], [0.7, 0.3], 33),
    (32, 1, [Shared(100, 400)], [1.0], 8),
    (32, 1, [Shared(100, 1000)], [1.0], 4),
    (8, 1, [Shared(100, 1000)], [1.0], 1),
    (37, 1, [Shared(100, 460)], [1.0], 8),
    (256, 1, [Shared(100, 500)], [1.0], 48),
    (64, 4, [Shared(100, 400)], [1.0], 16),
    (64, 1, [Shared(100, 200), Shared(10, 60)], [0.5, 0.5], 16),  # 4 a row, however many rows
  ],
)
def test_the_rows_of_a_batch_follow_from_the_plan(examples, parts, rows, weights, expected):
  assert batches_lib.rows_a_batch(examples, parts, rows, weights) == expected
  made = batches_lib.Batches(rows, weights, expected, 0)
  assert made.tokens() == pytest.approx(10 * expected)  # of Shared
  assert made.examples() == pytest.approx(expected * batches_lib.examples_a_row(rows, weights))


def test_batches_of_labelled_texts_are_the_same_on_every_mesh(tmp_path, bert_start):
  lines = [json.dumps({"text": t, "label": str(n % 2)}) for n, t in enumerate(texts(90))]
  (tmp_path / "some.jsonl").write_text("\n".join(lines))
  config = tiny(
    "classifier",
    f"jsonl:{tmp_path}/some.jsonl",
    training__batch_size=32,
    transfer__checkpoint=str(bert_start),
    transfer__skip=("^head/(?!pooler)",),
  )
  meshes = MeshConfig(data=8), MeshConfig(data=2), MeshConfig(data=2, fsdp=2, tensor=2)
  of_mesh = [
    experiment.prepare(dataclasses.replace(config, mesh=mesh), say=str).batches for mesh in meshes
  ]
  assert {made.batch_size for made in of_mesh} == {16}
  for made in of_mesh[1:]:
    assert all((made[5][key] == value).all() for key, value in of_mesh[0][5].items())
  said = []
  loop.train(
    dataclasses.replace(config, training=dataclasses.replace(config.training, steps=1)),
    tmp_path / "run",
    say=said.append,
  )
  examples = of_mesh[0].examples()
  header = f"16 rows x 32 = 512 tokens a step, about {examples:.0f} examples"
  assert any(header in line for line in said)
  assert any("90 examples in" in line and "full; 0 are empty; 0 were cut" in line for line in said)
  small = dataclasses.replace(config, training=dataclasses.replace(config.training, batch_size=6))
  said = (
    "batch_size=6 examples come to 2 rows, which must be a multiple of mesh.data x .* = "
    "8 x 1 x 1: set it to about 24, or"
  )
  with pytest.raises(UserError, match=said):
    loop.train(small, tmp_path / "small")


def test_documents_packed_in_groups_are_each_there_once(tmp_path, monkeypatch):
  """A plan in groups loses nothing, repeats nothing, and is mapped by other processes as a file."""
  monkeypatch.setattr(packing, "GROUP", 7)
  rng = np.random.default_rng(0)
  lengths = rng.integers(1, 90, 100)
  ends = np.cumsum([0, *lengths])
  documents = documents_lib.Documents(np.arange(ends[-1]), ends, np.arange(101), "", None)
  plan = pickle.loads(pickle.dumps(packing.plan(documents, 32, np.arange(33), tmp_path)))
  rows = packing.PlannedRows(documents, plan, 32)
  tokens = [token for i in range(len(rows)) for piece in rows.pieces(i) for token in piece]
  assert sorted(tokens) == list(range(ends[-1]))
  assert plan.tokens == ends[-1] and plan.cut_documents == (lengths > 32).sum()
  assert all(sum(map(len, rows.pieces(i))) <= 32 for i in range(len(rows)))
  pairs = sentence_pairs.plan_pairs(documents, 32, 0.1, tmp_path)
  covered = np.zeros(ends[-1], int)
  for document, start, stop in pairs.anchors:
    assert ends[document] <= start < stop <= ends[document + 1]
    covered[start:stop] += 1
  assert covered.max() == 1 and (covered == 0).sum() == (lengths == 1).sum()
  assert pairs.tokens == covered.sum()
