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


def broken(answer, record):
  """Never works."""
  raise RuntimeError("out of order")


number = 3
