"""Runs are killed at random moments and resumed: each must end as if never disturbed.

python -m tests.kills [--kills=100] [--terms=30] [--twice=50] [--seed=0] [--only=pretraining,..]

Kills (SIGKILL) and terms (SIGTERM) are dealt to the activities below in turns. What is compared:
parameters, optimizer, figures and every line of the log but its timings; labels and figures that
are printed; every file of a conversion and of a corpus. twice: so many times two runs are started
at once in one workdir. A process of the script is a copy of one that has imported everything, so
that most of its time is work that can be interrupted.
"""

import argparse
import dataclasses
import hashlib
import itertools
import json
import os
import pathlib
import random
import runpy
import shutil
import signal
import sys
import tempfile
import time
import warnings
from typing import Any, Callable

ROOT = pathlib.Path(__file__).resolve().parents[1]
# Nothing is compared of these: they are times, or name the folder.
TIMINGS = {
  "checkpoint",
  "input_wait",
  "mfu",
  "seconds",
  "shares",
  "tokens_per_second",
  "wall_clock",
}
SMALL = (
  "--config.model.num_layers=1 --config.model.width=32 --config.model.num_heads=2 "
  "--config.model.mlp_dim=64 --config.model.max_length=64 --config.tokenizer.name=bytes "
  "--config.training.sequence_length=32 --config.training.steps=60 --config.training.save_every=7 "
  "--config.training.log_every=5 --config.training.eval_every=9 "
  "--config.training.keep_best=min:loss"
).split()
WORDS = "the film was a joy to watch and every scene of it had warmth but its plot made no sense"


def forked(work: Callable[[], Any], output: str | pathlib.Path) -> int:
  """Starts `work` in a copy of this process. Returns its id. output: takes what it prints."""
  if child := os.fork():
    return child
  try:
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
      os.dup2(file, stream)
    work()
    status = 0
  except SystemExit as ended:
    if isinstance(ended.code, str):
      print(ended.code, file=sys.stderr)
    status = ended.code if isinstance(ended.code, int) else int(bool(ended.code))
  except BaseException:
    sys.excepthook(*sys.exc_info())  # pyright: ignore[reportArgumentType]
    status = 1
  finally:
    sys.stdout.flush()
    sys.stderr.flush()
  os._exit(status)


def start(arguments: list[str], output: pathlib.Path) -> int:
  """Starts `python -m ARGUMENTS`."""

  def work():
    sys.argv = list(arguments)
    runpy.run_module(arguments[0], run_name="__main__", alter_sys=True)

  return forked(work, output)


def ended(child: int, seconds: float) -> int | None:
  """The exit status of a process, minus a signal; None where it is at work after so long."""
  until = time.monotonic() + seconds
  while True:
    done, status = os.waitpid(child, os.WNOHANG)
    if done:
      return os.waitstatus_to_exitcode(status)
    if time.monotonic() > until:
      return None
    time.sleep(0.005)


def without_timings(value: Any) -> Any:
  """A JSON value without the keys of TIMINGS."""
  if isinstance(value, dict):
    return {k: without_timings(v) for k, v in value.items() if k not in TIMINGS}
  if isinstance(value, list):
    return [without_timings(v) for v in value]
  return value


def trained(folder: pathlib.Path, printed: str) -> Any:
  """What a run of llm.train left."""
  import jax

  from llm.checkpoints import manager

  step = manager.find(folder / "out", say=lambda _: None)
  newest = folder / "out" / "checkpoints" / str(max(manager.steps(step.parent)))
  items = {}
  for item in ("params", "opt_state"):
    tree = manager.restore(manager.find(newest), item)
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
      items[f"{item}{path}"] = hashlib.sha256(leaf.tobytes()).hexdigest()
  log = (folder / "out" / "metrics.jsonl").read_text().splitlines()
  result = json.loads((folder / "out" / "result.json").read_text())
  kept = [without_timings(json.loads(line)) for line in log]
  return items, kept, without_timings(result["eval"]), result["best"], step.name


def last_line(folder: pathlib.Path, printed: str) -> Any:
  """The figures that llm.evaluate printed."""
  return without_timings(json.loads(printed.splitlines()[-1]))


def files(folder: pathlib.Path, printed: str) -> Any:
  """The bytes of every file of a conversion."""
  return _digests(folder / "out")


def studied(folder: pathlib.Path, printed: str) -> Any:
  """What a study found."""
  return without_timings(json.loads((folder / "out" / "result.json").read_text()))


def shards(folder: pathlib.Path, printed: str) -> Any:
  """The bytes of every shard of a corpus."""
  return _digests(folder / "out" / "shards")


def _digests(folder: pathlib.Path) -> dict[str, str]:
  return {
    str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
    for path in sorted(folder.rglob("*"))
    if path.is_file()
  }


@dataclasses.dataclass
class Activity:
  """Something that may be interrupted. arguments: its command; OUT is where it writes.

  outcome(folder, what it printed): what is compared.
  """

  name: str
  arguments: list[str]
  outcome: Callable[[pathlib.Path, str], Any]
  seconds: float = 0.0
  expected: Any = None


def activities(data: pathlib.Path) -> list[Activity]:
  """All of them, in an order in which each finds what it needs."""
  text = f"text:{data}/text.txt"
  labelled = [f"--config.data.{s}=jsonl:{data}/labelled.jsonl" for s in ("train", "eval")]
  pretrain = [
    "llm.train",
    "--config=configs/pretrain_bert.py:tiny",
    *SMALL,
    "--config.model.dropout=0.1",
    f"--config.data.train={text}",
    f"--config.data.eval={text}",
    "--workdir=OUT",
  ]
  tune = ["llm.train", "--config=configs/finetune_classification.py", *labelled, "--workdir=OUT"]
  tune += [f"--config.transfer.checkpoint={data}/pretraining/out"]
  tune += [a for a in SMALL if "training" in a]
  prepare = ["llm.prepare", "--config=configs/prepare_text.py", f"--config.input={data}/text.jsonl"]
  prepare += ["--config.tokenizer.name=bytes", "--workers=1", "--output=OUT"]
  to_hf = ["llm.convert", "to_hf", f"--checkpoint={data}/pretraining/out", "--output=OUT"]
  study = ["llm.study", "scaling_law", "--config=configs/study_scaling_law.py", "--workdir=OUT"]
  study += ["--config.study.sizes=('1x16','1x32','2x32')", "--config.study.seeds=1"]
  study += ["--config.study.tokens=('2e3','4e3','8e3')", "--config.study.held_out=('2x48:4e3',)"]
  study += ["--config.run.training.batch_size=8", "--config.run.training.eval_batches=2"]
  study += ["--config.run.training.sequence_length=64", f"--config.run.data.train={text}"]
  study += [f"--config.run.data.eval={text}", "--config.run.tokenizer.name=bytes"]
  score = ["llm.evaluate", f"--checkpoint={data}/fine-tuning/out"]
  return [
    Activity("pretraining", pretrain, trained),
    Activity("fine-tuning", tune, trained),
    Activity("evaluation", score, last_line),
    Activity("conversion", to_hf, files),
    Activity("preparation", prepare, shards),
    Activity("study", study, studied),
  ]


def write_data(data: pathlib.Path):
  """A text and labelled records of common words."""
  rng = random.Random(0)

  def sentence() -> str:
    return " ".join(rng.choices(WORDS.split(), k=8)).capitalize() + "."

  documents = ["\n".join(sentence() for _ in range(4)) for _ in range(60)]
  (data / "text.txt").write_text("\n\n".join(documents))
  (data / "text.jsonl").write_text("".join(json.dumps({"text": d}) + "\n" for d in documents))
  records = [{"text": sentence(), "label": str(number % 2)} for number in range(64)]
  (data / "labelled.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))


class Trial:
  """Runs the activities in a folder, disturbs them, and counts what it finds."""

  def __init__(self, folder: pathlib.Path, seed: int, only: list[str]):
    self.folder = folder
    self.rng = random.Random(seed)
    write_data(folder)
    self.activities = activities(folder)
    for activity in self.activities:
      self._undisturbed(activity)
    self.chosen = [a for a in self.activities if not only or a.name in only]
    self.faults: list[str] = []

  def _command(self, activity: Activity, folder: pathlib.Path) -> list[str]:
    return [argument.replace("OUT", str(folder / "out")) for argument in activity.arguments]

  def _outcome(self, activity: Activity, folder: pathlib.Path) -> Any:
    """By another process, for this one must not start JAX."""
    path = folder / "outcome.json"
    printed = (folder / "printed").read_text()

    def work():
      path.write_text(json.dumps(activity.outcome(folder, printed), sort_keys=True))

    assert ended(forked(work, folder / "outcome.txt"), 120) == 0, (
      folder / "outcome.txt"
    ).read_text()
    return json.loads(path.read_text())

  def _undisturbed(self, activity: Activity):
    """Learns how an activity ends, and how long it takes once everything is compiled."""
    folder = self.folder / activity.name
    for _ in range(2):
      shutil.rmtree(folder, ignore_errors=True)
      folder.mkdir()
      started_at = time.monotonic()
      status = ended(start(self._command(activity, folder), folder / "printed"), 300)
      assert status == 0, (folder / "printed").read_text()
      activity.seconds = time.monotonic() - started_at
    activity.expected = self._outcome(activity, folder)
    print(f"{activity.name}: {activity.seconds:.1f} s undisturbed", flush=True)

  def disturb(self, number: signal.Signals, count: int):
    """Sends a signal `count` times, to the activities in turns, each until it ends by itself."""
    sent = 0
    for activity in itertools.cycle(self.chosen):
      folder = pathlib.Path(tempfile.mkdtemp(dir=self.folder))
      most = min(count - sent, 5)
      disturbed = self._until_its_end(activity, folder, number, most)
      sent += disturbed
      print(f"{activity.name}: {disturbed} x {number.name}, {len(self.faults)} faults", flush=True)
      shutil.rmtree(folder)
      if sent >= count:
        return

  def _until_its_end(
    self, activity: Activity, folder: pathlib.Path, number: signal.Signals, most: int
  ) -> int:
    """Starts an activity until it ends by itself. Returns how many signals it got."""
    sent = 0
    while True:
      (folder / "printed").unlink(missing_ok=True)
      child = start(self._command(activity, folder), folder / "printed")
      status = None
      if sent < most:
        status = ended(child, self.rng.uniform(0.05, 1.1) * activity.seconds)
        if status is None:
          os.kill(child, number)
          sent += 1
      if status is None:
        status = ended(child, 120)
      if status is None:
        os.kill(child, signal.SIGKILL)
        self.faults.append(f"{activity.name} hangs")
        return sent
      printed = (folder / "printed").read_text()
      if status == 0:
        self._compare(activity, folder)
        return sent
      if "Traceback" in printed or status not in (-number, 128 + number, 130):
        self.faults.append(f"{activity.name} ended with {status}: {printed[-2000:]}")
        return sent

  def _compare(self, activity: Activity, folder: pathlib.Path):
    if (outcome := self._outcome(activity, folder)) != activity.expected:
      kept = self.folder.parent / f"differs-{len(self.faults)}"
      shutil.copytree(folder, kept, dirs_exist_ok=True)
      self.faults.append(f"{activity.name} ended otherwise, see {kept}: {outcome}"[:2000])

  def twice(self, count: int):
    """Starts two runs at once in one workdir: one runs, the other says so in one line."""
    activity = self.activities[0]
    for _ in range(count):
      folder = pathlib.Path(tempfile.mkdtemp(dir=self.folder))
      outputs = [folder / "printed", folder / "printed_too"]
      children = [start(self._command(activity, folder), output) for output in outputs]
      statuses = [ended(child, 120) for child in children]
      texts = [output.read_text() for output in outputs]
      errors = [line for text in texts for line in text.splitlines() if line.startswith("error: ")]
      one_ran = sorted(statuses, key=str) == [0, 2] and len(errors) == 1
      already_done = statuses == [0, 0] and any("already done" in text for text in texts)
      if not (one_ran or already_done) or any("Traceback" in text for text in texts):
        self.faults.append(f"two at once ended with {statuses}: {texts}"[:2000])
      self._compare(activity, folder)
      shutil.rmtree(folder)
    print(f"two at once: {count} times, {len(self.faults)} faults", flush=True)


def main() -> int:
  """Returns 1 where something was not as it must be."""
  parser = argparse.ArgumentParser(description=__doc__)
  for name, default in (("kills", 100), ("terms", 30), ("twice", 50), ("seed", 0)):
    parser.add_argument(f"--{name}", type=int, default=default)
  parser.add_argument("--only", default="")
  arguments = parser.parse_args()
  warnings.filterwarnings("ignore", message=".*fork", category=RuntimeWarning)
  # What every activity imports, before the copies are made.
  import llm.corpus.preparation
  import llm.inference.writer
  import llm.models.classical
  import llm.studies.scaling_law
  import llm.training.loop  # noqa: F401

  os.chdir(ROOT)
  with tempfile.TemporaryDirectory() as scratch:
    os.environ["PRETUNE_CACHE"] = f"{scratch}/cache"
    folder = pathlib.Path(scratch) / "work"
    folder.mkdir()
    trial = Trial(folder, arguments.seed, [*filter(None, arguments.only.split(","))])
    if arguments.kills:
      trial.disturb(signal.SIGKILL, arguments.kills)
    if arguments.terms:
      trial.disturb(signal.SIGTERM, arguments.terms)
    trial.twice(arguments.twice)
    for fault in trial.faults:
      print(f"fault: {fault}", file=sys.stderr)
  print(f"{arguments.kills} kills, {arguments.terms} terms: {len(trial.faults)} faults")
  return int(bool(trial.faults))


if __name__ == "__main__":
  sys.exit(main())
