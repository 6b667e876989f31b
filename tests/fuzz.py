"""Every boundary under bad input by grammar: python -m tests.fuzz --minutes=30 [--only=NAME]

A case is kept where it works or ends in a UserError of one line, within SECONDS and MEGABYTES. A
fault is printed with the smallest case that hypothesis finds, and the seed that makes it again.
"""

import contextlib
import dataclasses
import faulthandler
import functools
import json
import os
import pathlib
import resource
import shutil
import signal
import tempfile
import time
import traceback
from typing import Any, Callable
from unittest import mock

import numpy as np
from absl import app, flags
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from llm import bounded, command, config_file, sharding
from llm import config as config_lib
from llm.checkpoints import huggingface, manager
from llm.config import DataConfig, ModelConfig
from llm.core import UserError
from llm.data import answers, documents, packing, sources, templates
from llm.data import tokenizer as tokenizer_lib
from llm.objectives import base, chat
from llm.runs import log, workdir
from llm.storage import folder as folder_of
from llm.training import experiment
from tests import grammars
from tests.conftest import tiny

ROOT = pathlib.Path(__file__).resolve().parents[1]
GOLDEN = ROOT / "tests" / "golden"
SECONDS = 10
MEGABYTES = 2048

MODEL = ModelConfig(name="bert", num_layers=1, width=32, num_heads=2, mlp_dim=64, max_length=64)
TALK = {
  "messages": [
    {"role": "user", "content": "a question"},
    {"role": "assistant", "content": "an answer", "weight": 1},
  ]
}
SQUAD = {
  "data": [
    {
      "paragraphs": [
        {
          "context": "anna met bob",
          "qas": [
            {"question": "who", "id": "1", "answers": [{"text": "anna", "answer_start": 0}]},
            {"question": "whom", "id": "2", "answers": [{"text": "bob", "answer_start": 9}]},
          ],
        }
      ]
    }
  ]
}
TABLE = b'text,label\n"a, film",good\nanother,bad\n'
PROGRAM = "from configs.pretrain_gpt import get_config"
# Objective -> records that it learns from.
RECORDS: dict[str, list] = {
  "classification": [{"text": "a film", "label": "good"}, {"text": "another", "label": "bad"}],
  "span_qa": [
    {"text": "anna met", "question": "who", "answers": [{"text": "anna", "answer_start": 0}]}
  ],
  "chat": [TALK, {"instruction": "do", "input": "", "output": "done"}],
  "preference": [{"prompt": "a", "chosen": "b", "rejected": "c"}],
  "text_to_text": [{"text": "a film", "target": "good"}],
}


@dataclasses.dataclass(frozen=True)
class Boundary:
  """cases: what comes from outside. attempt(case, folder): reads it; folder is empty.

  good: a case that works, without which a boundary that refuses everything would look well kept.
  """

  cases: st.SearchStrategy
  attempt: Callable[[Any, pathlib.Path], None]
  good: Any


def _config(plain: Any, folder: pathlib.Path):
  config = config_lib.freeze(plain)
  sharding.mesh_shape(config.mesh, 8)
  experiment.prepare(config, say=lambda text: None).batches.read(0, range(1))


def _config_program(text: str, folder: pathlib.Path):
  path = folder / "config.py"
  path.write_bytes(text.encode("utf-8", "surrogatepass"))
  config_file._Parser("config").parse(str(path))


def _arguments(arguments: list[str], folder: pathlib.Path):
  argv = ["train", f"--config={ROOT}/configs/pretrain_gpt.py:tiny", *arguments]
  before = set(flags.FLAGS)
  if "config" not in before:
    config_file.define("A config.")
  try:
    command._parse(argv, command.check_key_of_run)
  finally:
    for name in set(flags.FLAGS) - before:
      delattr(flags.FLAGS, name)


def _records(case: tuple[str, str, bytes], folder: pathlib.Path):
  kind, objective, content = case
  path = folder / f"x.{kind}"
  path.write_bytes(content)
  source = sources.parse_one(f"{kind}:{path}", DataConfig(cache=str(folder / "cache")))
  tokenizer = tokenizer_lib.ByteTokenizer()
  built = base.build({"name": objective}).fit((source,), tokenizer)
  rows = built.rows(source, tokenizer, DataConfig(), MODEL, 64)
  rows.example(0, np.random.default_rng(0))


@functools.cache
def _impatient() -> bounded.Worker:
  return bounded.Worker("llm.data.templates:_rendered", 1.0, templates.MEGABYTES)


def _template(source: str, folder: pathlib.Path):
  with mock.patch.object(templates, "_worker", _impatient):
    _encoded(source)


def _encoded(source: str):
  chat.Template(source).tokens(chat.conversation(TALK), tokenizer_lib.ByteTokenizer())


def _predictions(content: bytes, folder: pathlib.Path):
  (folder / "squad.json").write_text(json.dumps(SQUAD))
  (folder / "answers.json").write_bytes(content)
  source = sources.parse_one(f"squad:{folder}/squad.json", DataConfig())
  answers.of_file(folder / "answers.json", source)


def _published(case: tuple[str, str, bytes], folder: pathlib.Path):
  name, file, content = case
  copy = shutil.copytree(GOLDEN / name, folder / "copy")
  (copy / file).write_bytes(content)
  _, config, tokenizer = huggingface.read(copy)
  tokenizer.encode(["a text"])


# What becomes of a file, by its path.
DAMAGES: dict[str, Callable[[pathlib.Path], Any]] = {
  "none": lambda path: None,
  "removed": lambda path: path.unlink(),
  "emptied": lambda path: path.write_bytes(b""),
  "cut": lambda path: path.write_bytes(path.read_bytes()[:-1]),
  "grown": lambda path: path.write_bytes(path.read_bytes() + b"\0"),
  "a link": lambda path: (path.unlink(), path.symlink_to("/etc/hostname")),
  "a link to a copy": lambda path: (path.rename(f"{path}2"), path.symlink_to(f"{path}2")),
  "a device": lambda path: (path.unlink(), path.symlink_to("/dev/zero")),
  "a pipe": lambda path: (path.unlink(), os.mkfifo(path)),
  "a folder": lambda path: (path.unlink(), path.mkdir()),
}


def _damaged(path: pathlib.Path, damage: str | int):
  if isinstance(damage, str):
    DAMAGES[damage](path)
    return
  data = bytearray(path.read_bytes())
  if data:
    data[damage % len(data)] ^= 1 + damage % 255
  path.write_bytes(data)


def _files(folder: pathlib.Path) -> list[str]:
  return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


STEP = GOLDEN / "runs/bert/checkpoints/3"


def _checkpoint(case: tuple[str, str | int], folder: pathlib.Path):
  file, damage = case
  shutil.copytree(STEP, folder / "checkpoints/3")
  _damaged(folder / "checkpoints/3" / file, damage)
  experiment.load(manager.find(folder, lambda text: None))


def _described(case: tuple[str, bytes], folder: pathlib.Path):
  """A step whose files are what its manifest says, and whose JSON says nonsense."""
  file, content = case
  step = folder_of(shutil.copytree(STEP, folder / "checkpoints/3"))
  (step / file).write_bytes(content)
  if file != manager.MANIFEST:
    manager.write_manifest(step)
  experiment.load(manager.find(folder, lambda text: None))


def _workdir(case: tuple[str, bytes], folder: pathlib.Path):
  file, content = case
  (folder / file).write_bytes(content)
  log._keep_lines_up_to(3, folder / "metrics.jsonl")
  if (folder / "config.json").exists():
    workdir._check_same_config(folder_of(folder) / "config.json", tiny("bert", "text:x"))


def _kept(case: tuple[int, str | int], folder: pathlib.Path):
  """Documents and a plan from a damaged cache are what they were."""
  number, damage = case
  (folder / "x.txt").write_text("One. Two.\n\nThree is longer.\n\nFour.\n")
  source = sources.parse_one(f"text:{folder}/x.txt", DataConfig(cache=str(folder / "cache")))
  sizes = np.arange(17)

  def read() -> list:
    texts = documents.load(source, tokenizer_lib.ByteTokenizer(), "split")
    plan = packing.plan(texts, 16, sizes, source.cache)
    arrays = (texts.tokens_N, texts.sentences, texts.documents, plan.offsets, plan.starts)
    return [array.tolist() for array in arrays] + [plan.tokens]

  expected = read()
  files = _files(folder / "cache")
  _damaged(folder / "cache" / files[number % len(files)], damage)
  assert read() == expected


damages = st.integers(0, 10**6) | st.sampled_from(sorted(DAMAGES))
KEYS = [
  f"{group}.{field.name}"
  for group, cls in config_lib.GROUPS.items()
  for field in dataclasses.fields(cls)
]
flag_values = st.one_of(st.sampled_from(grammars.NASTY_TEXTS), grammars.leaves.map(str))


def _json_of(path: pathlib.Path) -> st.SearchStrategy[bytes]:
  return grammars.json_files(json.loads(path.read_text()))


def _published_files() -> st.SearchStrategy:
  files = []
  for name, file in [
    ("llama", "config.json"),
    ("llama", "tokenizer.json"),
    ("bert_classifier", "config.json"),
    ("modernbert", "config.json"),
    ("t5", "config.json"),
    ("t5", "tokenizer_config.json"),
  ]:
    content = _json_of(GOLDEN / name / file)
    files.append(st.tuples(st.just(name), st.just(file), content))
  settings = {"eos_token": {"content": "</s>"}, "chat_template": [{"name": "a", "template": "b"}]}
  index = {"weight_map": {"a": "model.safetensors"}}
  weights = st.just((GOLDEN / "llama/model.safetensors").read_bytes())
  return st.one_of(
    *files,
    st.tuples(st.just("llama"), st.just("tokenizer_config.json"), grammars.json_files(settings)),
    st.tuples(st.just("llama"), st.just(huggingface.INDEX), grammars.json_files(index)),
    st.tuples(st.just("llama"), st.just(huggingface.WEIGHTS), grammars.broken_bytes(weights)),
  )


def _record_files() -> st.SearchStrategy:
  lines = [
    st.tuples(st.just("jsonl"), st.just(name), grammars.json_lines(records))
    for name, records in RECORDS.items()
  ]
  table = grammars.broken_bytes(st.just(TABLE))
  csv = st.tuples(st.just("csv"), st.just("classification"), table)
  squad = st.tuples(st.just("squad"), st.just("span_qa"), grammars.json_files(SQUAD))
  return st.one_of(*lines, csv, squad)


def boundaries(corpus: pathlib.Path) -> dict[str, Boundary]:
  """All of them, by name. corpus: a text file."""
  good = json.loads(json.dumps(config_lib.thaw(tiny("gpt", f"text:{corpus}"))))
  good["data"]["cache"] = str(corpus.parent / "cache")
  config_json = json.dumps(good).encode()
  arguments = st.builds("--config.{}={}".format, st.sampled_from(KEYS), flag_values)
  described = [
    st.tuples(st.just(file), _json_of(STEP / file))
    for file in ("description.json", "tokenizer/tokenizer_config.json", "manifest.json")
  ]
  orbax = st.tuples(
    st.sampled_from(["params/_METADATA", "params/manifest.ocdbt", "params/_sharding"]),
    st.binary(max_size=20) | grammars.values.map(grammars.as_json),
  )
  logged = b'{"step": 1, "loss": 2.0}\n{"step": 4}\n'
  in_workdir = [
    st.tuples(st.just("config.json"), grammars.json_files(json.loads(config_json))),
    st.tuples(st.just("metrics.jsonl"), grammars.broken_bytes(st.just(logged))),
  ]
  named = {"1": "anna", "2": "bob"}
  described_well = ("description.json", (STEP / "description.json").read_bytes())
  step_files = st.sampled_from(_files(STEP))
  published = ("llama", "config.json", (GOLDEN / "llama/config.json").read_bytes())
  return {
    "configs": Boundary(grammars.broken_trees(st.just(good)), _config, good),
    "config programs": Boundary(grammars.config_programs, _config_program, PROGRAM),
    "arguments": Boundary(st.lists(arguments, max_size=3), _arguments, []),
    "records": Boundary(_record_files(), _records, ("csv", "classification", TABLE)),
    "templates": Boundary(grammars.statements, _template, chat.TEMPLATE),
    "predictions": Boundary(grammars.json_files(named), _predictions, json.dumps(named).encode()),
    "published": Boundary(_published_files(), _published, published),
    "checkpoints": Boundary(
      st.tuples(step_files, damages), _checkpoint, ("description.json", "none")
    ),
    "descriptions": Boundary(st.one_of(*described, orbax), _described, described_well),
    "workdirs": Boundary(st.one_of(*in_workdir), _workdir, ("metrics.jsonl", logged)),
    "caches": Boundary(st.tuples(st.integers(0, 20), damages), _kept, (0, "none")),
  }


@contextlib.contextmanager
def _in_time():
  """Raises TimeoutError after SECONDS. Code that Python cannot interrupt ends the process later."""

  def late(*_):
    raise TimeoutError(f"more than {SECONDS} s")

  signal.signal(signal.SIGALRM, late)
  signal.setitimer(signal.ITIMER_REAL, SECONDS)
  faulthandler.dump_traceback_later(3 * SECONDS, exit=True)
  try:
    yield
  finally:
    signal.setitimer(signal.ITIMER_REAL, 0)
    faulthandler.cancel_dump_traceback_later()


def is_kept(boundary: Boundary, case: Any) -> bool:
  """True if a case works, False after a UserError of one line; anything else is raised."""
  with tempfile.TemporaryDirectory() as folder, _in_time():
    try:
      boundary.attempt(case, pathlib.Path(folder))
      return True
    except UserError as error:
      assert str(error).strip() and "Traceback" not in str(error) and "\n" not in str(error)
      return False
    except OSError as error:  # llm/command.py says it in one line where it names a file
      assert error.filename
      return False


def run(boundary: Boundary, examples: int, number: int) -> tuple[int, int]:
  """(cases that worked, cases that were refused). Raises what a fault raises.

  number: the seed.
  """
  counts = {True: 0, False: 0}

  @seed(number)
  @settings(
    max_examples=examples,
    deadline=None,
    database=None,
    phases=[Phase.generate, Phase.shrink],
    suppress_health_check=list(HealthCheck),
  )
  @given(case=boundary.cases)
  def cases(case):
    counts[is_kept(boundary, case)] += 1

  cases()
  return counts[True], counts[False]


_MINUTES = flags.DEFINE_float("minutes", 30.0, "How long to try cases.")
_ONLY = flags.DEFINE_string("only", "", "The name of one boundary.")
_SEED = flags.DEFINE_integer("seed", 0, "The first seed.")
_EXAMPLES = flags.DEFINE_integer("examples", 50, "Cases of a boundary for each seed.")


def main(argv):
  os.chdir(tempfile.mkdtemp())  # a broken cache folder is made here
  os.environ["PRETUNE_CACHE"] = os.path.abspath("cache")
  bounded.limit_memory(MEGABYTES)
  corpus = pathlib.Path("corpus.txt").absolute()
  corpus.write_text("One sentence. Another.\n\nA third one is here.\n" * 20)
  selected = {n: b for n, b in boundaries(corpus).items() if _ONLY.value in n}
  totals = {name: [0, 0, 0] for name in selected}
  end = time.monotonic() + 60 * _MINUTES.value
  number = _SEED.value
  while time.monotonic() < end:
    for name, boundary in selected.items():
      try:
        worked, refused = run(boundary, _EXAMPLES.value, number)
      except Exception as error:
        totals[name][2] += 1
        print(f"FAULT in {name}, seed {number}: {type(error).__name__}: {error}")
        print("\n".join(getattr(error, "__notes__", [])), flush=True)
        traceback.print_exc(limit=-3)
        continue
      totals[name][0] += worked
      totals[name][1] += refused
    number += 1
    print(f"seed {number}: {totals}", flush=True)
  peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
  print(f"boundary: worked, refused, faults: {totals}; peak {peak} MB")
  return 1 if any(faults for _, _, faults in totals.values()) else 0


if __name__ == "__main__":
  app.run(main)
