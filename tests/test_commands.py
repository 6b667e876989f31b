"""What a user types: the whole way on a small text, and one line for every mistake."""

import json
import os
import pathlib
import re
import shutil
import subprocess
import sys

import pytest
from absl import flags

from llm import command, train
from llm import config as config_lib
from llm.checkpoints import manager
from llm.core import UserError
from llm.objectives import base
from llm.studies import frame
from llm.training import loop
from tests.conftest import tiny

ROOT = pathlib.Path(__file__).resolve().parents[1]
SMALL = [
  "--config.model.num_layers=1",
  "--config.model.width=32",
  "--config.model.num_heads=2",
  "--config.model.mlp_dim=64",
  "--config.model.max_length=64",
  "--config.tokenizer.name=bytes",
  "--config.training.batch_size=8",
  "--config.training.sequence_length=32",
  "--config.data.sentences=lines",
]


def run(*arguments):
  done = subprocess.run(
    [sys.executable, "-m", *map(str, arguments)],
    cwd=ROOT,
    capture_output=True,
    text=True,
    env={**os.environ, "PYTHONPATH": str(ROOT)},
  )
  return done.returncode, done.stdout, done.stderr


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory, corpus):
  workdir = tmp_path_factory.mktemp("pretrained")
  status, out, err = run(
    "llm.train",
    "--config=configs/pretrain_bert.py:tiny",
    f"--workdir={workdir}",
    *SMALL,
    "--config.training.steps=4",
    f"--config.data.train=text:{corpus}",
    f"--config.data.eval=text:{corpus}",
  )
  assert status == 0, err
  return workdir


def test_pretrain_transfer_finetune_evaluate_predict(pretrained, reviews, tmp_path):
  status, out, err = run(
    "llm.train",
    "--config=configs/finetune_classification.py",
    f"--workdir={tmp_path}/sentiment",
    f"--config.transfer.checkpoint={pretrained}",
    f"--config.data.train=jsonl:{reviews}/train.jsonl",
    f"--config.data.eval=jsonl:{reviews}/eval.jsonl",
    "--config.training.batch_size=8",
    "--config.training.sequence_length=64",
    "--config.training.epochs=12.0",
    "--config.optimizer.learning_rate=3e-3",
  )
  assert (
    status == 0
    and "copied" in out
    and "fresh       head/classifier/bias" in out
    and "head/lm/bias" in out
  ), err
  audit = json.loads((tmp_path / "sentiment" / "transfer.json").read_text())
  assert {e["action"] for e in audit["parameters"]} == {"copied", "fresh", "dropped"}
  result = json.loads((tmp_path / "sentiment" / "result.json").read_text())
  assert result["eval"]["accuracy"] > 0.8  # one word tells the label
  status, out, err = run("llm.evaluate", f"--checkpoint={tmp_path}/sentiment")
  assert status == 0, err
  # The best epoch is what other commands take.
  best = result["best"]["value"]
  assert json.loads(out.splitlines()[-1])["accuracy"] == pytest.approx(best)
  status, out, err = run(
    "llm.evaluate",
    f"--checkpoint={tmp_path}/sentiment",
    f"--config.data.eval=jsonl:{reviews}/train.jsonl",
  )
  assert status == 0 and json.loads(out.splitlines()[-1])["accuracy"] > 0.8, err
  status, out, err = run(
    "llm.predict",
    f"--checkpoint={tmp_path}/sentiment",
    f"--input={reviews}/eval.jsonl",
    f"--output={tmp_path}/out.jsonl",
  )
  assert status == 0, err
  lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
  truth = [json.loads(line) for line in (reviews / "eval.jsonl").read_text().splitlines()]
  right = sum(a["label"] == b["label"] for a, b in zip(lines, truth)) / len(truth)
  assert right == pytest.approx(best)
  assert all(abs(sum(line["probabilities"].values()) - 1) < 1e-4 for line in lines)
  status, out, err = run(
    "llm.predict", f"--checkpoint={tmp_path}/sentiment", "--text=praise the film"
  )
  assert status == 0 and json.loads(out)["label"] in ("good", "bad"), err


def test_a_workdir_tells_all(pretrained):
  names = {p.name for p in pretrained.iterdir()}
  assert {
    "config.json",
    "run.json",
    "metrics.jsonl",
    "result.json",
    "checkpoints",
    "events",
  } <= names
  record = json.loads((pretrained / "run.json").read_text())
  assert record["versions"]["jax"] and "revision" in record and record["devices"]


def test_a_run_ends_with_the_next_commands(pretrained, reviews, tmp_path):
  config = tiny("bert", "text:a.txt", data__eval="text:b.txt")
  assert train.next_commands(config, "bert", f"{pretrained}/").splitlines() == [
    f"  python -m llm.evaluate --checkpoint={pretrained}",
    "  python -m llm.train --config=configs/finetune_classification.py "
    f"--workdir={pretrained}_tuned --config.transfer.checkpoint={pretrained} "
    "--config.data.train=jsonl:YOURS.jsonl --config.data.eval=jsonl:YOURS_HELD_OUT.jsonl",
  ]


def test_a_dry_run_says_what_the_run_would_be_and_writes_nothing(pretrained, reviews, tmp_path):
  """Keys with their origins, the header, the time and a batch."""
  status, out, err = run(
    "llm.train",
    "--config=configs/finetune_classification.py",
    f"--workdir={tmp_path / 'run'}",
    f"--config.transfer.checkpoint={pretrained}",
    f"--config.data.train=jsonl:{reviews}/train.jsonl",
    f"--config.data.eval=jsonl:{reviews}/eval.jsonl",
    "--config.training.sequence_length=96",
    "--config.training.save_every=-1",
    "--dry_run",
  )
  assert status == 0 and not (tmp_path / "run").exists(), err
  origins = {}
  for line in out.splitlines():
    if line.startswith("config."):
      key, value, origin = re.split(r"  +", line.strip(), maxsplit=2)
      origins[key] = value, origin
  file = "configs/finetune_classification.py"
  assert origins["config.training.sequence_length"] == ("64", "the positions of the checkpoint")
  assert origins["config.training.save_every"][1] == "an epoch"
  assert origins["config.objective.pooling"] == ('"mean"', file)
  assert origins["config.model.width"] == ("32", "the checkpoint")
  assert origins["config.optimizer.learning_rate"][1] == "config.recipe"
  assert origins["config.objective.classes"] == ('["bad", "good"]', "the data")
  assert origins["config.training.eval_every"][1] == "an epoch"
  assert origins["config.model.scan"] == ('"unroll"', "this machine")
  assert origins["config.training.seed"] == ("0", "default")
  header = next(line for line in out.splitlines() if line.startswith("recipe"))
  assert f"learning rate {origins['config.optimizer.learning_rate'][0]}" in header
  assert re.search(r"^time .* s a step, .* evaluations of .*: about \d+:\d\d", out, re.MULTILINE)
  assert "label of document 1: " in out and "tfidf_accuracy" in out


def test_show(pretrained, corpus):
  config = [
    "--config=configs/pretrain_bert.py:tiny",
    "--config.objective.next_sentence=True",
    *SMALL,
    f"--config.data.train=text:{corpus}",
    "--config.data.eval=",
  ]
  status, out, err = run("llm.show", "batch", *config)
  assert status == 0 and "=> [MASK]>" in out and "next sentence in document 1:" in out, err
  status, out, err = run("llm.show", "sharding", *config)
  assert status == 0 and "params/backbone/token/embedding" in out and "optimizer/" in out, err
  status, out, err = run("llm.show", "checkpoint", f"--checkpoint={pretrained}")
  assert status == 0 and "whole by the digest of every file" in out and "head/lm/bias" in out, err
  relative = os.path.relpath(pretrained, ROOT)
  assert run("llm.show", "checkpoint", f"--checkpoint={relative}")[1].count("head/lm/bias") == 1
  assert run("llm.show", "nothing")[0] == 2


def test_regression_is_the_same_task(corpus, tmp_path, reviews):
  path = tmp_path / "scores.jsonl"
  lines = [json.loads(line) for line in (reviews / "train.jsonl").read_text().splitlines()]
  path.write_text(
    "\n".join(
      json.dumps({"text": line["text"], "label": float(line["label"] == "good")}) for line in lines
    )
  )
  loop.train(tiny("gpt", f"text:{corpus}", training__steps=2), tmp_path / "gpt")
  config = tiny(
    "classifier",
    f"jsonl:{path}",
    transfer__checkpoint=str(tmp_path / "gpt"),
    data__eval=f"jsonl:{path}",
    objective__num_classes=1,
    training__steps=40,
    transfer__skip=("^head/",),
  )
  figures = loop.train(config, tmp_path / "scores")["eval"]
  assert figures["pearson"] > 0.5 and figures["spearman"] > 0.4 and figures["loss"] < 0.25


MISTAKES = [
  (["llm.train"], "--config is missing|--workdir is missing"),
  (["llm.train", "--config=configs/nothing.py", "--workdir=W"], "configs/nothing.py"),
  (["llm.train", "--config=configs/pretrain_bert.py:huge", "--workdir=W"], "unknown size 'huge'"),
  (
    [
      "llm.train",
      "--config=configs/pretrain_bert.py:tiny",
      "--workdir=W",
      "--config.model.widht=3",
    ],
    "did you mean config.model.width",
  ),
  (
    ["llm.train", "--config=configs/pretrain_bert.py:tiny", "--workdir=W", "--config.lr=3"],
    "optimizer.learning_rate",
  ),
  (
    [
      "llm.train",
      "--config=configs/pretrain_bert.py:tiny",
      "--workdir=W",
      "--config.model.width=wide",
    ],
    "width",
  ),
  (
    [
      "llm.train",
      "--config=configs/pretrain_bert.py:tiny",
      "--workdir=W",
      "--config.training.steps=1e4",
    ],
    "steps",
  ),
  (
    [
      "llm.train",
      "--config=configs/pretrain_bert.py:tiny",
      "--workdir=W",
      "--config.objective.mask_rat=0.2",
    ],
    "mask_rat of masked_lm: did you mean config.objective.mask_rate",
  ),
  (
    ["llm.train", "--config=configs/pretrain_bert.py:tiny", "--workdir=W", "--nonsense=1"],
    "nonsense",
  ),
  (
    ["llm.train", "--config=configs/pretrain_bert.py:tiny", "--workdir=W", "stray"],
    "unexpected argument 'stray'",
  ),
  (
    [
      "llm.train",
      "--config=configs/pretrain_bert.py:tiny",
      "--workdir=W",
      "--config.data.train=text:no/such",
    ],
    "no such file",
  ),
  (["llm.train", "--config=configs/pretrain_bert.py:tiny", "--workdir=/proc/x/y"], "workdir"),
  (["llm.evaluate"], "--checkpoint is missing"),
  (["llm.evaluate", "--checkpoint=no/such"], "no such checkpoint folder"),
  (["llm.evaluate", "--checkpoint=tests"], "holds no complete checkpoint"),
  (["llm.predict", "--checkpoint=tests"], "give either --text, or --question"),
  (["llm.predict", "--checkpoint=tests", "--question=why?"], "--question needs --context"),
  (
    ["llm.evaluate", "--predictions=README.md", "--config.data.eval=squad:README.md"],
    "README.md: not JSON",
  ),
  (["llm.generate"], "--checkpoint is missing"),
  (
    ["llm.generate", "--checkpoint=tests", "--prompt=a", "--top_p=2"],
    r"--top_p=2.0 must lie in \(0, 1\]",
  ),
  (["llm.convert", "sideways"], "needs one of from_hf, from_gguf, to_hf"),
  (["llm.convert", "from_hf", "--source=tests"], "--output is missing"),
  (["llm.convert", "from_hf", "--source=tests", "--output=W"], "no folder of transformers"),
  (
    ["llm.convert", "from_gguf", "--source=README.md", "--output=W"],
    "cannot be read as GGUF|needs the package gguf",
  ),
  (["llm.convert", "to_hf", "--checkpoint=tests", "--output=tests"], "exists"),
]


OFTEN = (1, 3, 13)  # in a process of its own each


def mistaken(arguments, corpus, tmp_path):
  """A whole command with a mistake."""
  is_run = arguments[0] == "llm.train" and len(arguments) > 2
  data = [f"--config.data.train=text:{corpus}", "--config.data.eval=", *SMALL] if is_run else []
  arguments = [a.replace("--workdir=W", f"--workdir={tmp_path}/w") for a in arguments]
  given = {a.partition("=")[0] for a in arguments}
  return [*arguments, *(d for d in data if d.partition("=")[0] not in given)]


def fault_of(status, printed, message):
  """What is wrong with how a mistaken command ended; "" where it says so in one line."""
  lines = [line for line in printed.splitlines() if line.startswith("error: ")]
  one_line = status == 2 and len(lines) == 1 and "Traceback" not in printed
  return "" if one_line and re.search(message, lines[0]) else f"{message}: {status}, {printed}"


@pytest.mark.parametrize("number", OFTEN)
def test_a_mistake_is_one_line_and_status_2(number, corpus, tmp_path):
  arguments, message = MISTAKES[number]
  status, out, err = run(*mistaken(arguments, corpus, tmp_path))
  assert not fault_of(status, err, message), out


@pytest.mark.slow
def test_every_mistake_is_one_line_and_status_2(corpus, tmp_path):
  """Each in a fork of a process that has imported what commands do."""
  commands = [mistaken(arguments, corpus, tmp_path) for arguments, _ in MISTAKES]
  done = subprocess.run(
    [sys.executable, "-m", "tests.documented", "outcomes"],
    input=json.dumps(commands),
    cwd=ROOT,
    capture_output=True,
    text=True,
  )
  ended = json.loads(done.stdout)
  faults = [
    fault_of(status, printed, message)
    for (status, printed), (_, message) in zip(ended, MISTAKES, strict=True)
  ]
  assert not any(faults), [fault for fault in faults if fault]


@pytest.fixture
def flags_of_one_command():
  """What a command line adds to the flags goes with it."""
  yield
  for name in [name for name in flags.FLAGS if name.startswith("config.")]:
    delattr(flags.FLAGS, name)


@pytest.mark.parametrize(
  "overrides, message",
  [
    (
      ["--config.objective.mask_ratee=0.3"],
      r"mask_ratee of masked_lm: did you mean config.objective.mask_rate\?",
    ),
    (  # the command line changes the objective, before the key or after it
      ["--config.objective.strid", "64", "--config.objective.name=span_qa"],
      r"strid of span_qa: did you mean config.objective.stride\?",
    ),
    (
      ["--config.objective.name=span_qa", "--config.objective.stride=64"],
      "pretrain_bert.py:tiny is a config of masked_lm, and has no keys of span_qa",
    ),
    (
      ["--config.objective.name=maskedlm", "--config.objective.mask_ratee=0.3"],
      "config.objective.name must be one of .*, not 'maskedlm'",
    ),
    (["--config.objective.mask_rate=high"], "could not convert string to float: 'high'"),
  ],
)
def test_an_unknown_key_of_an_objective_is_named(
  overrides, message, monkeypatch, flags_of_one_command
):
  argv = ["train", "--config=configs/pretrain_bert.py:tiny", *overrides]
  monkeypatch.setattr(sys, "argv", argv)  # ml_collections reads it
  monkeypatch.chdir(ROOT)
  with pytest.raises(UserError, match=message) as error:
    command._parse(argv, command.check_key_of_run)
  assert "\n" not in str(error.value)


def test_a_config_with_keys_of_another_objective_names_both():
  with pytest.raises(UserError, match="unknown key config.objective.mask_rate of causal_lm"):
    base.build({"name": "causal_lm", "mask_rate": 0.3})


BAD_CONFIGS = [
  (dict(training__sequence_length=128), "longer than the model's 64 positions"),
  (dict(training__batch_size=9), "must be a multiple of mesh.data"),
  (dict(mesh__data=3), "does not fill the 8 devices"),
  (dict(mesh__data=4, mesh__tensor=-1, mesh__fsdp=-1), "at most one of them -1"),
  (dict(model__vocab_size=77), "vocab_size=77 but the tokenizer has 282"),
  (dict(model__num_heads=3), "multiple of num_heads=3"),
  (dict(mesh__tensor=8, mesh__data=1), "mesh.tensor=8 does not divide dimension"),
  (dict(objective__name="maskedlm"), "masked_lm"),
  (dict(training__epochs=1.0), "set one of them, the other to 0"),
  (dict(training__profile="5"), "'10:15'"),
  (dict(training__keep_best="accuracy"), "max:METRIC"),
  (dict(optimizer__freeze="nothing"), "matches no parameter"),
  (dict(optimizer__freeze="."), "matches every parameter"),
  (dict(optimizer__freeze="("), "no regular expression"),
  (dict(optimizer__schedule="step"), "'linear', 'cosine', 'constant'"),
  (dict(tokenizer__name="wordpiece"), "needs config.tokenizer.path"),
  (dict(transfer__checkpoint="no/such"), "no such checkpoint folder"),
  (dict(objective__mask_rate=1.5), "must be above 0 and at most 1, not 1.5"),
]


@pytest.mark.parametrize(
  "overrides, message", BAD_CONFIGS, ids=[str(o)[:50] for o, _ in BAD_CONFIGS]
)
def test_bad_configs_are_named(overrides, message, corpus, tmp_path):
  with pytest.raises(UserError, match=message) as error:
    loop.train(tiny("bert", f"text:{corpus}", **overrides), tmp_path)
  assert "\n" not in str(error.value)


def test_an_unknown_label_in_the_eval_set_is_named(pretrained, reviews, tmp_path):
  (tmp_path / "eval.jsonl").write_text(
    '{"text": "a", "label": "good"}\n{"text": "b", "label": "ugly"}\n'
  )
  config = tiny(
    "classifier",
    f"jsonl:{reviews}/train.jsonl",
    data__eval=f"jsonl:{tmp_path}/eval.jsonl",
    transfer__checkpoint=str(pretrained),
    transfer__skip=(r"^head/(?!pooler)",),
  )
  with pytest.raises(
    UserError, match=r"eval.jsonl:2: unknown label 'ugly'; the classes are bad, good"
  ):
    loop.train(config, tmp_path / "w")


def test_a_set_with_one_class_is_named(pretrained, tmp_path):
  (tmp_path / "train.jsonl").write_text('{"text": "a", "label": "good"}\n' * 3)
  config = tiny("classifier", f"jsonl:{tmp_path}/train.jsonl", transfer__checkpoint=str(pretrained))
  with pytest.raises(UserError, match="train.jsonl: only the label 'good' occurs") as error:
    loop.train(config, tmp_path / "w")
  assert "\n" not in str(error.value) and not (tmp_path / "w").exists()


def test_a_vocabulary_that_does_not_fit_the_checkpoint(pretrained, corpus, tmp_path):
  config = tiny(
    "bert",
    f"text:{corpus}",
    transfer__checkpoint=str(pretrained),
    tokenizer__name="sentencepiece",
    tokenizer__vocab_size=60,
  )
  with pytest.raises(UserError, match="vocabulary does not fit the checkpoint"):
    loop.train(config, tmp_path)


def test_a_workdir_of_another_config_is_not_touched(corpus, tmp_path):
  loop.train(tiny("gpt", f"text:{corpus}", training__steps=1), tmp_path)
  before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*") if p.is_file()}
  with pytest.raises(
    UserError, match=r"run of another config \(optimizer.learning_rate was 0.01, is 0.5\)"
  ):
    loop.train(
      tiny("gpt", f"text:{corpus}", training__steps=1, optimizer__learning_rate=0.5), tmp_path
    )
  assert before == {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*") if p.is_file()}


@pytest.fixture(scope="module")
def trained_once(corpus, tmp_path_factory):
  workdir = tmp_path_factory.mktemp("trained") / "run"
  config = tiny("gpt", f"text:{corpus}", training__save_every=2, training__steps=4)
  loop.train(config, workdir)
  return config, workdir


@pytest.fixture
def trained(trained_once, tmp_path):
  """(config, workdir) of a run with checkpoints at steps 2 and 4, which may be spoilt."""
  config, workdir = trained_once
  return config, pathlib.Path(shutil.copytree(workdir, tmp_path / "run"))


def test_damaged_checkpoints_are_named_and_passed_over(trained, capsys):
  config, workdir = trained
  root = workdir / "checkpoints"
  victim = max((p for p in (root / "4").rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
  data = bytearray(victim.read_bytes())
  data[len(data) // 2] ^= 1
  victim.write_bytes(data)
  assert manager.find(workdir).name == "2"
  assert victim.name in capsys.readouterr().out
  with pytest.raises(UserError, match="SHA-256"):
    manager.find(root / "4")
  victim.write_bytes(data[:-5])
  with pytest.raises(UserError, match="bytes"):
    manager.find(root / "4")
  (root / "9").mkdir()
  (root / "11.orbax-checkpoint-tmp-1").mkdir()
  assert manager.find(workdir).name == "2"
  assert "11.orbax" in capsys.readouterr().out
  loop.train(config, workdir)  # goes on from step 2, writes 4 anew
  assert manager.find(workdir).name == "4"


def test_a_full_disk_keeps_the_last_good_checkpoint(trained, corpus, monkeypatch):
  config, workdir = trained

  def full(folder):
    raise OSError(28, "No space left on device")

  monkeypatch.setattr(manager, "write_manifest", full)
  longer = tiny("gpt", f"text:{corpus}", training__save_every=2, training__steps=8)
  with pytest.raises(
    UserError, match="No space left on device.*newest complete checkpoint is step 4"
  ):
    loop.train(longer, workdir)
  monkeypatch.undo()
  assert manager.find(workdir).name == "4"


RUNS = [p for kind in ("pretrain", "finetune") for p in (ROOT / "configs").glob(f"{kind}_*.py")]


def config_module(path):
  import importlib.util

  spec = importlib.util.spec_from_file_location(path.stem, path)
  assert spec and spec.loader
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


@pytest.mark.parametrize("path", (ROOT / "configs").glob("study_*.py"), ids=lambda p: p.stem)
def test_every_study_has_a_config(path):
  config = config_module(path).get_config()
  frame.build(path.stem.removeprefix("study_"), config.study.to_dict())
  config_lib.freeze(config.run)


@pytest.mark.parametrize("path", sorted(RUNS), ids=lambda p: p.stem)
def test_every_config_is_valid(path):
  module = config_module(path)
  from llm.models import bert, electra, gpt, llama, modernbert, qwen3, t5

  arguments = {
    "pretrain_bert": [*bert.SIZES, *(f"{s}-512" for s in bert.SIZES)],
    "pretrain_gpt": list(gpt.SIZES),
    "pretrain_llama": list(llama.SIZES),
    "pretrain_electra": list(electra.SIZES),
    "pretrain_modernbert": list(modernbert.SIZES),
    "pretrain_qwen3": list(qwen3.SIZES),
    "pretrain_t5": list(t5.SIZES),
    "finetune_chat": ["", "alpaca"],
    "finetune_grpo": ["", "dapo", "dr_grpo"],
    "finetune_preference": ["", "demo"],
    "finetune_qa": ["", "squad", "squad2", "abstracts"],
    "finetune_text_to_text": ["", "squad", "reviews", *getattr(module, "TASKS", ())],
  }.get(path.stem, ["", "reviews", "imdb", *getattr(module, "GLUE", ())])
  for argument in arguments:
    config_lib.freeze(module.get_config(argument))
