"""One process, eight virtual CPU devices, one compilation cache; a small text to learn from."""

# JAX gets its settings before the imports that may start it.
# ruff: noqa: E402

import ctypes
import functools
import gc
import importlib.metadata
import os
import sys

# pytest-xdist: one core a worker. Threads of two workers would wait for each other (torch's spin).
if hasattr(os, "sched_setaffinity") and (worker := os.environ.get("PYTEST_XDIST_WORKER")):
  cores = sorted(os.sched_getaffinity(0))
  os.sched_setaffinity(0, {cores[int(worker.removeprefix("gw")) % len(cores)]})

# Most of the time goes into compiling small programs. tests/test_numerics.py has what users have.
FAST_COMPILE = ["--xla_backend_optimization_level=0", "--xla_cpu_parallel_codegen_split_count=1"]
if importlib.metadata.version("jaxlib").startswith("0.10."):  # later ones know no such flag
  FAST_COMPILE.append("--xla_cpu_use_fusion_emitters=false")
os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *FAST_COMPILE])
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# llm/environment.py sets the same; some tests start without it.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import jax
import pytest

jax.config.update("jax_num_cpu_devices", 8)
# Where a program was written is of no use here, and takes a tenth of the time.
jax.config.update("jax_traceback_in_locations_limit", 0)

from llm import command
from llm import config as config_lib
from llm.data import tokenizer as tokenizer_lib
from llm.models import precision
from llm.objectives import base

command.use_compilation_cache()
# Smaller programs take as long to write and read as to compile.
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)

WORDS = (
  "the film was a joy to watch and every scene of it had warmth but its plot made no sense at all "
  "while critics of that year found much to praise in how slowly this quiet story ends"
).split()


def sentences(seed: int, count: int) -> list[str]:
  """Sentences of common words."""
  import random

  rng = random.Random(seed)
  return [
    " ".join(rng.choices(WORDS, k=rng.randint(4, 12))).capitalize() + "." for _ in range(count)
  ]


def pytest_collection_modifyitems(items):
  """The files with the longest tests come first, so that no worker is left alone with one."""
  items.sort(key=lambda item: item.path.name not in ("test_two_phases.py", "test_parity.py"))


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
  """A text file of 60 documents of 2 to 9 sentences."""
  import random

  rng = random.Random(0)
  path = tmp_path_factory.mktemp("corpus") / "corpus.txt"
  path.write_text("\n\n".join("\n".join(sentences(i, rng.randint(2, 9))) for i in range(60)) + "\n")
  return path


@pytest.fixture(scope="session")
def reviews(tmp_path_factory):
  """Two JSONL files whose label is told by one word."""
  folder = tmp_path_factory.mktemp("reviews")
  import json

  for name, seed, count in (("train", 1, 96), ("eval", 2, 32)):
    lines = []
    for i, text in enumerate(sentences(seed, count)):
      label = ("bad", "good")[i % 2]
      lines.append(
        json.dumps({"text": f"{'praise' if i % 2 else 'slowly'} {text}", "label": label})
      )
    (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
  return folder


@pytest.fixture(autouse=True, scope="module")
def _programs_of_one_file():
  """A file's compiled programs go when it ends: memory would run out with those of all files."""
  yield
  jax.clear_caches()
  gc.collect()
  if sys.platform == "linux":
    ctypes.CDLL(None).malloc_trim(0)


@pytest.fixture(autouse=True, scope="session")
def _products_in_float32():
  """What a CPU measures of itself does not decide what tests compare."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(precision, "native_bfloat16", lambda: False)
    yield


@pytest.fixture(autouse=True, scope="session")
def _own_cache(tmp_path_factory):
  """Token caches of tests stay out of the user's; compiled programs may be shared."""
  os.environ["PRETUNE_CACHE"] = str(tmp_path_factory.mktemp("cache"))


def tiny(kind: str, train: str, **overrides):
  """A config of a very small model. overrides: "group__key"=value."""
  config = config_lib.defaults(
    base.defaults(
      {
        "bert": "masked_lm",
        "gpt": "causal_lm",
        "t5": "span_corruption",
        "classifier": "classification",
      }[kind]
    )
  )
  if kind != "classifier":
    config.model.update(
      name=kind, num_layers=2, width=32, num_heads=2, mlp_dim=64, max_length=64, dropout=0.1
    )
    config.tokenizer.update(name="bytes", sentinels=20)
  config.data.train = train
  config.data.sentences = "lines"
  config.mesh.data = -1
  config.optimizer.update(
    learning_rate=1e-2, warmup_steps=2, name="adafactor" if kind == "t5" else "adamw"
  )
  config.training.update(batch_size=8, sequence_length=32, steps=6, log_every=2)
  for key, value in overrides.items():
    group, _, name = key.partition("__")
    config[group][name] = value
  return config_lib.freeze(config)


@pytest.fixture(scope="session")
def bert_start(corpus, tmp_path_factory):
  """The workdir of a tiny BERT after one step, which many runs start from. Not to be written to."""
  from llm.training import loop

  workdir = tmp_path_factory.mktemp("start") / "bert"
  loop.train(tiny("bert", f"text:{corpus}", training__steps=1), workdir, say=lambda *_: None)
  return workdir


@pytest.fixture(scope="session")
def gpt_start(corpus, tmp_path_factory):
  """The workdir of a tiny GPT after one step. Not to be written to."""
  from llm.training import loop

  workdir = tmp_path_factory.mktemp("start") / "gpt"
  config = tiny("gpt", f"text:{corpus}", training__steps=1, model__max_length=128)
  loop.train(config, workdir, say=lambda *_: None)
  return workdir


@functools.cache
def _program(module):
  return jax.jit(lambda params, batch: module.apply({"params": params}, batch, train=False))


def outputs_of(module, params, batch):
  """What a network gives without dropout, as one program: operations alone compile for longer."""
  return _program(module)(params, batch)


@pytest.fixture(scope="session")
def byte_tokenizer():
  return tokenizer_lib.ByteTokenizer()
