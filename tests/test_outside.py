"""What comes from outside is bounded: in time, in memory, in where it lies, and verified."""

import concurrent.futures
import json
import os
import pathlib
import shutil
import time
import types

import jax
import numpy as np
import pytest

from llm import bounded, cache, config_file, environment, reading, sharding, storage
from llm import config as config_lib
from llm.checkpoints import huggingface, layout, manager
from llm.config import DataConfig
from llm.core import UserError, flatten
from llm.data import documents, record_files, sources, templates
from llm.objectives import chat
from llm.training import experiment, room
from tests import fuzz
from tests.conftest import tiny

GOLDEN = fuzz.GOLDEN


def test_a_bounded_call_ends_and_the_next_one_works():
  worker = bounded.Worker("time:sleep", 0.3, 64)
  started = time.monotonic()
  with pytest.raises(bounded.Failed) as late:
    worker(60)
  assert late.value.reason == bounded.TOOK_TOO_LONG and time.monotonic() - started < 30
  assert worker(0) is None
  with pytest.raises(bounded.Failed, match="TypeError"):
    worker("x")
  worker.close()
  with pytest.raises(bounded.Failed) as ended:
    bounded.Worker("os:_exit", 5, 64)(3)
  assert ended.value.reason == bounded.CRASHED


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="Linux keeps the limit")
def test_threads_get_the_values_of_their_own_calls():
  worker = bounded.Worker("builtins:abs", 30, 64)
  with concurrent.futures.ThreadPoolExecutor(8) as threads:
    assert list(threads.map(worker, range(-300, 0))) == list(range(300, 0, -1))


def test_a_bounded_call_takes_no_more_memory():
  worker = bounded.Worker("builtins:bytearray", 10, 64)
  with pytest.raises(bounded.Failed) as failed:
    worker(2**30)
  assert failed.value.reason == bounded.OUT_OF_MEMORY
  worker.close()


@pytest.mark.parametrize(
  "template, message",
  [
    ("{{ 'x' * 10**10 }}", "ran out of the memory"),
    ("{{ 'x'.center(10**9) }}", "ran out of the memory"),
    ("{% for i in range(10**9) %}{{ i }}{% endfor %}", "Range too big"),
    ("{% for i in range(9**5) %}{% for j in range(9**5) %}{% endfor %}{% endfor %}", "more than"),
    ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "nested too deep"),
    ("{{ '\ud800' }}", "surrogates"),
  ],
)
def test_a_template_is_bounded(template, message, monkeypatch):
  worker = bounded.Worker("llm.data.templates:_rendered", 1, templates.MEGABYTES)
  monkeypatch.setattr(templates, "_worker", lambda: worker)
  with pytest.raises(UserError, match=f"does not render: .*{message}"):
    chat.Template(template).render([])
  worker.close()


@pytest.mark.parametrize(
  "model, training, message",
  [
    (dict(num_layers=10_000, width=4096), {}, "parameters, whose training takes at least"),
    (dict(width=1_000_000), {}, "[0-9,]+ would fit: lower config.model"),
    ({}, dict(batch_size=100_000_000), "at most [0-9,]+ rows fit"),
    (dict(max_length=2**20), dict(sequence_length=2**20), "take shorter rows"),
  ],
)
def test_what_cannot_fit_is_refused_before_it_is_allocated(model, training, message, corpus):
  keys = {f"model__{k}": v for k, v in model.items()}
  keys |= {f"training__{k}": v for k, v in training.items()}
  config = tiny("gpt", f"text:{corpus}", mesh__data=1, **keys)
  mesh = sharding.make_mesh(config.mesh, jax.devices()[:1])
  prepared = experiment.prepare(config, say=lambda text: None).on(mesh)
  with pytest.raises(UserError, match=message):
    room.plan_that_fits(prepared, mesh)


def test_a_process_asks_its_own_devices_for_their_memory():
  """Of a device of another process, JAX raises."""

  class Device:
    platform = "tpu"

    def __init__(self, limit):
      self.limit = limit

    def memory_stats(self):
      assert self.limit, "MemoryStats is only supported for addressable devices"
      return {"bytes_limit": self.limit}

  devices = np.array([Device(0), Device(16)])
  mesh = types.SimpleNamespace(devices=devices, local_devices=[devices[1]], size=2)
  assert room.memory_of(mesh) == 32


def test_what_fits_is_not_refused(corpus):
  config = tiny("gpt", f"text:{corpus}", mesh__data=8)
  mesh = sharding.make_mesh(config.mesh)
  prepared = experiment.prepare(config, say=lambda text: None).on(mesh)
  room.plan_that_fits(prepared, mesh)


@pytest.mark.parametrize(
  "program, message",
  [
    ("def get_config(:\n", r"c.py:1: SyntaxError: "),
    ("def get_config():\n  x = 1\n  return x / 0\n", r"c.py:3: ZeroDivisionError: division by"),
    ("def get_config():\n  import sys\n  sys.exit(3)\n", r"c.py:3: SystemExit: 3"),
    ("def get_config():\n  pass\n", "get_config returns None, not a config"),
    ("x = 1\n", "defines no function get_config"),
  ],
)
def test_an_error_of_a_config_file_is_shown_with_its_line(program, message, tmp_path):
  (tmp_path / "c.py").write_text(program)
  with pytest.raises(UserError, match=message) as error:
    config_file._Parser("config").parse(str(tmp_path / "c.py"))
  assert "\n" not in str(error.value)


def _loop(path):
  path.symlink_to(path)


@pytest.mark.parametrize(
  "make, message",
  [
    (os.mkfifo, "is a pipe: give a regular file"),
    (lambda path: path.symlink_to("/dev/zero"), "is a device: give a regular file"),
    (_loop, "symbolic links"),
  ],
)
@pytest.mark.parametrize("kind", ["text", "jsonl", "csv", "squad", "parquet"])
def test_only_regular_files_are_read(kind, make, message, tmp_path):
  make(tmp_path / "x")
  source = sources.parse_one(f"{kind}:{tmp_path}/x", DataConfig(cache=str(tmp_path / "cache")))
  for read in (source.digest, lambda: next(source.records())):
    with pytest.raises(UserError, match=message):
      read()


def test_a_line_that_never_ends_comes_in_parts(tmp_path, monkeypatch):
  monkeypatch.setattr(record_files, "MOST_CHARACTERS", 100)
  (tmp_path / "x").write_text("word " * 100 + "\n\nlast\n")
  source = sources.parse_one(f"text:{tmp_path}/x", DataConfig())
  texts = [record["text"] for record in source.records()]
  assert max(map(len, texts)) <= 200 and "".join("".join(texts).split()) == "word" * 100 + "last"
  with pytest.raises(UserError, match=r"x:1: a line of more than 100 characters"):
    list(sources.parse_one(f"jsonl:{tmp_path}/x", DataConfig()).records())


@pytest.mark.parametrize(
  "text, message",
  [
    (r'{"text": "a \ud800 b"}', r"x:1: a string has \\ud800, half of a surrogate pair"),
    ('{"text": ' + "[" * 100_000, "x:1: not JSON that can be read: it is nested too deep"),
  ],
)
def test_json_that_no_tokenizer_takes_is_named(text, message, tmp_path):
  (tmp_path / "x").write_text(text + "\n")
  with pytest.raises(UserError, match=message):
    list(sources.parse_one(f"jsonl:{tmp_path}/x", DataConfig()).records())


@pytest.mark.parametrize(
  "plain, message",
  [
    (None, "config must hold groups of keys, not None"),
    ("gpt", "config must hold groups of keys, not 'gpt'"),
    ({"a\n": {}}, r"unknown key config.'a\\n': known keys: data"),
    ({"model": {"a\n": 1}}, r"unknown key config.model.'a\\n': known keys: att"),
  ],
)
def test_a_config_that_is_none_is_one_line(plain, message):
  with pytest.raises(UserError, match=message) as raised:
    config_lib.freeze(plain)
  assert "\n" not in str(raised.value)


STEP = fuzz.STEP
# Orbax writes these after the manifest, and nothing reads them.
UNREAD = manager.CHANGING - {manager.MANIFEST}
HARMLESS = ("removed", "emptied", "cut", "grown", "a folder", 12345)


def test_damage_to_any_file_of_a_checkpoint_is_found(tmp_path):
  """Nothing that became of a file is read, and an older step that is whole is taken."""
  expected = flatten(manager.restore(manager.find(STEP), "params"))
  root = tmp_path / "checkpoints"
  shutil.copytree(STEP, root / "2")
  for file in fuzz._files(STEP):
    for damage in [*sorted(fuzz.DAMAGES.keys() - {"none"}), 12345]:
      shutil.rmtree(root / "3", ignore_errors=True)
      shutil.copytree(STEP, root / "3")
      fuzz._damaged(root / "3" / file, damage)
      found = manager.find(tmp_path, lambda text: None)
      harmless = pathlib.Path(file).name in UNREAD and damage in HARMLESS
      assert found.name == ("3" if harmless else "2"), (file, damage)
  restored = flatten(manager.restore(manager.find(tmp_path, lambda text: None), "params"))
  assert all((restored[path] == expected[path]).all() for path in expected)


@pytest.mark.slow
def test_a_flipped_bit_anywhere_is_found(tmp_path):
  copy = pathlib.Path(shutil.copytree(STEP, tmp_path / "checkpoints/3"))
  step = storage.folder(copy)
  for file in fuzz._files(STEP):
    good = (STEP / file).read_bytes()
    if pathlib.Path(file).name in UNREAD:
      continue
    for at in range(0, len(good), 1 + len(good) // 60):
      (copy / file).write_bytes(good[:at] + bytes([good[at] ^ 1]) + good[at + 1 :])
      if file != manager.MANIFEST:
        with pytest.raises(manager.Damaged):
          manager.verify(step)
      else:  # a digit of a name or a digest; white space says the same
        try:
          manager.verify(step)
        except manager.Damaged:
          continue
        assert good[at : at + 1].isspace()
    (copy / file).write_bytes(good)


def test_a_manifest_leads_nowhere_else(tmp_path):
  step = storage.folder(shutil.copytree(STEP, tmp_path / "3"))
  for name in ("../x", "/etc/passwd", "params/../../x", "a\0b", ""):
    (step / manager.MANIFEST).write_text(
      '{"description.json": [1, ""], %s: [1, ""]}' % json.dumps(name)
    )
    with pytest.raises(manager.Damaged):
      manager.verify(step)


def test_a_damaged_cache_is_named_and_made_again(tmp_path, byte_tokenizer, capsys):
  (tmp_path / "x.txt").write_text("One. Two.\n\nThree.\n")
  source = sources.parse_one(f"text:{tmp_path}/x.txt", DataConfig(cache=str(tmp_path / "cache")))
  expected = np.array(documents.load(source, byte_tokenizer, "split").tokens_N)
  (tokens,) = (tmp_path / "cache").rglob("tokens.bin")
  data = bytearray(tokens.read_bytes())
  data[4] ^= 1
  tokens.write_bytes(data)
  again = np.array(documents.load(source, byte_tokenizer, "split").tokens_N)
  assert (again == expected).all()
  said = capsys.readouterr().err
  assert "SHA-256 of tokens.bin" in said and "made again" in said
  tokens.parent.joinpath(cache.RECORD).write_text("[]")
  assert (np.array(documents.load(source, byte_tokenizer, "split").tokens_N) == expected).all()


def test_a_bucket_that_does_not_answer_is_left(monkeypatch):
  monkeypatch.setattr(storage, "ANSWERS_WITHIN", 0.2)
  assert isinstance(storage._error_of(lambda: time.sleep(5)), TimeoutError)
  assert storage._error_of(lambda: None) is None


@pytest.mark.parametrize(
  "name, value, message",
  [
    ("XLA_FLAGS", "--xla_no_such_flag=1", "this jaxlib has no flag --xla_no_such_flag"),
    ("XLA_FLAGS", "nonsense", "must be flags, --NAME=VALUE"),
    ("JAX_NUM_CPU_DEVICES", "10000", "must be a number from 1 to 1024"),
  ],
)
def test_a_fault_of_the_environment_is_one_line(name, value, message, monkeypatch):
  monkeypatch.setenv(name, value)
  assert message in environment.fault()
  monkeypatch.setenv(name, "--xla_backend_optimization_level=0" if name == "XLA_FLAGS" else "8")
  assert environment.fault() == ""


def test_weights_without_a_tokenizer_take_one(tmp_path):
  copy = pathlib.Path(shutil.copytree(GOLDEN / "llama", tmp_path / "copy"))
  (copy / "tokenizer.json").rename(tmp_path / "tokenizer.json")
  with pytest.raises(UserError, match="there is no tokenizer .* --tokenizer=PATH"):
    huggingface.read(copy)
  expected = huggingface.read(GOLDEN / "llama")
  for path in (tmp_path / "tokenizer.json", GOLDEN / "llama"):
    params, _, tokenizer = huggingface.read(copy, path)
    assert tokenizer.pieces == expected[2].pieces


@pytest.mark.parametrize("regex", ["(?:(?:x|x|xx)+)+y", "(("])
def test_a_tokenizer_that_explodes_is_refused(regex, tmp_path):
  definition = reading.read_json(GOLDEN / "llama/tokenizer.json", dict)
  definition["pre_tokenizer"] = {
    "type": "Split",
    "pattern": {"Regex": regex},
    "behavior": "Isolated",
    "invert": False,
  }
  (tmp_path / "tokenizer.json").write_text(json.dumps(definition))
  with pytest.raises(UserError, match="tokenizer.json cannot be used"):
    layout.read_tokenizer(tmp_path)
