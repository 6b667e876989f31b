"""Killed and resumed, every activity ends as if it was never disturbed (tests/kills.py)."""

import subprocess
import sys

import pytest

from tests.kills import ROOT


@pytest.mark.slow
def test_what_is_killed_ends_as_if_it_was_not():
  arguments = ("--kills=5", "--terms=5", "--twice=1")
  done = subprocess.run(
    [sys.executable, "-m", "tests.kills", *arguments], cwd=ROOT, capture_output=True, text=True
  )
  assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
