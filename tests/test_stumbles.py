"""A newcomer's stumbles: what was silent, hidden or in the way stays mended."""

import itertools
import json
import pathlib
import re
import signal
import subprocess
import sys

import numpy as np
import pytest
import tokenizers

from llm import config as config_lib
from llm import idle_keys, predict
from llm.checkpoints import manager
from llm.core import UserError
from llm.data import frequencies
from llm.data import tokenizer as tokenizer_lib
from llm.data.documents import Documents
from llm.models import resolve
from llm.runs.stop import Stop
from llm.training import loop
from tests.conftest import tiny

ROOT = pathlib.Path(__file__).resolve().parents[1]


def lines_of(workdir):
  return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def test_data_that_changed_under_a_run_are_refused(corpus, tmp_path, capsys):
  """The run went on with other data. And what a run on text reached is said beside frequencies."""
  text = tmp_path / "text.txt"
  text.write_text(corpus.read_text())
  loop.train(tiny("gpt", f"text:{text}", training__steps=1), tmp_path / "run")
  assert "the frequencies of the pieces alone reach" in capsys.readouterr().out
  (line,) = lines_of(tmp_path / "run")
  assert line["perplexity"] == pytest.approx(np.exp(line["loss"])) and line["learning_rate"] > 0
  text.write_text(corpus.read_text() + "\n\nMore of it.")
  longer = tiny("gpt", f"text:{text}", training__steps=2)
  with pytest.raises(UserError, match="text.txt has changed since this run began.*--go_on"):
    loop.train(longer, tmp_path / "run")
  assert loop.train(longer, tmp_path / "run", go_on=True)["step"] == 2


def test_a_metric_that_does_not_exist_is_refused_before_the_first_step(corpus, tmp_path):
  source = f"text:{corpus}"
  config = tiny("gpt", source, data__eval=source, training__keep_best="max:f1")
  with pytest.raises(UserError, match="an evaluation has no 'f1', it has accuracy, loss"):
    loop.train(config, tmp_path / "run")
  assert not (tmp_path / "run" / "metrics.jsonl").read_text()
  assert not list((tmp_path / "run" / "checkpoints").iterdir())


def test_keys_that_do_nothing_are_said(recwarn):
  config = tiny("gpt", "text:a", optimizer__schedule="wsd")
  idle_keys.warn(config, ["optimizer.decay_share", "optimizer.beta1"])
  assert not recwarn.list
  idle_keys.warn(config, ["training.eval_every", "model.lora_alpha"])
  said = [str(warning.message) for warning in recwarn.list]
  assert said == [
    "config.training.eval_every does nothing: nothing is evaluated: config.data.eval is not set",
    "config.model.lora_alpha does nothing: there are no adapters: config.model.lora_rank=0",
  ]
  idle_keys.warn(config, ["model.rope_theta"])
  assert "no rotary positions" in str(recwarn.list[-1].message)


def test_the_keys_of_the_rules_exist():
  keys = [f"{g}.{name}" for g, cls in config_lib.GROUPS.items() for name in vars(cls())]
  for rule in idle_keys.RULES:
    pattern = rule.keys.split("|objective")[0]
    assert pattern.startswith("objective") or any(re.fullmatch(pattern, key) for key in keys)


def test_frequencies_are_those_of_the_training_text():
  def text(*tokens):
    bounds = np.array([0, len(tokens)])
    return Documents(np.array(tokens), bounds, np.arange(2), "", pathlib.Path())

  assert frequencies.unigram_loss([text(0, 0, 1)], text(0, 1), 3) == pytest.approx(
    -(np.log(3 / 6) + np.log(2 / 6)) / 2
  )


def test_float64_is_not_float32(monkeypatch):
  config = tiny("gpt", "text:a", model__dtype="float64").model
  with pytest.raises(UserError, match="set JAX_ENABLE_X64=1"):
    resolve.resolved(config, 32, "cpu")


def test_bytes_are_shown_and_exported():
  ours = tokenizer_lib.ByteTokenizer(3)
  assert [ours.shown(token) for token in (65, 32, 10, 200, 256)] == [
    "A",
    " ",
    "<0A>",
    "<C8>",
    "[PAD]",
  ]
  theirs = tokenizers.Tokenizer.from_buffer(ours.definition())
  for text in ("A warm\n\tfilm, été \U0001f600 \x00\x7f", "  two", ""):
    assert theirs.encode(text).ids == ours.encode([text])[0]
    assert theirs.decode(ours.encode([text])[0]) == text
  assert theirs.encode("a<extra_id_2>[MASK]").ids == [97, ours.sentinels[2], ours.mask]


def test_what_is_written_goes_through_links_and_devices(tmp_path):
  target = tmp_path / "target"
  target.write_text("old")
  (tmp_path / "link").symlink_to(target)
  predict._write_labels(["one\n"], tmp_path / "link")
  assert (tmp_path / "link").is_symlink() and target.read_text() == "one\n"
  predict._write_labels(["two\n"], pathlib.Path("/dev/null"))
  assert not pathlib.Path("/dev/null").is_file()


def test_only_python3_is_on_the_path(tmp_path):
  (tmp_path / "python3").symlink_to(sys.executable)
  done = subprocess.run(
    ["/bin/bash", "launch/local.sh", "--dry_run", "2", "--", "--config=a"],
    cwd=ROOT,
    env={"PATH": str(tmp_path), "PORT": "1"},
    capture_output=True,
    text=True,
  )
  assert done.returncode == 0 and " python3 -m llm.train" in done.stdout, done.stderr


def test_the_log_of_a_run_that_was_stopped_is_that_of_a_whole_one(corpus, tmp_path, monkeypatch):
  """Stopped between two lines of the log, and in an evaluation: each once."""
  source = f"text:{corpus}"
  config = tiny("gpt", source, data__eval=source, training__log_every=4, training__eval_every=3)
  whole = loop.train(config, tmp_path / "whole", say=loop.silent)
  polls = itertools.count()

  def requested(stop):
    stop.signal = stop.signal or signal.SIGTERM * (next(polls) in (1, 3))
    return stop.signal

  monkeypatch.setattr(Stop, "requested", requested)
  for step in (2, 3):
    with pytest.raises(SystemExit):
      loop.train(config, tmp_path / "stopped", say=loop.silent)
    assert manager.find(tmp_path / "stopped").name == str(step)
  stopped = loop.train(config, tmp_path / "stopped", say=loop.silent)
  assert stopped["eval"] == whole["eval"]
  timings = {"tokens_per_second", "input_wait", "mfu"}
  expected, actual = (
    [{name: line[name] for name in line.keys() - timings} for line in lines_of(tmp_path / run)]
    for run in ("whole", "stopped")
  )
  assert actual == expected and [line["step"] for line in actual] == [3, 4, 6, 6]


def test_a_disk_that_is_full_ends_a_run_in_one_line(corpus, tmp_path, monkeypatch):
  """The thread of TensorBoard's writer died, and the run waited for it for ever."""

  class FullWriter:
    def write_event(self, event):
      raise OSError(28, "No space left on device")

    close = flush = lambda self: self.write_event(None)

  monkeypatch.setattr("tensorboardX.event_file_writer.EventsWriter", lambda _: FullWriter())
  config = tiny("gpt", f"text:{corpus}", training__steps=2)
  with pytest.raises(UserError, match="the logs in .* cannot be written: No space left on device"):
    loop.train(config, tmp_path / "run", say=loop.silent)
