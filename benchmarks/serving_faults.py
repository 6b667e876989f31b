"""What a server survives: malformed requests, kills, too many clients. Each prints what came out.

pip install -e '.[serve,test]'
python -m benchmarks.serving_faults malformed [--count=10000]
python -m benchmarks.serving_faults kills [--count=20]
python -m benchmarks.serving_faults clients [--count=200 --seconds=60]
"""

import argparse
import collections
import concurrent.futures
import hashlib
import http.client
import pathlib
import random
import tempfile
import time

import openai
from hypothesis import HealthCheck, Phase, given, settings

from llm import command
from tests import malformed
from tests.serving import Serving, conversations


def checkpoint(folder: pathlib.Path) -> pathlib.Path:
  """The workdir of a small GPT, trained for a step."""
  from llm import config as config_lib
  from llm.objectives import base
  from llm.training import loop

  text = folder / "text.txt"
  text.write_text("a line of text\n\n" * 50)
  config = config_lib.defaults(base.defaults("causal_lm"))
  config.model.update(
    name="gpt", num_layers=2, width=64, num_heads=2, mlp_dim=128, max_length=256, dropout=0.1
  )
  config.tokenizer.name = "bytes"
  config.data.train = f"text:{text}"
  config.training.update(steps=1, batch_size=8, sequence_length=64)
  loop.train(config_lib.freeze(config), folder / "gpt", say=lambda *_: None)
  return folder / "gpt"


def send_malformed(folder: pathlib.Path, base: pathlib.Path, count: int, _: int) -> dict:
  """Random requests, each wrong in some way: no answer may be a fault of the server's."""
  serving = Serving(folder / "state", f"gpt={base}", "--max_upload=1").start()
  key = serving.key()
  connection = http.client.HTTPConnection("127.0.0.1", serving.port, timeout=60)
  statuses = collections.Counter()

  @settings(
    max_examples=count,
    deadline=None,
    database=None,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
  )
  @given(malformed.REQUESTS)
  def ask(request):
    status, body = malformed.answer(connection, key, request)
    statuses[status] += 1
    malformed.check(status, body)

  ask()
  serving.stop()
  return {"requests": statuses.total(), **statuses}


def digest(workdir: pathlib.Path) -> str:
  """Of the parameters of the newest checkpoint."""
  from llm import core
  from llm.checkpoints import locate, manager

  params = manager.restore(locate.find(workdir, lambda *_: None), "params")
  content = hashlib.sha256()
  for name, leaf in sorted(core.flatten(params).items()):
    content.update(name.encode() + leaf.tobytes())
  return content.hexdigest()


def start_job(client: openai.OpenAI) -> str:
  file = client.files.create(file=("talk.jsonl", conversations(40)), purpose="fine-tune")
  hyperparameters = {"n_epochs": 40, "batch_size": 2}
  method = {"type": "supervised", "supervised": {"hyperparameters": hyperparameters}}
  job = client.fine_tuning.jobs.create(model="gpt", training_file=file.id, seed=1, method=method)
  return job.id


def wait(client: openai.OpenAI, job: str):
  while client.fine_tuning.jobs.retrieve(job).status not in ("succeeded", "failed", "cancelled"):
    time.sleep(0.3)


def kill(folder: pathlib.Path, base: pathlib.Path, count: int, _: int) -> dict[str, int]:
  """SIGKILL at random moments of uploads, jobs and chats."""
  rng = random.Random(0)
  serving = Serving(folder / "state", f"gpt={base}").start()
  client = serving.client(serving.key())
  calm = start_job(client)
  wait(client, calm)
  jobs: list[str] = []
  files: list[str] = []
  for number in range(count):
    if number % 5 == 0:
      jobs.append(start_job(client))
    work_until_killed(serving, client, files, rng)
    serving.start()
  known_jobs = {job.id for job in client.fine_tuning.jobs.list(limit=100)}
  for job in known_jobs:
    wait(client, job)
  known = {file.id for file in client.files.list()}
  work = folder / "state" / "jobs"
  content = [client.files.content(file).read() for file in files]
  serving.stop()
  return {
    "kills": count,
    "files": len(files),
    "jobs": len(jobs),
    "lost": len(set(files) - known) + len(set(jobs) - known_jobs),
    "changed_files": sum(of_file != conversations(5) for of_file in content),
    "leftovers": sum(path.name not in known for path in (folder / "state/files").iterdir()),
    "second_runs": sum((work / job / "log.txt").read_text().count("another run") for job in jobs),
    "unequal": sum(digest(work / job / "run") != digest(work / calm / "run") for job in jobs),
  }


def work_until_killed(
  serving: Serving, client: openai.OpenAI, files: list[str], rng: random.Random
):
  """Uploads and chats for a moment, then kills the server at work. files: what it acknowledged."""
  end = time.monotonic() + rng.uniform(0.0, 4.0)
  while time.monotonic() < end:
    files.append(client.files.create(file=("a.jsonl", conversations(5)), purpose="fine-tune").id)
    client.chat.completions.create(model="gpt", messages=malformed.TALK, max_tokens=3)
  with concurrent.futures.ThreadPoolExecutor() as pool:
    for _ in range(3):
      pool.submit(client.chat.completions.create, model="gpt", messages=malformed.TALK)
      pool.submit(client.files.create, file=("b.jsonl", conversations(500)), purpose="fine-tune")
    time.sleep(rng.uniform(0, 0.2))
    serving.kill()


def crowd(folder: pathlib.Path, base: pathlib.Path, count: int, seconds: int) -> dict:
  """Many clients at once, each with one request after the other."""
  serving = Serving(folder / "state", f"gpt={base}").start()
  key = serving.key()
  end = time.monotonic() + seconds

  def ask(number: int) -> collections.Counter:
    client = serving.client(key)
    outcomes = collections.Counter()
    while time.monotonic() < end:
      try:
        client.chat.completions.create(model="gpt", messages=malformed.TALK, max_tokens=20)
        outcomes["answered"] += 1
      except openai.RateLimitError:
        outcomes["429"] += 1
        time.sleep(1)  # as the answer says (retry-after)
      except openai.APIError as error:
        outcomes[f"{type(error).__name__}: {error}"[:80]] += 1
    return outcomes

  with concurrent.futures.ThreadPoolExecutor(count) as pool:
    outcomes = sum(pool.map(ask, range(count)), collections.Counter())
  serving.stop()
  return {"clients": count, "seconds": seconds, **outcomes}


PARTS = {"malformed": (send_malformed, 10_000), "kills": (kill, 20), "clients": (crowd, 200)}


def main():
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("part", choices=PARTS)
  parser.add_argument("--count", type=int, default=0)
  parser.add_argument("--seconds", type=int, default=60)
  flags = parser.parse_args()
  run, count = PARTS[flags.part]
  command.use_compilation_cache()
  with tempfile.TemporaryDirectory() as folder:
    path = pathlib.Path(folder)
    print(flags.part, run(path, checkpoint(path), flags.count or count, flags.seconds))


if __name__ == "__main__":
  main()
