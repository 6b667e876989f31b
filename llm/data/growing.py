"""Arrays on disk that are written piece by piece and mapped, for what may not fit in memory."""

import pathlib
from typing import Any

import numpy as np

HEADER = 128  # bytes: numpy pads the header of a one-dimensional array to so many


class Growing:
  """A .npy file of one dimension that grows by what is added. `np.load` with mmap_mode maps it."""

  def __init__(self, path: pathlib.Path, dtype: str = "<i8"):
    self.path = path
    self.dtype = np.dtype(dtype)
    self.count = 0

  def __enter__(self) -> "Growing":
    self._file = open(self.path, "wb")
    self._file.write(b" " * HEADER)
    return self

  def add(self, numbers: Any) -> None:
    """Adds an array, or a sequence of numbers."""
    array = np.asarray(numbers, self.dtype)
    self._file.write(array.tobytes())
    self.count += len(array)

  def __exit__(self, *exception: Any) -> None:
    self._file.seek(0)
    description = np.lib.format.dtype_to_descr(self.dtype)
    header = {"descr": description, "fortran_order": False, "shape": (self.count,)}
    np.lib.format.write_array_header_1_0(self._file, header)
    assert self._file.tell() == HEADER
    self._file.close()


class Mapped(np.memmap):
  """An array of a file. Another process that it is sent to maps the file; slices are copied."""

  origin: tuple[Any, ...] = ()  # the arguments of `mapped`; () in slices

  def __reduce__(self):
    return (mapped, self.origin) if self.origin else np.array(self).__reduce__()


def mapped(path: pathlib.Path, columns: int = 0) -> np.ndarray:
  """The array of a file, mapped: what is not read takes no memory. columns: 0 is one dimension."""
  array = np.load(path, mmap_mode="r")
  if columns:
    array = array.reshape(-1, columns)
  array = array.view(Mapped)
  array.origin = (path, columns)
  return array
