"""Checkpoints of transformers: exact in and out, and what a bad one is told.

The folders under golden/ were made with torch by golden/make.py.
"""

import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from llm import config as config_lib
from llm.checkpoints import export, export_tokenizer, families, huggingface, layout, locate, manager
from llm.core import UserError, flatten
from llm.data import tokenizer as tokenizer_lib
from llm.data import tokenizer_training
from llm.objectives import base
from llm.training import experiment, loop
from tests.conftest import outputs_of, tiny

GOLDEN = pathlib.Path(__file__).parent / "golden"
NAMES = (
  "bert_pretraining",
  "bert_classifier",
  "modernbert",
  "gpt2",
  "llama",
  "llama_tied",
  "qwen3",
  "t5",
  "t5_gated",
  "t5_gated_tied",
)
ENCODERS = ("bert", "modernbert")


def _batch(expected) -> dict:
  """The golden inputs, with every target at every position as slots of their own."""
  tokens, segments = (expected[k].astype(np.int32) for k in ("tokens", "segments"))
  rows, length = tokens.shape
  decoder = {}
  if "decoder_tokens" in expected:
    decoder = {
      k: expected[k].astype(np.int32) for k in ("decoder_tokens", "decoder_segments", "targets")
    }
    decoder["decoder_positions"] = np.tile(
      np.arange(decoder["targets"].shape[1], dtype=np.int32), (rows, 1)
    )
  decoder["firsts"] = np.zeros((rows, 1), np.int32)
  return decoder | {
    "tokens": tokens,
    "segments": segments,
    "positions": np.tile(np.arange(length, dtype=np.int32), (rows, 1)),
    "types": expected["types"].astype(np.int32) if "types" in expected else np.zeros_like(tokens),
  }


def _log_probs(made, params, batch, vocab):
  """(log-probabilities B x T x V, the other outputs).

  The log-probabilities are read from the losses of every target at every position.
  """
  rows, length = batch.get("decoder_tokens", batch["tokens"]).shape
  if made.config.model.name not in ENCODERS:
    losses_of = jax.jit(
      lambda v: made.model.apply(
        {"params": params}, batch | {"targets": jnp.full((rows, length), v, jnp.int32)}, train=False
      )["losses"]
    )
    return -np.stack([losses_of(v) for v in range(vocab)], -1), {}
  positions = np.tile(np.repeat(np.arange(length, dtype=np.int32), vocab), (rows, 1))
  targets = np.tile(np.tile(np.arange(vocab, dtype=np.int32), length), (rows, 1))
  masked = {"masked_positions": positions, "masked_targets": targets}
  out = outputs_of(made.model, params, batch | masked)
  return -np.asarray(out["losses"]).reshape(rows, length, vocab), out


def _loaded(name):
  params, config, tokenizer = huggingface.read(GOLDEN / name)
  objective = base.build(config.objective)
  made = experiment.Experiment(config, objective, tokenizer, config, None).on_platform("cpu")
  return made, params, dict(np.load(GOLDEN / name / "expected.npz"))


def _close(found, expected, tolerance=1e-4):
  np.testing.assert_allclose(
    found, expected, rtol=0, atol=tolerance * np.abs(expected).max() + 1e-7
  )


def _same_bits(*folders):
  before, after = (safetensors.numpy.load_file(folder / "model.safetensors") for folder in folders)
  assert set(before) == set(after)
  for key, tensor in before.items():
    np.testing.assert_array_equal(tensor, after[key])


@pytest.mark.parametrize("name", NAMES)
def test_logits_are_torchs(name):
  made, params, expected = _loaded(name)
  batch = _batch(expected)
  if name == "bert_classifier":
    logits = outputs_of(made.model, params, batch)["logits"]
    _close(logits[:, 0], expected["logits"])
  else:
    log_probs, others = _log_probs(made, params, batch, made.config.model.vocab_size)
    # Outputs at padding are not compared.
    real = batch.get("decoder_segments", batch["segments"]) > 0
    _close(log_probs[real], expected["log_probs"][real])
    if "pair_logits" in expected:  # their class 0 is our 1
      _close(np.asarray(others["pair_logits"])[:, 0, ::-1], expected["pair_logits"])


@pytest.mark.parametrize("name", NAMES)
def test_gradients_are_torchs(name):
  made, params, expected = _loaded(name)
  batch = _batch(expected)
  rows = len(batch["tokens"])
  if name == "bert_classifier":
    batch |= {
      "labels": np.arange(3, dtype=np.int32)[:, None],
      "label_weights": np.ones((3, 1), np.float32),
    }
  elif made.config.model.name == "t5":
    batch |= {"weights": batch["decoder_segments"].astype(np.float32)}
  elif made.config.model.name not in ENCODERS:
    batch |= {
      "targets": np.roll(batch["tokens"], -1, 1),
      "weights": batch["segments"].astype(np.float32),
    }
  else:
    batch |= {
      "masked_positions": np.full((rows, 1), 1, np.int32),
      "masked_targets": np.full((rows, 1), 3, np.int32),
      "masked_weights": np.ones((rows, 1), np.float32),
      "next_sentence": np.array([[1], [0], [1]], np.int32),
      "pair_weights": np.ones((rows, 1), np.float32),
    }

  def loss(p):
    return made.objective.loss(
      made.model.apply({"params": p}, batch, train=False), batch, made.objective.totals(batch)
    )[0]

  value, grads = jax.jit(jax.value_and_grad(loss))(params)
  np.testing.assert_allclose(value, expected["loss"], rtol=1e-5)
  found, family = (
    {k: np.asarray(v) for k, v in flatten(grads).items()},
    families.of_model(made.config.model),
  )
  seen = 0
  for tensor in family.tensors:
    if any(path not in found for path in tensor.ours):
      continue
    stacked = "/layers/" in tensor.ours[0]
    layers = range(tensor.first, made.config.model.num_layers) if stacked else [None]
    for layer in layers:
      theirs = expected[f"grad:{tensor.theirs.format(layer)}"]
      ours = tensor.to_theirs([found[p] if layer is None else found[p][layer] for p in tensor.ours])
      _close(ours[: len(theirs)], theirs, 1e-3)
      seen += 1
  assert seen == sum(k.startswith("grad:") for k in expected)


@pytest.mark.parametrize("name", NAMES)
def test_in_and_out_is_bit_equal(name, tmp_path):
  huggingface.write(*huggingface.read(GOLDEN / name), tmp_path / "ours", "")
  (tmp_path / "theirs").mkdir()
  export.to_transformers(manager.find(tmp_path / "ours"), tmp_path / "theirs")
  _same_bits(GOLDEN / name, tmp_path / "theirs")
  old, new = (
    json.loads((f / "config.json").read_text()) for f in (GOLDEN / name, tmp_path / "theirs")
  )
  given = [
    k
    for k in new
    if old.get(k) is not None and not (name == "t5_gated" and k == "tie_word_embeddings")
  ]
  assert {k: old[k] for k in given} == {k: new[k] for k in given}


@pytest.mark.parametrize("lowercase", [True, False])
def test_a_trained_tokenizer_leaves_with_the_same_ids(lowercase, corpus, tmp_path):
  """The package `tokenizers` reads our tokenizer.json and gives SentencePiece's own ids."""
  texts = [
    corpus.read_text(),
    "naïve Café, Zürich ½ ﬁlm",
    "東京 and emoji 👩‍👩",
    "A  B   c ",
    "tab\tand\nline",
    "a" * 50,
  ]
  size = 150 if lowercase else 420
  model = tokenizer_training.train_sentencepiece(texts * 3, size, lowercase)
  ours = tokenizer_lib.SentencePieceTokenizer(model, lowercase)
  export_tokenizer.write(ours, tmp_path, 64)
  theirs = layout.read_tokenizer(tmp_path)
  for text in ["", " ", "Unseen ÄÖ \u200b text", "\nbegins, and \n\n ends\n", "  led", *texts]:
    (ids,) = ours.encode([text])
    assert theirs.encode([text]) == [ids], text
    assert lowercase or theirs.decode(ids) == ours.decode(ids), text
  for name in tokenizer_lib.SPECIAL:
    assert getattr(theirs, name) == getattr(ours, name), name


def test_two_lines_load_a_checkpoint():
  import llm

  bundle = llm.load(GOLDEN / "bert_classifier")
  expected = dict(np.load(GOLDEN / "bert_classifier" / "expected.npz"))
  found = outputs_of(bundle.model, bundle.params, _batch(expected))["logits"]
  _close(found[:, 0], expected["logits"])
  assert bundle.tokenizer.vocab_size == bundle.config.model.vocab_size and tuple(
    bundle.config.objective["classes"]
  ) == ("no", "maybe", "yes")


def test_a_folder_of_theirs_is_a_start_like_ours(tmp_path, reviews):
  """Fine-tuning follows the foreign checkpoint's model and tokenizer; nothing else is set."""

  config = config_lib.defaults(base.defaults("classification"))
  config.transfer.update(checkpoint=str(GOLDEN / "bert_pretraining"), skip=(r"^head/(?!pooler)",))
  config.data.update(train=f"jsonl:{reviews}/train.jsonl", eval=f"jsonl:{reviews}/eval.jsonl")
  config.training.update(steps=2, batch_size=8, sequence_length=16)
  loop.train(config_lib.freeze(config), tmp_path / "run")
  saved = experiment.from_checkpoint(manager.find(tmp_path / "run"))
  assert (saved.config.model.width, saved.config.model.num_layers, saved.tokenizer.name) == (
    16,
    2,
    "wordpiece",
  )
  audit = json.loads((tmp_path / "run" / "transfer.json").read_text())["parameters"]
  assert {e["action"] for e in audit} == {"copied", "fresh", "dropped"}
  assert locate.find(GOLDEN / "bert_pretraining") == locate.find(GOLDEN / "bert_pretraining")


def test_many_processes_convert_nothing(tmp_path, monkeypatch):
  """Each would write a part of it to a folder of its own."""
  locate.find(GOLDEN / "bert_pretraining")
  monkeypatch.setattr(jax.distributed, "is_initialized", lambda: True)
  locate.find(GOLDEN / "bert_pretraining")  # it is there
  with pytest.raises(UserError, match="is not converted on every machine: make a workdir of it"):
    locate.find(GOLDEN / "bert_pretraining", cache_folder=str(tmp_path))


@pytest.fixture
def copy(tmp_path):
  """A copy of a golden folder that may be spoilt."""
  return pathlib.Path(shutil.copytree(GOLDEN / "bert_pretraining", tmp_path / "spoilt"))


def _edit_config(folder, **changes):
  found = json.loads((folder / "config.json").read_text())
  (folder / "config.json").write_text(json.dumps(found | changes))


def _pickle(folder):
  (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def _cut(folder):
  path = folder / "model.safetensors"
  path.write_bytes(path.read_bytes()[:-100])


def _lying_header(folder):
  path = folder / "model.safetensors"
  path.write_bytes((2 << 30).to_bytes(8, "little") + path.read_bytes()[8:])


def _overlap(folder):
  data = (folder / "model.safetensors").read_bytes()
  size = int.from_bytes(data[:8], "little")
  header = json.loads(data[8 : 8 + size])
  first, second = [k for k in header if k != "__metadata__"][:2]
  header[second]["data_offsets"] = header[first]["data_offsets"]
  new = json.dumps(header).encode()
  (folder / "model.safetensors").write_bytes(
    len(new).to_bytes(8, "little") + new + data[8 + size :]
  )


def _index(name):
  def spoil(folder):
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": name}}))

  return spoil


def _link(folder):
  (folder / "model.safetensors").rename(folder.parent / "elsewhere.safetensors")
  (folder / "model.safetensors").symlink_to(folder.parent / "elsewhere.safetensors")


BAD = {
  "pickle": (_pickle, "pickle"),
  "cut": (_cut, "damaged"),
  "header": (_lying_header, "damaged"),
  "overlap": (_overlap, "damaged"),
  "missing shard": (_index("model-1.safetensors"), "not there"),
  "outside": (_index("../x.safetensors"), "same folder"),
  "absolute": (_index("/x.safetensors"), "same folder"),
  "link": (_link, "outside its folder"),
  "family": (
    lambda f: _edit_config(f, model_type="mamba"),
    "supported: bert, electra, modernbert, gpt2, llama",
  ),
  "shape": (lambda f: _edit_config(f, intermediate_size=32), "does not fit config.json"),
  "layers": (lambda f: _edit_config(f, num_hidden_layers=3), "is missing"),
  "fewer layers": (lambda f: _edit_config(f, num_hidden_layers=1), "no place for"),
  "activation": (lambda f: _edit_config(f, hidden_act="swish"), "hidden_act"),
  "no number": (lambda f: _edit_config(f, hidden_size="16"), "positive integer"),
  "tokenizer": (
    lambda f: (f / "vocab.txt").write_text((f / "vocab.txt").read_text() + "more\n"),
    "44 pieces",
  ),
  "no tokenizer": (lambda f: (f / "vocab.txt").unlink(), "no tokenizer"),
  "config": (lambda f: (f / "config.json").write_text("{"), "JSON"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_folder_is_named(case, copy):
  spoil, words = BAD[case]
  spoil(copy)
  with pytest.raises(UserError, match=words):
    huggingface.read(copy)


def test_a_hub_name_without_network_is_one_line(monkeypatch):
  monkeypatch.setenv("HF_HUB_OFFLINE", "1")
  with pytest.raises(UserError, match="hf:nobody/nothing"):
    locate.find("hf:nobody/nothing")


def test_what_transformers_has_no_class_for_is_refused(tmp_path):
  huggingface.write(*huggingface.read(GOLDEN / "bert_classifier"), tmp_path / "ours", "")
  step = manager.find(tmp_path / "ours")
  described = json.loads((step / "description.json").read_text())
  described["config"]["objective"]["pooling"] = "mean"
  (step / "description.json").write_text(json.dumps(described))
  with pytest.raises(UserError, match="no class for bert with classification pooled by mean"):
    export.to_transformers(step, tmp_path)


@pytest.mark.parametrize(
  "mesh",
  [
    {"mesh__data": 2, "mesh__fsdp": 4},
    pytest.param({"mesh__data": 2, "mesh__fsdp": 2, "mesh__tensor": 2}, marks=pytest.mark.slow),
  ],
  ids=["fsdp", "tensor"],
)
@pytest.mark.parametrize("name", ["bert_pretraining", "gpt2", "llama"])
def test_round_trip_over_a_mesh(name, mesh, corpus, tmp_path):
  """In, onto a mesh, a step of rate 0, out: the same bits."""
  kind = "bert" if name.startswith("bert") else "gpt"
  shape = {
    f"model__{k}": type(getattr(config_lib.ModelConfig(), k))()
    for k in ("name", "num_layers", "width", "num_heads", "mlp_dim", "max_length")
  }
  config = tiny(
    kind,
    f"text:{corpus}",
    transfer__checkpoint=str(GOLDEN / name),
    tokenizer__name="",
    optimizer__learning_rate=0.0,
    training__steps=1,
    training__sequence_length=16,
    **shape,
    **mesh,
  )
  loop.train(config, tmp_path / "run")
  (tmp_path / "out").mkdir()
  export.to_transformers(manager.find(tmp_path / "run"), tmp_path / "out")
  _same_bits(GOLDEN / name, tmp_path / "out")


@pytest.mark.parametrize(
  "changes, message",
  [
    ({"problem_type": "multi_label_classification"}, "multi_label_classification' is not"),
    ({"architectures": ["BertForTokenClassification"]}, "a classifier that is not of texts"),
  ],
)
def test_a_classifier_of_another_kind_is_refused(changes, message, tmp_path):
  folder = shutil.copytree(GOLDEN / "bert_classifier", tmp_path / "theirs")
  config = json.loads((folder / "config.json").read_text())
  (folder / "config.json").write_text(json.dumps({**config, **changes}))
  with pytest.raises(UserError, match=message):
    huggingface.read(folder)
