"""The first steps of pretraining beside torch: the same weights, batches and optimizer."""

import json

import numpy as np
import pytest

from llm.checkpoints import export, manager
from llm.training import loop
from tests.conftest import sentences, tiny

pytestmark = pytest.mark.parity

STEPS = 6
RATE = 1e-3


@pytest.fixture(scope="module")
def one_document(tmp_path_factory):
  """A text of one document: a row holds one segment, for torch's models know no packing."""
  path = tmp_path_factory.mktemp("document") / "text.txt"
  path.write_text(" ".join(sentences(0, 400)) + "\n")
  return path


def pretraining(family, text, **overrides):
  return tiny(
    family,
    f"text:{text}",
    model__dropout=0.0,
    model__dtype="float32",
    optimizer__name="adamw",
    optimizer__learning_rate=RATE,
    optimizer__schedule="constant",
    optimizer__warmup_steps=0,
    optimizer__weight_decay=0.0,
    optimizer__grad_clip_norm=0.0,
    training__log_every=1,
    **overrides,
  )


def losses_of(workdir):
  lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
  return [line["loss"] for line in lines if line.get("split") != "eval"]


def torch_loss(family, model, batch, pieces):
  """The mean loss of a batch of ours by a model of transformers, over so many pieces.

  An exported T5 has rows that pad its vocabulary.
  """
  import torch

  arrays = {name: torch.tensor(np.asarray(array)) for name, array in batch.items()}
  long = {name: array.long() for name, array in arrays.items() if not array.is_floating_point()}
  inputs = {"input_ids": long["tokens"], "attention_mask": (long["segments"] > 0).long()}
  if family == "t5":
    inputs["decoder_input_ids"] = long["decoder_tokens"]
    inputs["decoder_attention_mask"] = (long["decoder_segments"] > 0).long()
  logits = model(**inputs).logits[..., :pieces]
  targets, weights = long.get("targets"), arrays.get("weights")
  if family == "bert":
    targets, weights = long["masked_targets"], arrays["masked_weights"]
    logits = logits.gather(1, long["masked_positions"][..., None].expand(-1, -1, logits.shape[-1]))
  log_probs = torch.log_softmax(logits, -1).gather(-1, targets[..., None])[..., 0]
  return -(log_probs * weights).sum() / weights.sum()


@pytest.mark.parametrize(
  "family, architecture",
  [
    ("gpt", "GPT2LMHeadModel"),
    ("bert", "BertForMaskedLM"),
    ("t5", "T5ForConditionalGeneration"),
  ],
)
def test_losses_of_the_first_steps_are_torchs(family, architecture, one_document, tmp_path):
  import torch
  import transformers

  plain = {"objective__next_sentence": False} if family == "bert" else {}
  start = tmp_path / "start"
  loop.train(pretraining(family, one_document, training__steps=1, **plain), start)
  config = pretraining(
    family, one_document, training__steps=STEPS, transfer__checkpoint=str(start), **plain
  )
  loop.train(config, tmp_path / "run")
  (tmp_path / "exported").mkdir()
  export.to_transformers(manager.find(start), tmp_path / "exported")
  model = getattr(transformers, architecture).from_pretrained(tmp_path / "exported").train()
  optimizer = torch.optim.AdamW(
    model.parameters(), RATE, (0.9, 0.999), config.optimizer.epsilon, weight_decay=0.0
  )
  experiment, mesh = loop.on_mesh(config, None, loop.silent, None)
  theirs = []
  for step in range(STEPS):
    loss = torch_loss(family, model, experiment.batches[step], experiment.config.model.vocab_size)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    theirs.append(loss.item())
  assert theirs[-1] < theirs[0] - 0.1  # it learns
  np.testing.assert_allclose(losses_of(tmp_path / "run"), theirs, rtol=2e-4)
