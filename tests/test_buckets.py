"""Workdirs in a bucket: gs:// of a store on this machine that speaks Google's protocol."""

import json
import logging
import os
import socket

import numpy as np
import pytest
from etils import epath

from llm import storage
from llm.checkpoints import locate, manager
from llm.core import UserError, flatten
from llm.runs import workdir
from llm.studies import frame
from llm.training import experiment, loop
from tests import test_processes, test_study
from tests.conftest import tiny

trained = test_study.trained  # a fixture


@pytest.fixture(scope="module")
def bucket():
  """The name of an empty bucket."""
  from gcp_storage_emulator.handlers import objects
  from gcp_storage_emulator.server import create_server

  plain = objects.download

  def download(request, response, storage):
    """Tensorstore wants to know which version it reads; the real store says so."""
    plain(request, response, storage)
    if response.status in (200, 206):
      where = request.params["bucket_name"], request.params["object_id"]
      response["x-goog-generation"] = storage.get_file_obj(*where)["generation"]

  with socket.socket() as probe:
    probe.bind(("127.0.0.1", 0))
    port = probe.getsockname()[1]
  server = create_server("127.0.0.1", port, in_memory=True, default_bucket="runs")
  server.start()
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(objects, "download", download)
    for name in ("STORAGE_EMULATOR_HOST", "TENSORSTORE_GCS_HTTP_URL"):
      patch.setenv(name, f"http://127.0.0.1:{port}")
    # No credentials are looked for.
    patch.setenv("GOOGLE_AUTH_TOKEN_FOR_TESTING", "none")
    patch.setenv("NO_GCE_CHECK", "true")
    patch.setenv("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
    logging.getLogger("google.auth").setLevel(logging.ERROR)
    yield "gs://runs"
  server.stop()


def test_a_run_in_a_bucket(bucket, corpus, tmp_path):
  """It leaves what a run in a folder leaves, and goes on bit-equal after it was cut off.

  Every command takes its checkpoint.
  """
  run, said = f"{bucket}/it", []

  def constant(**more):
    return tiny(
      "gpt",
      f"text:{corpus}",
      training__save_every=2,
      training__log_every=1,
      optimizer__schedule="constant",
      **more,
    )

  loop.train(constant(training__steps=4), run, say=said.append)
  folder = storage.folder(run)
  # As if the machine had gone before the last file.
  (folder / "checkpoints/4/manifest.json").unlink()
  said.clear()
  result = loop.train(constant(), run, say=said.append)
  assert any("4 is no complete checkpoint" in line for line in said)
  assert any("resumed from gs://runs/it/checkpoints/2" in line for line in said)
  loop.train(constant(), tmp_path / "whole", say=said.append)
  ours, theirs = (
    flatten(manager.restore(manager.find(where), "params")) for where in (run, tmp_path / "whole")
  )
  assert all(np.array_equal(ours[path], theirs[path]) for path in theirs)
  lines = [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
  assert lines == list(range(1, result["step"] + 1))
  assert {path.name for path in folder.iterdir()} == {
    path.name for path in (tmp_path / "whole").iterdir()
  } - {"lock"}
  assert list((folder / "events").iterdir())
  assert manager.steps(folder / "checkpoints") == [6, 4]
  assert experiment.load(locate.find(run)).tokenizer.name == "bytes"
  # The store's own checksum tells what has the same size.
  description = folder / "checkpoints/6/description.json"
  description.write_text(description.read_text().replace('"width": 32', '"width": 64'))
  with pytest.raises(UserError, match=r"description.json is damaged \(its MD5 is not the one"):
    manager.verify(folder / "checkpoints/6")
  assert manager.find(run).name == "4"


def test_a_save_that_fails_costs_nothing_that_was_saved(bucket, corpus, monkeypatch):
  run = f"{bucket}/failing"
  config = tiny("gpt", f"text:{corpus}", training__save_every=2, training__keep=1)
  write = manager.write_manifest
  monkeypatch.setattr(
    manager, "write_manifest", lambda folder: write(folder) if folder.name == "2" else refuse()
  )

  def refuse():
    raise PermissionError("no")

  with pytest.raises(UserError, match="cannot save step 4 .*newest complete checkpoint is step 2"):
    loop.train(config, run, say=lambda *_: None)
  monkeypatch.setattr(manager, "write_manifest", write)
  assert manager.find(run).name == "2"
  loop.train(config, run, say=lambda *_: None)
  assert manager.find(run).name == "6"


def test_a_log_that_cannot_be_written_is_not_worth_the_run(bucket, corpus, monkeypatch, capsys):
  write = epath.Path.write_bytes
  monkeypatch.setattr(
    type(epath.Path(bucket)),
    "write_bytes",
    lambda path, data: refuse() if path.name == "metrics.jsonl" else write(path, data),
  )

  def refuse():
    raise PermissionError("no")

  loop.train(tiny("gpt", f"text:{corpus}"), f"{bucket}/silent", say=lambda *_: None)
  assert "metrics.jsonl cannot be written now: no" in capsys.readouterr().err
  assert manager.find(f"{bucket}/silent").name == "6"


def test_a_bucket_that_cannot_be_written_is_said(bucket, corpus, monkeypatch):
  monkeypatch.setattr(
    workdir,
    "write_json",
    lambda *_: (_ for _ in ()).throw(OSError("Forbidden: storage.objects.create")),
  )
  with pytest.raises(UserError, match="cannot be written: Forbidden"):
    loop.train(tiny("gpt", f"text:{corpus}"), f"{bucket}/forbidden", say=lambda *_: None)


@pytest.mark.slow
def test_two_processes_in_a_bucket_are_those_in_a_folder(bucket, corpus, tmp_path, monkeypatch):
  monkeypatch.setattr(test_processes, "PLAIN", dict(os.environ))
  for where in (f"{bucket}/two", tmp_path / "two"):
    assert test_processes.start(2, corpus, where, 8, "--config.training.save_every=4").wait() == 0
  ours, theirs = (
    flatten(manager.restore(manager.find(where), "params"))
    for where in (f"{bucket}/two", tmp_path / "two")
  )
  assert all(np.array_equal(ours[path], theirs[path]) for path in theirs)


def test_a_study_in_a_bucket(bucket, tmp_path, trained):
  """It leaves what a study in a folder leaves, and its report can be made again from there."""
  study, base = test_study.settings(**test_study.SMALL, held_out=("6x128:4e6",))
  untimed = test_study.untimed
  there, here = storage.folder(f"{bucket}/study"), storage.folder(tmp_path / "study")
  figures = [frame.run(study, base, folder) for folder in (there, here)]
  assert untimed(figures[0]) == untimed(figures[1]) and len(trained) == 2 * 10
  assert {path.name for path in there.iterdir()} == {path.name for path in here.iterdir()}
  assert (there / "scaling_law.png").read_bytes()[:4] == b"\x89PNG"
  assert (there / "logs/2x32-1e+06-0.txt").read_text() == "trained\n"
  (there / "report.md").unlink()
  assert untimed(frame.run(study, base, there)) == untimed(figures[0])
  assert (there / "report.md").exists() and len(trained) == 2 * 10


def test_what_is_no_bucket(bucket, tmp_path):
  with pytest.raises(UserError, match="no such bucket"):
    storage.folder("gs://elsewhere/run")
  with pytest.raises(UserError, match="no such checkpoint folder"):
    manager.find(f"{bucket}/nothing")
  for name in ("s3://bucket/run", "gs://"):
    with pytest.raises(UserError, match="gs://BUCKET/FOLDER"):
      storage.folder(name)
  with pytest.raises(UserError, match="would be read as a pattern"):
    storage.folder(tmp_path / "lr[3e-4]")


def test_a_corpus_in_a_bucket(bucket, tmp_path):
  """Read from a bucket and written to it: the same shards, which train from where they lie."""
  from llm.config import DataConfig
  from llm.data import documents, shards, sources
  from tests.test_corpus import prepare, prose, text_config, write_jsonl

  texts = [prose(n) for n in range(6)] + [prose(0)]
  write_jsonl(tmp_path / "in" / "a.jsonl", texts)
  folder = storage.folder(f"{bucket}/corpus/in")
  (folder / "a.jsonl").write_text((tmp_path / "in" / "a.jsonl").read_text())
  steps = ["exact_duplicates"]
  here = prepare(tmp_path / "out", text_config(steps, input=str(tmp_path / "in")))
  there = prepare(f"{bucket}/corpus/out", text_config(steps, input=f"{bucket}/corpus/in"))
  assert here["dropped"] == there["dropped"] == {"exact_duplicates": 1}
  config = DataConfig(cache=str(tmp_path / "cache"))
  loaded = []
  for path in (f"{tmp_path}/out/shards", f"{bucket}/corpus/out/shards"):
    source = sources.parse_one(f"shards:{path}", config)
    loaded.append(documents.load(source, shards.tokenizer(source), "split"))
  np.testing.assert_array_equal(loaded[0].tokens_N[:], loaded[1].tokens_N[:])
  np.testing.assert_array_equal(loaded[0].tokens_N[7:30], loaded[1].tokens_N[7:30])
  np.testing.assert_array_equal(loaded[0].sentences, loaded[1].sentences)
