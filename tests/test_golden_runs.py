"""An earlier revision left runs half done: they load here and go on as they would have there."""

import dataclasses
import importlib.util
import json
import pathlib
import shutil

import pytest

from llm import config as config_lib
from llm import storage
from llm.checkpoints import manager
from llm.training import experiment, loop

GOLDEN = pathlib.Path(__file__).parent / "golden"
EXPECTED = json.loads((GOLDEN / "runs" / "expected.json").read_text())


def _maker():
  """tests/golden/make_runs.py, which is no module of the package."""
  spec = importlib.util.spec_from_file_location("make_runs", GOLDEN / "make_runs.py")
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


@pytest.fixture
def runs(tmp_path, monkeypatch):
  shutil.copytree(GOLDEN / "runs", tmp_path / "runs")
  monkeypatch.chdir(tmp_path / "runs")
  return tmp_path / "runs"


@pytest.mark.parametrize("name", ["bert", "classifier", "t5"])
def test_an_old_run_goes_on(name, runs):
  config = config_lib.freeze(json.loads((runs / name / "config.json").read_text()))
  loop.train(config, runs / name, say=lambda text: None)
  lines = [json.loads(line) for line in (runs / name / "metrics.jsonl").read_text().splitlines()]
  losses = {str(line["step"]): line["loss"] for line in lines if line["step"] > 3}
  assert losses == pytest.approx(EXPECTED["losses"][name], rel=1e-4)


def test_batches_are_those_of_before(runs):
  assert _maker().batch_digests() == EXPECTED["batches"]


@pytest.mark.parametrize("name", list(_maker().OBJECTIVES))
def test_the_spec_of_a_batch_is_what_rows_make(name, runs):
  maker = _maker()
  objective, model, source, fields = maker.OBJECTIVES[name]
  config = maker.tiny(objective, model, source, fields)
  config.training.sequence_length = 128 if objective != "preference" else 256
  made = experiment.prepare(config_lib.freeze(config), say=lambda text: None)
  batch = made.batches[0]
  length = config.training.sequence_length
  spec = made.objective.batch_spec(made.config.model, length)
  assert {k: (v.shape[1:], v.dtype) for k, v in batch.items()} == {
    k: (v.shape, v.dtype) for k, v in spec.items()
  }


def test_a_run_goes_on_in_the_types_that_it_began_with(runs):
  """What auto is on this machine decides for a new run alone; explicit types are the user's."""
  step = storage.folder(runs / "bert" / "checkpoints" / "3")
  description = json.loads((step / "description.json").read_text())
  description["config"]["model"]["dtype"] = "auto"
  description["settled"] = {"dtype": "bfloat16_operands", "scan": "scan", "attention": "splash"}
  (step / "description.json").write_text(json.dumps(description))
  manager.write_manifest(step)
  config = config_lib.freeze(json.loads((runs / "bert" / "config.json").read_text()))
  auto = dataclasses.replace(config, model=dataclasses.replace(config.model, dtype="auto"))
  for asked, dtype in ((auto, "bfloat16_operands"), (config, "float32")):
    resumed = experiment.prepare(asked, step, say=lambda text: None).on_platform("cpu")
    assert resumed.config.model.dtype == dtype
    assert resumed.description()["config"]["model"]["dtype"] == asked.model.dtype
  assert resumed.config.model.attention == "reference" and resumed.config.model.scan == "unroll"
