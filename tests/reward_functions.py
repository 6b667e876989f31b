"""Rewards for tests, as a user would write them."""

import os
import time


def troubled(answer, record):
  """Does what the answer says."""
  if answer == "raise":
    raise ValueError("no such answer")
  if answer == "hang":
    time.sleep(60)
  if answer == "exit":
    os._exit(3)
  return {"nan": float("nan"), "text": "high", "none": None}.get(answer, record.get("worth"))


def length(answer, record):
  """Longer answers earn more."""
  return len(answer)


def same(answer, record):
  """All answers earn the same."""
  return 0.1


class Slow:
  """Takes long to load, and no time for an answer."""

  loaded = False

  def prepare(self):
    time.sleep(2)
    self.loaded = True

  def __call__(self, answer, record):
    if not self.loaded:
      self.prepare()
    return len(answer)


slow = Slow()


class Unready(Slow):
  """Cannot load."""

  def prepare(self):
    raise RuntimeError("no such model")


unready = Unready()


def broken(answer, record):
  """Never works."""
  raise RuntimeError("out of order")


number = 3
