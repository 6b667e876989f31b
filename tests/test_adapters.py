"""Low-rank adapters: nothing at first, alone in training, exact when merged."""

import json

import jax
import numpy as np
import pytest
import safetensors.numpy

from llm.checkpoints import adapters, export, locate, manager
from llm.core import UserError, flatten, unflatten
from llm.training import experiment, loop
from tests.conftest import tiny
from tests.test_huggingface import GOLDEN
from tests.test_models import batch_of, hidden, model_of, params_of

EVERY = r"(query|key|value|out|up|gate|down)$"


@pytest.mark.parametrize("name", ["bert", "gpt", "llama"])
def test_fresh_adapters_change_nothing_and_merged_ones_are_exact(name):
  batch = batch_of(2)
  model = model_of(name, lora_rank=3, lora_alpha=6.0, lora_targets=EVERY)
  params = params_of(model)
  plain = unflatten({k: v for k, v in flatten(params).items() if not adapters.is_adapter(k)})
  layers = sum(k.endswith("/kernel") and "/layers/" in k for k in flatten(plain))
  assert sum(k.endswith("lora_a") for k in flatten(params)) == layers >= 6
  assert (
    np.asarray(hidden(model, params, batch)) == np.asarray(hidden(model_of(name), plain, batch))
  ).all()
  rng = np.random.default_rng(0)
  moved = unflatten(
    {
      k: rng.normal(size=v.shape).astype(np.float32) * 0.1 if k.endswith("lora_b") else v
      for k, v in flatten(params).items()
    }
  )
  found, merged = (
    hidden(model, moved, batch),
    hidden(model_of(name), adapters.merge(moved, 6.0), batch),
  )
  assert np.abs(np.asarray(found) - np.asarray(hidden(model, params, batch))).max() > 0.05
  np.testing.assert_allclose(found, merged, atol=1e-5)


def test_only_adapters_and_head_are_trained(tmp_path, bert_start, reviews):
  config = tiny(
    "classifier",
    f"jsonl:{reviews}/train.jsonl",
    transfer__checkpoint=str(bert_start),
    transfer__skip=("^head/(?!pooler)",),
    model__lora_rank=2,
    model__lora_dropout=0.1,
    training__steps=3,
  )
  loop.train(config, tmp_path / "tuned")
  before, after = (
    flatten(manager.restore(manager.find(run), "params"))
    for run in (bert_start, tmp_path / "tuned")
  )
  for path, leaf in after.items():
    if path.endswith("lora_b"):
      assert np.abs(leaf).max() > 0
    elif path.startswith("backbone/") and not adapters.is_adapter(path):
      np.testing.assert_array_equal(leaf, before[path])
  moments = {
    k.rpartition("mu/")[2]
    for k in map(str, _paths(manager.restore(manager.find(tmp_path / "tuned"), "opt_state")))
    if "mu/" in k
  }
  assert moments and not any("backbone" in m and "lora_" not in m for m in moments)
  audit = json.loads((tmp_path / "tuned" / "transfer.json").read_text())["parameters"]
  assert {e["action"] for e in audit if adapters.is_adapter(e["path"])} == {"fresh"}
  saved = experiment.from_checkpoint(manager.find(tmp_path / "tuned"))
  assert saved.config.model.lora_rank == 2
  # The adapted run is a start like any other: its adapters are merged.
  again = tiny(
    "classifier",
    f"jsonl:{reviews}/train.jsonl",
    transfer__checkpoint=str(tmp_path / "tuned"),
    training__steps=1,
  )
  loop.train(again, tmp_path / "again")


def _paths(tree):
  return [
    "/".join(str(getattr(k, "key", getattr(k, "idx", k))) for k in path)
    for path, _ in jax.tree_util.tree_leaves_with_path(tree)
  ]


def test_targets_that_match_nothing_are_an_error(tmp_path, corpus):
  with pytest.raises(UserError, match="lora_targets='nothing' matches no linear layer"):
    loop.train(
      tiny("gpt", f"text:{corpus}", model__lora_rank=2, model__lora_targets="nothing"), tmp_path
    )


def test_adapters_leave_alone_in_pefts_layout(tmp_path, reviews):
  """base + B A alpha / r, read from their files, is the merged export; the head is in both."""
  config = tiny(
    "classifier",
    f"jsonl:{reviews}/train.jsonl",
    transfer__checkpoint=str(GOLDEN / "bert_classifier"),
    transfer__skip=("^head/classifier",),
    model__lora_rank=2,
    model__lora_alpha=6.0,
    model__lora_targets=EVERY,
    training__sequence_length=16,
    training__steps=3,
  )
  loop.train(config, tmp_path / "tuned")
  step = manager.find(tmp_path / "tuned")
  for folder, write in (("merged", export.to_transformers), ("alone", export.to_peft)):
    (tmp_path / folder).mkdir()
    write(step, tmp_path / folder)
  base, merged = (
    safetensors.numpy.load_file(f / "model.safetensors")
    for f in (GOLDEN / "bert_classifier", tmp_path / "merged")
  )
  alone = safetensors.numpy.load_file(tmp_path / "alone" / "adapter_model.safetensors")
  said = json.loads((tmp_path / "alone" / "adapter_config.json").read_text())
  assert said["r"] == 2 and said["modules_to_save"] == ["bert.pooler.dense", "classifier"]
  seen = 0
  for name, tensor in merged.items():
    key = f"base_model.model.{name.removesuffix('.weight')}"
    if f"{key}.lora_A.weight" in alone:
      assert name.removesuffix(".weight") in said["target_modules"]
      added = (
        alone[f"{key}.lora_B.weight"]
        @ alone[f"{key}.lora_A.weight"]
        * (said["lora_alpha"] / said["r"])
      )
      np.testing.assert_allclose(base[name] + added, tensor, atol=1e-6)
      assert np.abs(added).max() > 0
      seen += 1
    elif f"base_model.model.{name}" in alone:
      np.testing.assert_array_equal(alone[f"base_model.model.{name}"], tensor)
    else:
      np.testing.assert_array_equal(base[name], tensor)
  assert seen == 2 * 6
  with pytest.raises(UserError, match="has no adapters"):
    export.to_peft(locate.find(GOLDEN / "bert_classifier"), tmp_path)
