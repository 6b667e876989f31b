"""Asks a reward (functions.py) in a process that can be stopped.

A reward may raise, hang or return what is no number. Such an answer has no reward, and the run goes
on.
"""

import math
import multiprocessing
import os
import subprocess
import sys
from typing import Any, NamedTuple, Sequence

import jax
import numpy as np
import tqdm

from llm.core import UserError
from llm.rewards import process

START_SECONDS = 120.0  # for the imports of a reward
MOST_HANGS = 8  # in one step; then the reward is not asked again


class Grade(NamedTuple):
  """The reward of an answer; NaN where there is none, and `fault` says why."""

  value: float
  fault: str = ""


class Grader:
  """A reward in a process of its own, which is started when it is first asked.

  seconds: that the reward may take for one answer.
  """

  def __init__(self, spec: str, seconds: float):
    self.spec = spec
    self.seconds = seconds
    self.told: set[str] = set()  # the faults that were printed
    self._process: Any = None
    self._pipe: Any = None

  def grade(self, answers: Sequence[str], records: Sequence[dict]) -> list[Grade]:
    """The grade of each answer; a fault has no value."""
    grades: list[Grade] = []
    hangs = 0
    while len(grades) < len(answers):
      if hangs == MOST_HANGS:
        grades += [Grade(math.nan, f"hung {hangs} times")] * (len(answers) - len(grades))
        break
      done = len(grades)
      self._start()
      grades += self._asked(list(zip(answers[done:], records[done:])))
      hangs += bool(grades[-1].fault) and self._process is None
    for grade, record in zip(grades, records):
      self._tell(grade, record)
    return grades

  def _asked(self, asked: list[tuple[str, dict]]) -> list[Grade]:
    """The grades of the first of these answers: of all, or up to one that the process ended at."""
    grades = []
    try:
      self._pipe.send(asked)
      while len(grades) < len(asked):
        if not self._pipe.poll(self.seconds):
          self.close()
          return [*grades, Grade(math.nan, f"took more than {self.seconds:g} s")]
        grades.append(Grade(*self._pipe.recv()))
    except (EOFError, OSError):
      self.close()
      return [*grades, Grade(math.nan, "ended its process")]
    return grades

  def _start(self) -> None:
    """Starts the process where there is none. Raises UserError where it cannot serve."""
    if self._process is not None:
      return
    self._pipe, theirs = multiprocessing.Pipe()
    self._process = subprocess.Popen(
      [sys.executable, "-m", process.__name__, str(theirs.fileno()), self.spec],
      stdin=subprocess.PIPE,
      pass_fds=[theirs.fileno()],
      env={
        **os.environ,
        "PYTHONPATH": os.pathsep.join(sys.path),  # it finds the modules that the run finds
        "JAX_PLATFORMS": "cpu",  # the accelerators are the run's
      },
    )
    theirs.close()
    problem = f"config.objective.reward={self.spec} did not start in {START_SECONDS:g} s"
    try:
      if self._pipe.poll(START_SECONDS):
        problem = self._pipe.recv()
    except EOFError:
      problem = f"config.objective.reward={self.spec} ended its process when it was imported"
    if problem:
      self.close()
      raise UserError(problem)

  def close(self) -> None:
    """Ends the process."""
    if self._process is not None:
      self._process.kill()
      self._process.communicate()
      self._pipe.close()
      self._process = None

  def _tell(self, grade: Grade, record: dict) -> None:
    """Prints a fault, each kind once."""
    kind = grade.fault.partition(":")[0]
    if kind and kind not in self.told:
      self.told.add(kind)
      where = record.get("_where", "a record")
      text = f"reward {self.spec} {grade.fault} ({where}); such answers are left out and counted"
      tqdm.tqdm.write(text, file=sys.stderr)


def of_all_processes(
  grader: Grader, answers: Sequence[str], records: Sequence[dict]
) -> tuple[np.ndarray, list[str]]:
  """(rewards, faults): NaN and a text where an answer has no reward.

  The first process alone asks the reward, for all: a reward that hangs may do so on one of them
  only. Raises UserError if no answer has a reward.
  """
  values = np.full(len(answers), np.nan)
  faults = [""] * len(answers)
  if jax.process_index() == 0:
    grades = grader.grade(answers, records)
    values = np.array([grade.value for grade in grades])
    faults = [grade.fault for grade in grades]
  if jax.process_count() > 1:
    from jax.experimental import multihost_utils

    values = np.asarray(multihost_utils.broadcast_one_to_all(values))
  if np.isnan(values).all():
    raise UserError(
      f"config.objective.reward={grader.spec} gave none of {len(answers)} answers a reward: it "
      f"{faults[0] or 'failed on the first process'}; try it on one answer"
    )
  return values, faults
