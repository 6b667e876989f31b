"""Faults that were found by reading: what was wrong stays mended."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from llm import cache, command, sharding
from llm import config as config_lib
from llm.checkpoints import huggingface
from llm.config import MeshConfig, ModelConfig
from llm.core import UserError
from llm.data import tokenizer as tokenizer_lib
from llm.inference.labeller import Labeller
from llm.objectives import base, classification, masked_lm, span_qa
from llm.training import experiment
from llm.training import step as step_lib

SHAPE = {"num_layers": 1, "width": 16, "num_heads": 2, "mlp_dim": 32, "max_length": 64}


def labeller(tmp_path, objective):
  """A checkpoint of random parameters that labels by an objective."""
  tokenizer = tokenizer_lib.ByteTokenizer()
  model = ModelConfig(name="bert", vocab_size=tokenizer.vocab_size, dropout=0.0, **SHAPE)
  network = experiment.build(objective, model)
  row = base.zero_row(objective.batch_spec(model, 64))
  params = jax.jit(lambda: step_lib.init_params(network, row, jax.random.key(0)))()
  config = config_lib.freeze(config_lib.defaults(base.to_mapping(objective)))
  training = dataclasses.replace(config.training, sequence_length=64)
  config = dataclasses.replace(config, model=model, training=training)
  huggingface.write(params, config, tokenizer, tmp_path / "run", "random")
  return Labeller(tmp_path / "run" / "checkpoints" / "0")


def test_a_text_alone_is_no_question(tmp_path):
  """It ended in a traceback."""
  answers = labeller(tmp_path, span_qa.Objective())
  answers.check({"question": "Who?", "text": "Nobody did."})
  with pytest.raises(UserError, match="has no question: a checkpoint of span_qa takes"):
    answers.check({"text": "Nobody did."})
  with pytest.raises(UserError, match="has a text_pair, which would be ignored"):
    answers.check({"question": "Who?", "text": "Nobody did.", "text_pair": "Nor did she."})


def test_a_classifier_ignores_no_question(tmp_path):
  """It labelled the context and said nothing."""
  labels = labeller(tmp_path, classification.Objective(classes=("bad", "good"), num_classes=2))
  labels.check({"text": "fine", "text_pair": "so so"})
  with pytest.raises(UserError, match="has a question, which would be ignored"):
    labels.check({"question": "Is it?", "text": "fine"})
  # A number of devices by which 32 rows cannot be divided.
  labels.mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:3])
  predictions, rows = labels.label([{"text": "fine"}, {"text": "a bad one"}])
  assert [r["label"] in ("bad", "good") for r in labels.objective.results(predictions, rows)] == [
    True,
    True,
  ]


@pytest.mark.parametrize("epsilon", [0.0, 0.1])
def test_the_masked_lm_head_normalises_with_the_models_epsilon(epsilon):
  """It was 1e-12 whatever the checkpoint said."""
  model = ModelConfig(name="bert", vocab_size=30, dropout=0.0, norm_epsilon=epsilon, **SHAPE)
  objective = masked_lm.Objective(next_sentence=False)
  head = experiment.build(objective, model).head
  hidden = jax.random.normal(jax.random.key(0), (1, 4, 16))
  table = jax.random.normal(jax.random.key(1), (128, 16))
  batch = {"masked_positions": jnp.array([[1, 3]]), "masked_targets": jnp.array([[5, 29]])}

  @jax.jit
  def drawn_and_applied():
    variables = head.init(jax.random.key(2), hidden, batch, table, train=False)
    return variables, head.apply(variables, hidden, batch, table, train=False)["losses"]

  variables, losses = drawn_and_applied()
  x = np.asarray(hidden, np.float64)[0, [1, 3]] @ variables["params"]["transform"]["kernel"]
  x = 0.5 * x * (1 + scipy.special.erf(x / np.sqrt(2)))
  x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + (epsilon or 1e-12))
  logits = (x @ np.asarray(table, np.float64).T)[:, :30]
  expected = np.log(np.exp(logits).sum(-1)) - logits[[0, 1], [5, 29]]
  np.testing.assert_allclose(losses[0], expected, rtol=1e-4)


def test_a_file_that_cannot_be_read_is_one_line(tmp_path, capsys):
  """Whether it was the user's was told by the name of the file at the end of the traceback."""

  def main():
    cache.file_digest(tmp_path / "missing.txt")

  with pytest.raises(SystemExit) as ended:
    command.run(main, ["command"])
  assert ended.value.code == 2
  assert capsys.readouterr().err == f"error: {tmp_path}/missing.txt: No such file or directory\n"


def test_a_cache_that_fails_is_our_fault(tmp_path, monkeypatch):
  def broken(self, target):
    raise OSError(5, "Input/output error", str(self))

  monkeypatch.setattr("pathlib.Path.rename", broken)
  with pytest.raises(RuntimeError, match="could not be renamed"):
    command.run(lambda: cache.made_once(tmp_path / "a", lambda folder: None), ["command"])
