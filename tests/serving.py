"""A server in a process of its own, for tests and benchmarks."""

import json
import os
import pathlib
import socket
import subprocess
import sys
import time

import openai

from llm.server import keys
from llm.server.state import State

ROOT = pathlib.Path(__file__).resolve().parents[1]


def free_port() -> int:
  with socket.socket() as listener:
    listener.bind(("127.0.0.1", 0))
    return listener.getsockname()[1]


class Serving:
  """`python -m llm.serve` on a workdir. It can be killed and started again."""

  def __init__(self, workdir: pathlib.Path, models: str, *flags: str):
    self.workdir = workdir
    self.models = models
    self.flags = flags
    self.port = free_port()
    self.log = workdir.parent / f"{workdir.name}.log"

  def start(self):
    command = [sys.executable, "-m", "llm.serve", f"--workdir={self.workdir}"]
    command += [f"--models={self.models}", f"--port={self.port}", *self.flags]
    with open(self.log, "a") as log:
      self.process = subprocess.Popen(command, cwd=ROOT, env=environment(), stdout=log, stderr=log)
    deadline = time.monotonic() + 120
    while True:
      try:
        socket.create_connection(("127.0.0.1", self.port), 1).close()
        return self
      except OSError:
        assert self.process.poll() is None and time.monotonic() < deadline, self.log.read_text()
        time.sleep(0.05)

  def stop(self):
    self.process.terminate()
    self.process.wait(60)

  def kill(self):
    self.process.kill()
    self.process.wait()

  def key(self, owner: str = "default") -> str:
    return keys.make(State(self.workdir), owner)

  def client(self, key: str, retries: int = 0) -> openai.OpenAI:
    url = f"http://127.0.0.1:{self.port}/v1"
    return openai.OpenAI(base_url=url, api_key=key, max_retries=retries, timeout=120)


def environment() -> dict[str, str]:
  path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
  return {**os.environ, "PYTHONPATH": path}


def lines(records) -> bytes:
  return "".join(json.dumps(record) + "\n" for record in records).encode()


def conversations(count: int) -> bytes:
  return lines(
    {
      "messages": [
        {"role": "user", "content": f"say {number % 4}"},
        {"role": "assistant", "content": "abcd"[number % 4] * 3},
      ]
    }
    for number in range(count)
  )
