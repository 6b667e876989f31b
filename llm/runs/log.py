"""What a run tells: console lines, a progress bar, metrics.jsonl, TensorBoard events."""

import json
import math
import os
import sys
import time

import jax
import tqdm

from llm.runs.workdir import Growing

COPY_EVERY = 60  # seconds between two copies of the lines to a bucket


def duration(seconds: float) -> str:
  """75 -> "1:15"."""
  if not math.isfinite(seconds):
    return "?"
  minutes, rest = divmod(int(seconds + 0.5), 60)
  hours, minutes = divmod(minutes, 60)
  return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _figure(name: str, value: float) -> str:
  if name.endswith(("accuracy", "mfu", "input_wait")):
    return f"{name} {value:.1%}"
  if name == "tokens_per_second":
    return f"{value:,.0f} tokens/s"
  return f"{name} {value:.4g}"


class Log:
  """Writes of process 0; every method is empty on the others.

  On resuming, metrics.jsonl keeps the lines up to `start` and loses those of lost steps.
  """

  def __init__(self, growing: Growing, start: int, steps: int):
    self.writes = jax.process_index() == 0
    if not self.writes:
      return
    import tensorboardX  # which imports torch where it is: a second that other commands need not wait

    self.growing, self.steps, self.began, self.start = growing, steps, time.time(), start
    self.path, self.copied = growing.folder / "metrics.jsonl", time.time()
    kept = []
    if self.path.exists():
      for line in self.path.read_text().splitlines():
        try:
          if json.loads(line)["step"] <= start:
            kept.append(line + "\n")
        except (ValueError, KeyError):
          pass  # the last line of a killed run, cut off
    scratch = self.path.with_suffix(".tmp")
    scratch.write_text("".join(kept))
    os.replace(scratch, self.path)
    self.file = open(self.path, "a", buffering=1)
    self.events = tensorboardX.SummaryWriter(
      str(growing.folder / "events"), purge_step=start or None
    )
    self.bar = tqdm.tqdm(
      total=steps, initial=start, unit=" steps", disable=None, leave=False, dynamic_ncols=True
    )

  def say(self, text: str):
    """A line on the console, above the bar."""
    if self.writes:
      with tqdm.tqdm.external_write_mode(sys.stdout):
        print(text, flush=True)

  def advance(self):
    """One step is done."""
    if self.writes:
      self.bar.update()

  def eta(self, step: int) -> float:
    """Seconds left, at the mean pace since the start (the time for evaluation included)."""
    done = step - self.start
    return (time.time() - self.began) / done * (self.steps - step) if done else math.inf

  def metrics(self, step: int, figures: dict[str, float], split: str = "train"):
    """One logged step: console, metrics.jsonl and events."""
    if not self.writes:
      return
    shown = ", ".join(
      _figure(k, v) for k, v in figures.items() if k not in ("grad_norm", "seconds")
    )
    tail = f", {duration(self.eta(step))} left" if split == "train" else ""
    self.say(f"{'eval ' if split == 'eval' else ''}step {step}/{self.steps}: {shown}{tail}")
    clean = {k: v if math.isfinite(v) else None for k, v in figures.items()}
    self.file.write(json.dumps({"step": step, "split": split, **clean}) + "\n")
    for name, value in figures.items():
      self.events.add_scalar(f"{split}/{name}", value, step)
    if time.time() - self.copied > COPY_EVERY:
      self.flush()

  def flush(self):
    """What was logged stands in the workdir."""
    if self.writes:
      self.events.flush()
      self.growing.copy()
      self.copied = time.time()

  def close(self):
    """Closes what is open."""
    if self.writes:
      self.bar.close()
      self.file.close()
      self.events.close()
