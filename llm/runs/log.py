"""What a run reports: console lines, a progress bar, metrics.jsonl and TensorBoard events."""

import contextlib
import dataclasses
import functools
import json
import math
import os
import pathlib
import sys
import time
from typing import Any, Iterator, Mapping, Sequence

import jax
import tqdm

from llm import reading
from llm.core import UserError
from llm.runs import metrics as metrics_lib
from llm.runs.events import Events
from llm.runs.workdir import LogFolder

# Seconds between two copies of the logs to a bucket.
COPY_EVERY = 60

# Figures that stand in metrics.jsonl alone.
NOT_ON_CONSOLE = ("grad_norm",)


@dataclasses.dataclass(frozen=True)
class LoggedLine:
  """What each line of metrics.jsonl has; one of rollouts.jsonl has no split."""

  step: int
  split: str = "train"


def duration(seconds: float) -> str:
  """75 -> "1:15", 3675 -> "1:01:15"; "?" where the number is not finite."""
  if not math.isfinite(seconds):
    return "?"
  minutes, seconds_left = divmod(int(seconds + 0.5), 60)
  hours, minutes = divmod(minutes, 60)
  if hours:
    return f"{hours}:{minutes:02}:{seconds_left:02}"
  return f"{minutes}:{seconds_left:02}"


def _figure(name: str, value: float) -> str:
  if name.endswith(("accuracy", "mfu", "input_wait")):
    return f"{name} {value:.1%}"
  if name == "tokens_per_second":
    return f"{value:,.0f} tokens/s"
  return f"{name} {value:.4g}"


def _keep_lines_up_to(step: int, path: pathlib.Path, evaluation_left: bool = False):
  """Drops the lines of a file after `step`, and a last line that a killed run cut off.

  evaluation_left: the evaluation of `step` itself will be repeated.
  """
  if not path.exists():
    return
  kept = []
  for line in path.read_text(errors="replace").splitlines():
    try:
      record = reading.shaped(reading.json_value(line, ""), LoggedLine, "")
      is_repeated = evaluation_left and (record.step, record.split) == (step, "eval")
      if record.step <= step and not is_repeated:
        kept.append(line + "\n")
    except UserError:
      pass  # cut off
  scratch = path.with_suffix(".tmp")
  scratch.write_text("".join(kept))
  os.replace(scratch, path)


class Log:
  """The logs of a run. Process 0 writes them; on the others every method does nothing.

  A resumed run keeps the lines of metrics.jsonl up to `first_step` and drops those of lost steps.
  evaluation_left: it begins with the evaluation of `first_step`.
  """

  def __init__(self, folder: LogFolder, first_step: int, steps: int, evaluation_left: bool = False):
    self.writes = jax.process_index() == 0
    if not self.writes:
      return
    self.folder = folder
    self.first_step = first_step
    self.steps = steps
    self.started_at = time.time()
    self.copied_at = time.time()
    metrics_path = folder.path / "metrics.jsonl"
    with self._written():
      _keep_lines_up_to(first_step, metrics_path, evaluation_left)
      _keep_lines_up_to(first_step, folder.path / "rollouts.jsonl")
      self.file = open(metrics_path, "a", buffering=1)
    self.bar = tqdm.tqdm(
      total=steps,
      initial=first_step,
      unit=" steps",
      disable=None,
      leave=False,
      dynamic_ncols=True,
    )

  @functools.cached_property
  def events(self) -> Events:
    """The events of TensorBoard, begun with the first figures."""
    # The figures of the first step itself were logged before it was saved.
    return Events(self.folder.path / "events", self.first_step and self.first_step + 1)

  @contextlib.contextmanager
  def _written(self) -> Iterator[None]:
    """Raises UserError where what is written inside cannot be, as on a full disk."""
    try:
      yield
    except OSError as error:
      raise UserError(
        f"the logs in {self.folder.path} cannot be written: {error.strerror or error}; what was "
        "saved is kept: make room, and the same command goes on"
      )

  def say(self, text: str):
    """Prints a line above the progress bar."""
    if self.writes:
      with tqdm.tqdm.external_write_mode(sys.stdout):
        print(text, flush=True)

  def advance(self):
    """Moves the progress bar by one step."""
    if self.writes:
      self.bar.update()

  def eta(self, step: int) -> float:
    """Seconds left after `step`, at the mean pace since the start. Evaluation counts too."""
    steps_done = step - self.first_step
    if not steps_done:
      return math.inf
    return (time.time() - self.started_at) / steps_done * (self.steps - step)

  def metrics(self, step: int, figures: dict[str, float], split: str = "train"):
    """Logs the figures of a step to the console, metrics.jsonl and TensorBoard.

    split: "train" or "eval".
    """
    if not self.writes:
      return
    self.say(self._console_line(step, figures, split))
    line = json.dumps(metrics_lib.as_json({"step": step, "split": split, **figures}))
    with self._written():
      self.file.write(line + "\n")
      tagged = {f"{split}/{name}": value for name, value in figures.items()}
      self.events.add(step, tagged, time.time())
    if time.time() - self.copied_at > COPY_EVERY:
      self.flush()

  def samples(self, step: int, samples: Sequence[Mapping[str, Any]]):
    """Adds records of a step to rollouts.jsonl, to look at (llm.show rollouts)."""
    if not self.writes:
      return
    with self._written(), open(self.folder.path / "rollouts.jsonl", "a") as file:
      file.writelines(json.dumps({"step": step, **sample}) + "\n" for sample in samples)

  def _console_line(self, step: int, figures: dict[str, float], split: str) -> str:
    shown = [_figure(name, value) for name, value in figures.items() if name not in NOT_ON_CONSOLE]
    prefix = "eval " if split == "eval" else ""
    if split == "train":
      shown.append(f"{duration(self.eta(step))} left")
    return f"{prefix}step {step}/{self.steps}: {', '.join(shown)}"

  def flush(self):
    """Brings everything that was logged so far to the workdir."""
    if self.writes:
      if "events" in vars(self):
        with self._written():
          self.events.flush()
      self.folder.copy()
      self.copied_at = time.time()

  def close(self):
    """Closes the bar and the files."""
    if not self.writes:
      return
    self.bar.close()
    with self._written(), contextlib.ExitStack() as files:
      files.callback(self.file.close)
      if "events" in vars(self):
        files.callback(self.events.close)
