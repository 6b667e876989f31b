"""The frame of the studies: rounds, parts, runs that diverged; a law that predicts itself."""

import concurrent.futures
import dataclasses
import json
import shutil
import subprocess
import sys
import time
import zlib

import numpy as np
import pytest

from configs import study_scaling_law
from llm import config as config_lib
from llm import storage
from llm.core import Diverged, UserError
from llm.studies import frame, runs, scaling_fits, scaling_law
from llm.training import loop

LAW = scaling_fits.Parametric(1.5, 30.0, 60.0, 0.35, 0.33)


@pytest.fixture
def trained(monkeypatch):
  """The workdirs that were trained, by a stand-in whose losses follow a law with some noise."""
  workdirs = []

  def train(config, workdir, **_):
    workdir.mkdir(parents=True, exist_ok=True)
    workdirs.append(workdir.name)
    print("trained")
    if config.model.width > 128 or config.model.num_layers > 4:
      assert (workdir.parents[1] / "prediction.json").exists(), "trained before it was predicted"
    model, training = config.model, config.training
    n = 12 * model.num_layers * model.width**2
    d = training.steps * training.batch_size * training.sequence_length
    noise = np.random.default_rng(zlib.crc32(workdir.name.encode())).normal()
    loss = float(LAW(n, d) * (1 + 0.002 * noise))
    if config.optimizer.learning_rate > 1:
      raise Diverged("loss is not finite at step 3 (batch 2)")
    result = {"eval": {"loss": loss}, "flops": 6.0 * n * d, "parameters": 1.1 * n, "seconds": 1.0}
    (workdir / "result.json").write_text(json.dumps(result))
    (workdir / "run.json").write_text(json.dumps({"revision": "a" * 40}))
    (workdir / "config.json").write_text(json.dumps(config_lib.thaw(config)))
    return result

  monkeypatch.setattr(loop, "train", train)
  monkeypatch.setattr(scaling_law, "RESAMPLED", 3)
  monkeypatch.setattr(scaling_fits, "GRID", ((3,), (3,), (0,), (0.3,), (0.3,)))
  return workdirs


def untimed(figures):
  """Figures without their wall clock."""
  if isinstance(figures, dict):
    timed = ("seconds", "wall_clock")
    return {name: untimed(value) for name, value in figures.items() if name not in timed}
  return [untimed(value) for value in figures] if isinstance(figures, list) else figures


SMALL = {"sizes": ("2x32", "3x64", "4x96"), "tokens": ("1e6", "2e6", "4e6"), "seeds": 1}


def settings(**changes):
  config = study_scaling_law.get_config()
  config.study.update(changes)
  return frame.build("scaling_law", config.study.to_dict()), config_lib.freeze(config.run)


def test_larger_runs_are_predicted_and_then_trained(trained, tmp_path, monkeypatch):
  """The law that made the losses is found, and its larger runs lie inside their intervals."""
  monkeypatch.setattr(scaling_law, "RESAMPLED", 20)
  study, base = settings()
  figures = frame.run(study, base, tmp_path)
  grid = len(study.sizes) * len(study.tokens) * study.seeds
  assert len(trained) == grid + len(study.held_out) * study.seeds
  assert [name.rpartition("-")[0] for name in trained[grid::2]] == [
    name.replace(":", "-").replace("4e6", "4e+06").replace("8e6", "8e+06")
    for name in study.held_out
  ]
  third = figures["fits"]["approach_3"]
  assert third["alpha"] == pytest.approx(LAW.alpha, abs=0.05)
  assert third["beta"] == pytest.approx(LAW.beta, abs=0.05)
  assert third["intervals"]["alpha"][0] <= third["alpha"] <= third["intervals"]["alpha"][1]
  for row in figures["held_out"]:
    assert row["predicted"] == pytest.approx(row["measured"], rel=0.01)
  text = (tmp_path / "report.md").read_text()
  inside = sum(r["low"] <= r["measured"] <= r["high"] for r in figures["held_out"])
  assert f"**{inside} of 3 larger runs" in text
  assert (tmp_path / "scaling_law.svg").exists()


def test_the_report_is_the_same_again_without_training(trained, tmp_path, monkeypatch):
  study, base = settings(**SMALL)
  first = frame.run(study, base, tmp_path)

  monkeypatch.delattr(loop, "train")
  assert frame.run(study, base, tmp_path) == first


def test_a_wrong_prediction_is_said(trained, tmp_path, monkeypatch):
  """Other losses of the larger runs change the words."""
  study, base = settings(**SMALL)
  frame.run(study, base, tmp_path / "a")
  plain = loop.train

  def worse(config, workdir, **more):
    result = plain(config, workdir, **more)
    if config.model.width > 128:
      result["eval"]["loss"] *= 1.5
    return result

  monkeypatch.setattr(loop, "train", worse)
  frame.run(study, base, tmp_path / "b")
  texts = [(tmp_path / name / "report.md").read_text() for name in "ab"]
  assert "the largest error is 3" in texts[1] and "the largest error is 3" not in texts[0]


def test_runs_that_diverge_are_named_and_left_out_if_asked(trained, tmp_path):
  study, base = settings(**SMALL)
  plan = study.next_runs(base, [], tmp_path)
  bad = config_lib.thaw(plan[0].config)
  bad["optimizer"]["learning_rate"] = 2.0

  class Worse(scaling_law.Study):
    def next_runs(self, base, done, folder):
      first, *rest = super().next_runs(base, done, folder)
      return [runs.Run(first.name, config_lib.freeze(bad), first.facts), *rest]

  with pytest.raises(UserError, match="1 of 9 runs diverged .2x32-1e.06-0: loss is not fin"):
    frame.run(Worse(**SMALL), base, tmp_path)
  figures = frame.run(Worse(**SMALL), base, tmp_path, leave_out_diverged=True)
  assert figures["diverged"] == [plan[0].name]
  assert "1 runs diverged" in (tmp_path / "report.md").read_text()


def test_a_part_takes_its_share_and_the_results_of_others(trained, tmp_path):
  """The runs of the second part lie there: the first trains its own, and the report is equal."""
  study, base = settings(**SMALL)
  whole = frame.run(study, base, tmp_path / "whole")
  rounds = [trained[:9], trained[9:]]
  for name in (name for of_round in rounds for name in of_round[1::2]):
    shutil.copytree(tmp_path / "whole" / "runs" / name, tmp_path / "part" / "runs" / name)
    results = tmp_path / "part" / "results"
    results.mkdir(exist_ok=True)
    shutil.copy(tmp_path / "whole" / "results" / f"{name}.json", results)
  shutil.copy(tmp_path / "whole" / "prediction.json", tmp_path / "part")
  trained.clear()
  assert untimed(frame.run(study, base, tmp_path / "part", (0, 2))) == untimed(whole)
  assert trained == [name for of_round in rounds for name in of_round[::2]]


def test_results_of_another_config_are_refused(trained, tmp_path):
  study, base = settings(**SMALL)
  frame.run(study, base, tmp_path)
  trained.clear()
  other = dataclasses.replace(base, tokenizer=dataclasses.replace(base.tokenizer, lowercase=True))
  with pytest.raises(UserError, match="another config .tokenizer.lowercase was false, is true"):
    frame.run(study, other, tmp_path, (1, 2))
  assert not trained


def test_results_of_another_config_are_refused_also_without_their_workdirs(trained, tmp_path):
  """As results/ alone is kept to save room. And those of a run that stopped after another step."""
  study, base = settings(**SMALL)
  frame.run(study, base, tmp_path)
  shutil.rmtree(tmp_path / "runs")
  other = dataclasses.replace(base, tokenizer=dataclasses.replace(base.tokenizer, lowercase=True))
  with pytest.raises(UserError, match="results/.*another config .tokenizer.lowercase was false"):
    frame.run(study, other, tmp_path)
  first = study.next_runs(base, [], tmp_path)[0]
  with pytest.raises(UserError, match="ended after step 0, not 3: give another --workdir"):
    runs.check_folder(dataclasses.replace(first, until=3), tmp_path)
  (tmp_path / "results" / f"{first.name}.json").write_text("{}")
  with pytest.raises(UserError, match="is damaged: remove it"):
    frame.run(study, base, tmp_path)


def test_a_study_may_be_moved(trained, tmp_path):
  """Its runs name checkpoints in its folder. Another checkpoint is another run."""
  _, base = settings(**SMALL)

  def run(folder, name):
    transfer = dataclasses.replace(base.transfer, checkpoint=str(folder / "runs" / name))
    return runs.Run("tuned", dataclasses.replace(base, transfer=transfer), {})

  here, there = tmp_path / "here", tmp_path / "there"
  runs.take([run(here, "pretrained")], here, None)
  here.rename(there)
  runs.check_folder(run(there, "pretrained"), there)
  with pytest.raises(UserError, match="transfer.checkpoint was"):
    runs.check_folder(run(there, "other"), there)


def test_a_part_that_waits_learns_that_another_failed(trained, tmp_path, monkeypatch):
  """An old failure is none: the other part takes that run again."""
  study, base = settings(**SMALL)
  mine, theirs = study.next_runs(base, [], tmp_path)[:2]
  monkeypatch.setattr(loop, "train", lambda *_, **__: (_ for _ in ()).throw(UserError("no room")))
  with pytest.raises(UserError, match="run .*: no room"):
    runs.take([theirs], tmp_path, None)
  naps = []

  def sleep(_):
    naps.append(1)
    if len(naps) == 3:
      with pytest.raises(UserError, match="no room"):
        runs.take([theirs], tmp_path, None)

  monkeypatch.setattr(runs.time, "sleep", sleep)
  with pytest.raises(UserError, match="another part failed: run 2x32-.*: no room"):
    runs.of_other_part(theirs, tmp_path)
  assert len(naps) == 3


def test_many_writers_of_one_file(tmp_path):
  """All parts of a study write its predictions and its data."""
  texts = [letter * 10_000 for letter in "abcdef"]

  def write(text):
    for _ in range(50):
      storage.write_whole(storage.folder(tmp_path) / "file.json", text)
      assert (tmp_path / "file.json").read_text() in texts

  with concurrent.futures.ThreadPoolExecutor(len(texts)) as pool:
    list(pool.map(write, texts))
  assert [path.name for path in tmp_path.iterdir()] == ["file.json"]


def test_what_was_predicted_of_a_measured_run_stays(trained, tmp_path):
  """With more runs in the grid, and with more larger runs, which are predicted before as well."""
  study, base = settings(**SMALL)
  before = frame.run(study, base, tmp_path)["held_out"]
  after = frame.run(settings(**{**SMALL, "seeds": 2})[0], base, tmp_path)["held_out"]
  for name in ("predicted", "low", "high"):
    assert [row[name] for row in after] == [row[name] for row in before]
  more = settings(**SMALL, held_out=(*study.held_out, "8x160:4e6"))[0]
  rows = frame.run(more, base, tmp_path)["held_out"]
  assert [row["name"] for row in rows] == [*(row["name"] for row in before), "8x160-4e+06"]
  assert all(row["before"] for row in rows)
  (tmp_path / "prediction.json").unlink()
  assert not any(row["before"] for row in frame.run(more, base, tmp_path)["held_out"])
  assert "computed after it was trained" in (tmp_path / "report.md").read_text()


def test_a_study_that_was_killed_gives_the_same_report(trained, tmp_path, monkeypatch):
  study, base = settings(**SMALL)
  whole = frame.run(study, base, tmp_path / "whole")
  plain = loop.train

  def killed(config, workdir, **more):
    if len(trained) % 4 == 3:
      trained.append("killed")
      raise KeyboardInterrupt
    return plain(config, workdir, **more)

  monkeypatch.setattr(loop, "train", killed)
  figures, kills = None, 0
  while figures is None:
    try:
      figures = frame.run(study, base, tmp_path / "killed")
    except KeyboardInterrupt:
      kills += 1
  assert kills >= 2 and untimed(figures) == untimed(whole)
  texts = [(tmp_path / name / "report.md").read_text().splitlines() for name in ("whole", "killed")]
  assert texts[0][:-1] == texts[1][:-1]  # the last line is the wall clock


def test_versions_that_differ_are_said(trained, tmp_path):
  study, base = settings(**SMALL)
  frame.run(study, base, tmp_path)
  path = next((tmp_path / "results").iterdir())
  path.write_text(path.read_text().replace("a" * 12, "b" * 12))
  result = frame.run(study, base, tmp_path)
  assert {run["revision"] for run in result["runs"]} == {"a" * 12, "b" * 12}
  assert "made by 2 versions of the source (11 by aaa" in (tmp_path / "report.md").read_text()


def test_the_best_size_and_length_of_a_budget(trained, tmp_path, monkeypatch):
  """That of the law that made the losses, within a factor; and no budget of nonsense."""
  monkeypatch.setattr(scaling_law, "RESAMPLED", 20)
  study, base = settings(budgets=("1e15",))
  row = frame.run(study, base, tmp_path)["optimal"][0]
  n, d = LAW.optimal(np.array(1e15))
  assert n / 3 < row["parameters"] < 3 * n and d / 3 < row["tokens"] < 3 * d
  assert row["parameters_interval"][0] <= row["parameters"] <= row["parameters_interval"][1]
  assert 6 * row["parameters"] * row["tokens"] == pytest.approx(1e15)
  with pytest.raises(UserError, match="config.study.budgets.*expected FLOPs"):
    frame.run(settings(budgets=("many",))[0], base, tmp_path)


@pytest.mark.parametrize(
  "changes, message",
  [
    ({"sizes": ("2x32",)}, "needs 3 sizes .config.study.sizes. at least, and there are 1"),
    ({"tokens": ("1e6", "2e6")}, "needs 3 lengths"),
    ({"sizes": ("2x32", "wide", "2x64")}, "not LAYERSxWIDTH"),
    ({"tokens": ("1e6", "2e6", "many")}, "'many' is no number of tokens"),
    ({"held_out": ("2x64",)}, "not LAYERSxWIDTH:TOKENS"),
    ({"seeds": 0}, "config.study.seeds"),
    ({"sizes": ("2x32", "2x32", "2x48", "3x64")}, "wants the run 2x32-1e.06-0 twice"),
  ],
)
def test_mistakes_are_one_line(trained, tmp_path, changes, message):
  with pytest.raises(UserError, match=message) as error:
    study, base = settings(**changes)
    frame.run(study, base, tmp_path)
  assert "\n" not in str(error.value)


def test_an_unknown_study_lists_the_studies():
  with pytest.raises(UserError, match="the studies are .*scaling_law"):
    frame.build("alchemy", {})


@pytest.mark.slow
@pytest.mark.parametrize("part", ["0/2", "3/2", "x"])
def test_a_part_of_nonsense(part, tmp_path):
  command = [sys.executable, "-m", "llm.study", "scaling_law", f"--workdir={tmp_path}"]
  done = subprocess.run([*command, f"--part={part}"], capture_output=True, text=True)
  assert done.returncode == 2
  assert done.stderr.strip().startswith(f"error: --part={part}: expected i/n")


@pytest.mark.slow
def test_a_small_study_by_the_command(tmp_path):
  """Trained for real, killed after some runs, and gone on with."""
  command = [sys.executable, "-m", "llm.study", "scaling_law", f"--workdir={tmp_path}/out"]
  command += ["--config.study.sizes=('1x16','1x32','2x32')", "--config.study.seeds=1"]
  command += [
    "--config.study.tokens=('8e3','16e3','32e3')",
    "--config.study.held_out=('2x48:2e4',)",
  ]
  command += ["--config.run.training.batch_size=8", "--config.run.training.eval_batches=2"]
  command += ["--config.run.training.sequence_length=64"]
  killed = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
  while len(list(tmp_path.glob("out/runs/*/result.json"))) < 2:
    assert killed.poll() is None
    time.sleep(0.1)
  killed.kill()
  killed.wait()
  done = subprocess.run(command, capture_output=True, text=True)
  assert done.returncode == 0, done.stderr[-2000:]
  result = json.loads((tmp_path / "out" / "result.json").read_text())
  assert len(result["runs"]) == 10 and len(result["held_out"]) == 1
  assert "alpha" in result["fits"]["approach_3"]
  whole = [part.replace("/out", "/whole") for part in command]
  subprocess.run(whole, check=True, capture_output=True)
  assert untimed(json.loads((tmp_path / "whole" / "result.json").read_text())) == untimed(result)
