"""A thousand broken configs and data files: every one works or ends as a UserError of one line."""

import json
import random

import pytest

from llm import config as config_lib
from llm import sharding
from llm.core import UserError
from llm.training import experiment
from tests.conftest import tiny

VALUES = [
  None,
  "",
  "x",
  "0",
  "[1]",
  "(",
  "a=b",
  "-1",
  0,
  1,
  -1,
  3,
  10**9,
  0.0,
  0.5,
  -0.5,
  float("nan"),
  float("inf"),
  True,
  False,
  (),
  ("a",),
  (1,),
  ["a"],
  {},
  {"a": 1},
  "text:",
  "text:no/such",
  "jsonl:{corpus}",
  "max:",
  "10:5",
  "😀",
]


def mutated(config: dict, rng: random.Random, corpus) -> dict:
  config = json.loads(json.dumps(config))
  for _ in range(rng.randint(1, 3)):
    group = rng.choice(list(config))
    value = rng.choice(VALUES)
    kind = rng.random()
    if not isinstance(config[group], dict) or kind < 0.05:
      config[group] = value
    elif kind < 0.15:
      config[group]["".join(rng.choices("abcdefg_", k=5))] = value
    elif kind < 0.2 and config[group]:
      del config[group][rng.choice(list(config[group]))]
    elif config[group]:
      key = rng.choice(list(config[group]))
      if rng.random() < 0.7:  # of the right type, so that it gets further
        value = rng.choice([v for v in VALUES if type(v) is type(config[group][key])] or [value])
      config[group][key] = value.format(corpus=corpus) if isinstance(value, str) else value
  return config


def survives(attempt) -> bool:
  """True if it worked, False after a UserError of one line; anything else is raised."""
  try:
    attempt()
    return True
  except UserError as error:
    assert str(error).strip() and "Traceback" not in str(error)
    return False


@pytest.mark.parametrize("kind", ["bert", "gpt", "t5"])
def test_broken_configs(kind, corpus, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)  # a mutated cache folder is made here
  rng = random.Random(kind)
  good = config_lib.thaw(tiny(kind, f"text:{corpus}", data__eval=f"text:{corpus}"))

  def attempt(plain):
    config = config_lib.freeze(plain)
    sharding.mesh_shape(config.mesh, 8)
    experiment.prepare(config, say=lambda text: None).batches.read(0, range(2))

  outcomes = [survives(lambda: attempt(mutated(good, rng, corpus))) for _ in range(300)]
  assert 20 < sum(outcomes) < 280


def broken(data: bytes, rng: random.Random) -> bytes:
  data = bytearray(data)
  for _ in range(rng.randint(1, 4)):
    at = rng.randrange(max(len(data), 1))
    how = rng.random()
    if how < 0.4:
      data[at : at + 1] = [rng.randrange(256)]
    elif how < 0.6:
      del data[at : at + rng.randint(1, 40)]
    elif how < 0.8:
      data[at:at] = rng.choice(
        [b"\n", b"\x00", b'"', b"\xff", b"null", b"1e999", b"{}", b"\r", "\u2028".encode()]
      )
    else:
      data = data[: at + 1]
  return bytes(data)


@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_broken_data(kind, reviews, tmp_path):
  rng = random.Random(kind)
  lines = [json.loads(line) for line in (reviews / "eval.jsonl").read_text().splitlines()][:8]
  good = (
    "\n".join(map(json.dumps, lines))
    if kind == "jsonl"
    else "text,label\n" + "\n".join(f'"{line["text"]}",{line["label"]}' for line in lines)
  ).encode()
  path = tmp_path / f"data.{kind}"
  config = tiny(
    "classifier",
    f"{kind}:{path}",
    data__eval=f"{kind}:{path}",
    tokenizer__name="bytes",
    training__batch_size=2,
  )
  config = config_lib.freeze(
    {**config_lib.thaw(config), "model": config_lib.thaw(tiny("bert", "text:x"))["model"]}
  )

  def attempt():
    path.write_bytes(broken(good, rng))
    experiment.prepare(config, say=lambda text: None).batches[0]

  outcomes = [survives(attempt) for _ in range(250)]
  assert 20 < sum(outcomes) < 240
