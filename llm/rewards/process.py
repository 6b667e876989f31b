"""The process of a reward, which grading.py starts: python -m llm.rewards.process PIPE REWARD

Lists of (answer, record) come through the pipe, and a (value, fault) goes out for each answer. The
process ends with the run, and not before: a signal to all processes of a job does not end it.
"""

import math
import os
import select
import signal
import sys
import threading
from multiprocessing.connection import Connection

from llm.core import UserError, first_line
from llm.rewards import functions


def grade(reward: functions.Reward, answer: str, record: dict) -> tuple[float, str]:
  """(the reward of an answer, ""), or NaN and what is wrong with it."""
  try:
    value = reward(answer, record)
  except Exception as error:
    return math.nan, f"raised {type(error).__name__}: {first_line(error)}"
  try:
    number = float(value)
  except (TypeError, ValueError):
    return math.nan, f"returned {type(value).__name__} {value!r:.40}, which is no number"
  if not math.isfinite(number):
    return math.nan, f"returned {number}"
  return number, ""


def serve(pipe: Connection, spec: str) -> None:
  """Sends "", or why the reward cannot be asked; then grades until the run closes the pipe."""
  try:
    reward = functions.resolve(spec)
    functions.prepare(reward, spec)
  except UserError as error:
    pipe.send(str(error))
    return
  pipe.send("")
  while True:
    try:
      asked = pipe.recv()
    except EOFError:
      return
    for answer, record in asked:
      pipe.send(grade(reward, answer, record))


def _exit_with_run() -> None:
  """The run holds the other end of standard input, which closes when the run ends."""
  select.select([sys.stdin], [], [])
  os._exit(1)


if __name__ == "__main__":
  for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, signal.SIG_IGN)
  threading.Thread(target=_exit_with_run, daemon=True).start()
  serve(Connection(int(sys.argv[1])), sys.argv[2])
