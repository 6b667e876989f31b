"""Figures for TensorBoard, written by the caller itself.

tensorboardX's own SummaryWriter hands them to a thread. Where the disk is full, the thread dies,
and the run would wait for it for ever.
"""

import pathlib
import sys
from typing import Any, Mapping


class Events:
  """The events of a run, in a new file of a folder. OSError where it cannot be written.

  purge_step: figures from this step on, in other files of the folder, are void; 0 is none.
  """

  def __init__(self, folder: pathlib.Path, purge_step: int):
    self._protos, writer = _imported()
    folder.mkdir(parents=True, exist_ok=True)
    self._writer = writer.EventsWriter(str(folder / "events"))
    if purge_step:
      start = self._protos.SessionLog(status=self._protos.SessionLog.START)
      self._writer.write_event(self._protos.Event(step=purge_step, session_log=start))

  def add(self, step: int, figures: Mapping[str, float], seconds: float) -> None:
    """Adds figures of a step. seconds: the time of day, since 1970."""
    for name, value in figures.items():
      event = self._protos.Event(step=step, wall_time=seconds)
      event.summary.value.add(tag=name, simple_value=value)
      self._writer.write_event(event)

  def flush(self) -> None:
    """Brings everything to disk."""
    self._writer.flush()

  def close(self) -> None:
    """Brings everything to disk and closes the file."""
    self._writer.close()


def _imported() -> tuple[Any, Any]:
  """The modules of tensorboardX that describe and write events.

  The package would import torch where that is installed, which takes two seconds, only to know an
  array of torch when it sees one.
  """
  hidden = {} if "torch" in sys.modules else {"torch": None}
  sys.modules.update(hidden)  # pyright: ignore[reportCallIssue, reportArgumentType]
  try:
    from tensorboardX import event_file_writer
    from tensorboardX.proto import event_pb2
  finally:
    for name in hidden:
      del sys.modules[name]
  return event_pb2, event_file_writer
