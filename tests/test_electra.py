"""ELECTRA: what is drawn, what learns from what, and what a fine-tuning run takes over."""

import dataclasses
import json
import shutil
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import scipy.stats
from flax import linen as nn

from configs import finetune_classification, finetune_qa, pretrain_electra
from llm import config as config_lib
from llm import models, sharding
from llm.checkpoints import export, huggingface, manager
from llm.config import MeshConfig, ModelConfig
from llm.core import UserError, flatten, unflatten
from llm.data import tokenizer as tokenizer_lib
from llm.models import electra, heads, precision
from llm.objectives import base, replaced_token
from llm.performance import flops
from llm.training import experiment, loop
from llm.training import step as step_lib
from tests.conftest import outputs_of, tiny
from tests.test_models import SMALL, batch_of

BATCH = {name: jnp.asarray(array) for name, array in batch_of(4).items()}
OBJECTIVE = replaced_token.Objective()


def model_of(**changes):
  config = ModelConfig(
    name="electra", **{**SMALL, "embedding_width": 24, "num_heads": 8, **changes}
  )
  return experiment.build(OBJECTIVE, config)


def test_the_loss_by_hand():
  outputs = {
    "losses": jnp.array([[2.0, 3.0, 100.0]]),
    "correct": jnp.array([[1.0, 0.0, 1.0]]),
    "detection_logits": jnp.array([[2.0, -1.0, 0.5, 9.0]]),
    "replaced": jnp.array([[True, False, False, True]]),
  }
  batch = {"masked_weights": jnp.array([[1.0, 1.0, 0.0]]), "segments": jnp.array([[1, 1, 2, 0]])}
  loss, metrics = OBJECTIVE.loss(outputs, batch, OBJECTIVE.totals(batch))
  log = np.log1p(np.exp([-2.0, -1.0, 0.5]))  # replaced, original, original; the last is padding
  assert loss == pytest.approx(2.5 + 50 * log.mean(), rel=1e-5)
  means = {name: float(value / weight) for name, (value, weight) in metrics.items()}
  assert means == pytest.approx(
    {
      "loss": float(loss),
      "mlm_loss": 2.5,
      "mlm_accuracy": 0.5,
      "rtd_loss": log.mean(),
      "rtd_accuracy": 2 / 3,
      "rtd_precision": 1 / 2,
      "rtd_recall": 1.0,
    }
  )
  lighter = dataclasses.replace(OBJECTIVE, discriminator_weight=7.0)
  loss, _ = lighter.loss(outputs, batch, lighter.totals(batch))
  assert loss == pytest.approx(2.5 + 7 * log.mean(), rel=1e-5)
  sums = OBJECTIVE.predict(outputs, batch)
  figures = OBJECTIVE.summary({name: np.asarray(array) for name, array in sums.items()})
  assert figures == pytest.approx({name: means[name] for name in figures}) and len(figures) == 6


def test_the_parts_of_a_step_add_up():
  """Each part is divided by the totals of the step, in the loss and in the weight of its metric."""
  rng = np.random.default_rng(0)
  outputs = {
    "losses": jnp.asarray(rng.random((4, 3)), jnp.float32),
    "correct": jnp.ones((4, 3)),
    "detection_logits": jnp.asarray(rng.normal(size=(4, 5)), jnp.float32),
    "replaced": jnp.asarray(rng.random((4, 5)) < 0.3),
  }
  batch = {
    "masked_weights": jnp.array([[1.0, 1, 1], [1, 0, 0], [1, 1, 0], [1, 1, 1]]),
    "segments": jnp.array([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [1, 1, 1, 1, 0], [1, 0, 0, 0, 0]]),
  }
  totals = OBJECTIVE.totals(batch)
  losses = []
  means = []
  for rows in (slice(4), slice(1), slice(1, 4)):
    part = [{name: array[rows] for name, array in tree.items()} for tree in (outputs, batch)]
    loss, metrics = OBJECTIVE.loss(*part, totals)
    losses.append(float(loss))
    means.append(metrics["loss"])
  assert losses[1] + losses[2] == pytest.approx(losses[0], rel=1e-6)
  assert float(means[1][1] + means[2][1]) == pytest.approx(1) == float(means[0][1])


def test_draws_follow_the_generator_and_are_never_padding():
  logits_V = jnp.array([0.0, 1.0, 2.0, -1.0, 0.5])
  # Rows that pad the vocabulary have the highest scores.
  table_VxD = jnp.full((128, 1), 9.0).at[:5, 0].set(logits_V)
  hidden_BxTxD = jnp.ones((4, 2500, 1))

  def draws(chunk):
    drawn = heads.token_draws(
      hidden_BxTxD,
      table_VxD,
      jnp.zeros(128),
      jax.random.key(3),
      precision.TYPES["float32"],
      vocab_size=5,
      chunk=chunk,
    )
    return np.asarray(drawn)

  drawn_BxT = draws(0)
  assert drawn_BxT.shape == (4, 2500) and drawn_BxT.max() < 5
  counts = np.bincount(drawn_BxT.ravel(), minlength=5)
  expected = np.asarray(jax.nn.softmax(logits_V), np.float64) * drawn_BxT.size
  assert scipy.stats.chisquare(counts, expected * counts.sum() / expected.sum()).pvalue > 1e-3
  assert (draws(700) == drawn_BxT).all()  # however many logits exist at a time
  assert (drawn_BxT[0] != drawn_BxT[1]).any()


class Drawn(nn.Module):
  """In place of a generator: what it drew, and whether it was trained."""

  tokens: tuple[int, ...]

  def __call__(self, batch, embedded, *, train):
    return {"drawn": jnp.array([self.tokens]), "generator_trains": train}


class Seen(nn.Module):
  """In place of a backbone: the tokens that it is given and, as table, whether it is trained."""

  def embed(self, batch):
    return None

  def __call__(self, batch, *, train):
    return batch["tokens"], train, None


class Shown(nn.Module):
  """In place of a head: what the backbone gave."""

  def __call__(self, hidden, batch, table, *, train):
    return {"seen": hidden, "trains": (table, train)}


def test_a_drawn_original_is_not_replaced_and_empty_slots_change_nothing():
  batch = {
    "tokens": jnp.array([[7, 4, 4, 6, 0]]),
    "masked_positions": jnp.array([[1, 2, 0]]),
    "masked_targets": jnp.array([[8, 9, 0]]),
    "masked_weights": jnp.array([[1.0, 1.0, 0.0]]),
  }
  network = replaced_token.Network(Seen(), Shown(), Drawn((8, 5, 3)))
  for train in (True, False):
    outputs = network.apply({}, batch, train=train)
    assert outputs["generator_trains"] == train and outputs["trains"] == (train, train)
  assert outputs["seen"].tolist() == [[7, 8, 5, 6, 0]]
  assert outputs["replaced"].tolist() == [[False, False, True, False, False]]


@pytest.fixture(scope="module")
def gradients():
  """(mesh, devices) -> (losses, what was replaced, what two keys draw, gradients of each loss)."""
  model = model_of()

  def terms(params, key):
    rngs = {"dropout": key}
    outputs = model.apply({"params": params}, BATCH, train=True, rngs=rngs)
    _, metrics = OBJECTIVE.loss(outputs, BATCH, OBJECTIVE.totals(BATCH))
    losses = jnp.stack([metrics[name][0] for name in ("mlm_loss", "rtd_loss")])
    return losses, (losses, outputs["replaced"], outputs["drawn"])

  with jax.set_mesh(sharding.make_mesh(MeshConfig(), jax.devices()[:1])):
    params = jax.jit(lambda: step_lib.init_params(model, batch_of(1), jax.random.key(0)))()

  def run(mesh_config, devices):
    mesh = sharding.make_mesh(mesh_config, jax.devices()[:devices])
    with jax.set_mesh(mesh):
      placed = jax.device_put(params, sharding.shardings(params, mesh))
      slopes = jax.jit(jax.jacrev(terms, has_aux=True))
      grads, (losses, replaced, drawn) = slopes(placed, jax.random.key(7))
      *_, drawn_later = slopes(placed, jax.random.key(8))[1]
    of_path = {path: np.asarray(leaf) for path, leaf in flatten(grads).items()}
    of_term = [{path: leaf[term] for path, leaf in of_path.items()} for term in range(2)]
    return np.asarray(losses), np.asarray(replaced), np.asarray([drawn, drawn_later]), of_term

  return run


@pytest.fixture(scope="module")
def on_one_device(gradients):
  return gradients(MeshConfig(), 1)


def test_each_loss_reaches_its_own_network_and_the_shared_embedding(on_one_device):
  _, replaced_BxT, (drawn_BxM, drawn_later_BxM), (of_generator, of_discriminator) = on_one_device
  masked = np.zeros_like(replaced_BxT)
  masked[:, [1, 4, 9]] = True
  assert replaced_BxT.any() and not replaced_BxT[~masked].any()
  assert (drawn_BxM != drawn_later_BxM).any()
  for path in of_generator:
    reached = tuple(np.abs(term[path]).max() > 0 for term in (of_generator, of_discriminator))
    if path.endswith("key/bias"):
      continue  # it changes no score
    if path.startswith("generator/"):
      assert reached == (True, False), path
    elif path.startswith(("head/", "backbone/layers/", "backbone/embedding_project/")):
      assert reached == (False, True), path
    else:
      assert reached == (True, True), path
  assert {path for path in of_generator if path.endswith("/embedding")} == {
    f"backbone/{table}/embedding" for table in ("token", "position", "type")
  }


def test_a_mesh_draws_the_same_tokens(gradients, on_one_device):
  losses, _, drawn, _ = on_one_device
  losses_there, _, drawn_there, _ = gradients(MeshConfig(data=2, fsdp=2, tensor=2), 8)
  assert (drawn_there == drawn).all()
  np.testing.assert_allclose(losses_there, losses, rtol=1e-5)


# As ElectraForPreTraining counts them with 30,522 pieces.
PUBLISHED = {"small": 13_549_057, "base": 109_483_009}


@pytest.mark.parametrize("size", list(PUBLISHED))
def test_parameter_counts_are_the_published_ones(size):
  config = ModelConfig(
    name="electra",
    vocab_size=30_522,
    **electra.SIZES[size],
    dtype="float32",
    scan="scan",
    attention="reference",
  )
  model = heads.Model(models.build_backbone(config), heads.DetectionHead(config))
  shapes = jax.eval_shape(lambda: step_lib.init_params(model, batch_of(1), jax.random.key(0)))
  assert flops.count_parameters(shapes, config.vocab_size) == PUBLISHED[size]


@pytest.mark.parametrize("size, shape", [("small", (64, 1, 256)), ("base", (256, 4, 1024))])
def test_the_generator_is_as_published(size, shape):
  """Clark et al. 2020, table 6; a share of 0.85 becomes [MASK] in the published code."""
  config = ModelConfig(name="electra", vocab_size=30_522, **electra.SIZES[size])
  objective: Any = base.build(pretrain_electra.get_config(size).objective)
  assert (objective.mask_rate, objective.discriminator_weight) == (0.15, 50)
  assert (objective.mask_share, objective.random_share) == (0.85, 0)
  generator = objective.generator_config(config)
  assert (generator.width, generator.num_heads, generator.mlp_dim) == shape
  assert generator.num_layers == 12 and generator.embedding_width == config.embedding_width


def test_what_does_not_fit_is_told(corpus):
  with pytest.raises(
    UserError, match="trains encoder models, not config.model.name=bert: .* electra"
  ):
    experiment.without_data(pretraining(corpus, model__name="bert", model__embedding_width=0))
  with pytest.raises(UserError, match="embedding_width=16: the embedding of bert is as wide"):
    experiment.without_data(tiny("bert", f"text:{corpus}", model__embedding_width=16))
  with pytest.raises(UserError, match="next_sentence must be False"):
    replaced_token.Objective(next_sentence=True)
  base_size = ModelConfig(name="electra", **electra.SIZES["base"])
  with pytest.raises(
    UserError, match="generator_share=0.4 .* 307, which its 5 heads do not divide"
  ):
    replaced_token.Objective(generator_share=0.4).generator_config(base_size)


def pretraining(path, **overrides):
  """The config of a very small run."""
  config = tiny(
    "bert",
    f"text:{path}",
    **{"model__name": "electra", "model__embedding_width": 16, **overrides},
  )
  return dataclasses.replace(config, objective=base.defaults("replaced_token"))


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
  """(workdir, config) of a run on one text over and over, saved half way and at the end."""
  folder = tmp_path_factory.mktemp("electra")
  (folder / "letters.txt").write_text("abcdefghijklmnopqrstuvwxyzab\n\n" * 200)
  config = pretraining(
    folder / "letters.txt",
    model__dropout=0.0,
    optimizer__learning_rate=1e-2,
    training__batch_size=16,
    training__steps=60,
    training__log_every=15,
    training__save_every=30,
  )
  loop.train(config, folder / "run", say=lambda text: None)
  return folder / "run", config


def params_at(workdir) -> dict[str, np.ndarray]:
  return flatten(manager.restore(manager.find(workdir), "params"))


def test_the_discriminator_learns(pretrained):
  lines = [json.loads(line) for line in (pretrained[0] / "metrics.jsonl").read_text().splitlines()]
  first, *_, last = lines
  assert last["rtd_loss"] < 0.5 * first["rtd_loss"] and last["rtd_recall"] > 0.5
  assert last["mlm_loss"] < first["mlm_loss"]
  for line in lines:
    assert line["loss"] == pytest.approx(line["mlm_loss"] + 50 * line["rtd_loss"], rel=1e-3)


def test_resuming_is_bit_equal(pretrained, tmp_path):
  workdir, config = pretrained
  shutil.copytree(workdir, tmp_path / "run")
  shutil.rmtree(tmp_path / "run" / "checkpoints" / "60")
  loop.train(config, tmp_path / "run", say=lambda text: None)
  expected, found = params_at(workdir), params_at(tmp_path / "run")
  assert all((found[path] == leaf).all() for path, leaf in expected.items())


def fine_tuning(task, folder, checkpoint):
  """The config of a task's file in configs/, a few steps long."""
  config = {"classification": finetune_classification, "span_qa": finetune_qa}[task].get_config()

  def answer(letter):
    return [{"text": letter, "answer_start": 5}]

  records = [
    {"text": f"abcde{letter}ghi", "label": letter, "question": "bc", "answers": answer(letter)}
    for letter in "fx"
  ]
  (folder / "train.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records * 32))
  config.data.train = f"jsonl:{folder}/train.jsonl"
  config.transfer.checkpoint = str(checkpoint)
  config.training.update(steps=2, epochs=0.0, batch_size=64, sequence_length=32)
  return config_lib.freeze(config)


@pytest.mark.parametrize("task", ["classification", "span_qa"])
def test_the_discriminator_is_fine_tuned(task, pretrained, tmp_path):
  """The rules in configs/ take over the discriminator and drop the generator."""
  config = fine_tuning(task, tmp_path, pretrained[0])
  loop.train(config, tmp_path / "tuned", say=lambda text: None)
  audit = json.loads((tmp_path / "tuned" / "transfer.json").read_text())["parameters"]
  actions = {}
  for entry in audit:
    actions.setdefault(entry["path"].partition("/")[0], set()).add(entry["action"])
  assert actions == {"backbone": {"copied"}, "head": {"fresh", "dropped"}, "generator": {"dropped"}}
  model = manager.describe(manager.find(tmp_path / "tuned")).config.model
  assert (model.name, model.embedding_width, model.width) == ("electra", 16, 32)


def vocabulary_of(folder) -> int:
  """Writes a WordPiece vocabulary to a folder; how many pieces it has."""
  pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghij", *(f"##{c}" for c in "abc")]
  (folder / "vocab.txt").write_text("\n".join(pieces) + "\n")
  return len(pieces)


@pytest.fixture(scope="module")
def with_pieces(pretrained, tmp_path_factory):
  """The run with a vocabulary that transformers knows, its table cut to size."""
  folder = tmp_path_factory.mktemp("pieces")
  size = vocabulary_of(folder)
  params = params_at(pretrained[0])
  for path in ("backbone/token/embedding", "generator/head/lm/bias"):
    params[path] = params[path][:128]
  config = pretrained[1]
  config = dataclasses.replace(config, model=dataclasses.replace(config.model, vocab_size=size))
  tokenizer = tokenizer_lib.WordPieceTokenizer((folder / "vocab.txt").read_bytes())
  huggingface.write(unflatten(params), config, tokenizer, folder / "ours", "")
  (folder / "theirs").mkdir()
  export.to_transformers(manager.find(folder / "ours"), folder / "theirs")
  return folder


def test_the_discriminator_alone_goes_out_and_comes_in(with_pieces):
  before = params_at(with_pieces / "ours")
  params, config, _ = huggingface.read(with_pieces / "theirs")
  after = flatten(params)
  assert set(after) == {path for path in before if not path.startswith("generator/")}
  size = config.model.vocab_size
  for path, leaf in after.items():
    rows = slice(size) if path == "backbone/token/embedding" else slice(None)
    assert (leaf[rows] == before[path][rows]).all(), path
  assert config.objective["name"] == "replaced_token" and config.model.embedding_width == 16


def theirs_logits(model, batch):
  """Of transformers' ElectraForPreTraining."""
  import torch

  with torch.no_grad():
    return model.eval()(
      input_ids=torch.tensor(np.asarray(batch["tokens"])),
      attention_mask=torch.tensor(np.asarray(batch["segments"])),
      token_type_ids=torch.tensor(np.asarray(batch["types"])),
    ).logits.numpy()


def ours_logits(params, config, batch):
  model = dataclasses.replace(config.model, dtype="float32", scan="unroll", attention="reference")
  network = heads.Model(models.build_backbone(model), heads.DetectionHead(model))
  params = {name: params[name] for name in ("backbone", "head")}
  return outputs_of(network, params, batch)["detection_logits"]


def inputs(vocab_size: int) -> dict[str, np.ndarray]:
  """Rows of three lengths, of both token types."""
  rng = np.random.default_rng(0)
  tokens = rng.integers(1, vocab_size, (3, 12)).astype(np.int32)
  segments = (np.arange(12) < np.array([[12], [9], [7]])).astype(np.int32)
  types = np.tile(np.arange(12) >= 5, (3, 1)).astype(np.int32)
  positions = np.tile(np.arange(12, dtype=np.int32), (3, 1))
  return {"tokens": tokens, "segments": segments, "types": types, "positions": positions}


@pytest.mark.parity
def test_our_discriminator_is_theirs(with_pieces):
  import transformers

  theirs, info = transformers.ElectraForPreTraining.from_pretrained(
    with_pieces / "theirs", output_loading_info=True
  )
  assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys"))
  step = manager.find(with_pieces / "ours")
  config = manager.describe(step).config
  batch = inputs(config.model.vocab_size)
  found = ours_logits(manager.restore(step, "params"), config, batch)
  real = batch["segments"] > 0
  np.testing.assert_allclose(theirs_logits(theirs, batch)[real], found[real], atol=1e-4)


@pytest.mark.parity
@pytest.mark.parametrize("embedding_size", [16, 32])
def test_their_discriminator_is_ours(embedding_size, tmp_path):
  import torch
  import transformers

  config = transformers.ElectraConfig(
    vocab_size=vocabulary_of(tmp_path),
    embedding_size=embedding_size,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=48,
    max_position_embeddings=24,
  )
  theirs = transformers.ElectraForPreTraining(config)
  generator = torch.Generator().manual_seed(0)
  with torch.no_grad():
    for name, parameter in theirs.named_parameters():
      parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
      if "LayerNorm.weight" in name:
        parameter += 1.0
  theirs.save_pretrained(tmp_path)
  params, ours, tokenizer = huggingface.read(tmp_path)
  batch = inputs(config.vocab_size)
  real = batch["segments"] > 0
  expected, found = theirs_logits(theirs, batch), np.asarray(ours_logits(params, ours, batch))
  assert np.abs(expected[real] - found[real]).max() <= 1e-5 * np.abs(expected[real]).max()
  huggingface.write(params, ours, tokenizer, tmp_path / "ours", "")
  (tmp_path / "again").mkdir()
  export.to_transformers(manager.find(tmp_path / "ours"), tmp_path / "again")
  before, after = (
    safetensors.numpy.load_file(folder / "model.safetensors")
    for folder in (tmp_path, tmp_path / "again")
  )
  assert set(before) == set(after)
  assert all((before[name] == after[name]).all() for name in before)


def test_a_published_layout_is_fine_tuned(with_pieces, tmp_path):
  """What transformers saves, without a generator, goes through the same config."""
  config = fine_tuning("classification", tmp_path, with_pieces / "theirs")
  loop.train(config, tmp_path / "tuned", say=lambda text: None)
