"""Batches by number: `batches[step]` depends on the seed and the step alone.

So a run that resumes at a step sees the same batches as an uninterrupted run, whatever the number
of processes. The data position of a run is its step.
"""

import dataclasses
import functools
import multiprocessing
import os
import signal
import sys
import threading
from typing import Any, Iterator, Sequence

import grain
import grain.experimental
import jax
import numpy as np
from absl import flags
from jax.sharding import Mesh

from llm.core import Batch
from llm.sharding import batch_sharding

Part = tuple[int, int]  # rows of a batch: from, to


@dataclasses.dataclass(frozen=True)
class Batches:
  """The batches of a run. Rows are shuffled in every epoch, and sources are mixed by weight.

  rows: the `Rows` of each source. weights: the share of each source in the rows. batch_size: rows
  of a batch, however many examples share each row.
  """

  rows: Sequence
  weights: Sequence[float]
  batch_size: int
  seed: int

  @functools.cached_property
  def _examples(self) -> grain.MapDataset:
    streams = [
      grain.MapDataset.range(len(rows))
      .seed(self.seed + number)
      .shuffle()
      .repeat()
      .random_map(rows.example)
      for number, rows in enumerate(self.rows)
    ]
    if len(streams) == 1:
      return streams[0]
    return grain.MapDataset.mix(streams, [w / sum(self.weights) for w in self.weights])

  def read(self, step: int, rows: range) -> dict[str, np.ndarray]:
    """The given rows of batch `step`, as host arrays."""
    return stack([self._examples[step * self.batch_size + row] for row in rows])

  def __getitem__(self, step: int) -> dict[str, np.ndarray]:
    return self.read(step, range(self.batch_size))

  def steps_an_epoch(self) -> float:
    """The number of batches in which every row of the first source occurs once."""
    return len(self.rows[0]) * sum(self.weights) / self.weights[0] / self.batch_size

  def examples(self) -> float:
    """The mean number of examples in a batch."""
    return self.batch_size * examples_a_row(self.rows, self.weights)

  def tokens(self) -> float:
    """The mean number of tokens in a batch, without padding."""
    return sum(tokens for _, tokens in self.usage(1))

  def usage(self, steps: int) -> list[tuple[float, float]]:
    """The (epochs, tokens) that `steps` batches take from each source."""
    drawn = [steps * self.batch_size * w / sum(self.weights) for w in self.weights]
    return [(n / len(rows), n / len(rows) * rows.tokens) for n, rows in zip(drawn, self.rows)]


def examples_a_row(rows: Sequence, weights: Sequence[float]) -> float:
  """The mean number of examples that share a row of a mixture."""
  shares = [w * (r.examples / len(r)) for w, r in zip(weights, rows)]
  return sum(shares) / sum(weights)


def rows_a_batch(examples: int, parts: int, rows: Sequence, weights: Sequence[float]) -> int:
  """The number of rows that holds about `examples` examples.

  It is `examples` where each row is one example. Otherwise, each of the `parts` of a batch
  (accumulation) gets 1, 2, 4 or a multiple of 8 rows, which most meshes can share. The number does
  not depend on the mesh, so batches are equal on every mesh.
  """
  per_row = examples_a_row(rows, weights)
  if per_row == 1:
    return examples
  ideal = examples / per_row / parts
  if ideal > 6:
    rows_a_part = 8 * round(ideal / 8)
  else:
    rows_a_part = min((1, 2, 4), key=lambda n: abs(n - ideal))
  return parts * rows_a_part


def stack(examples: Sequence[Any]) -> dict[str, np.ndarray]:
  """B examples, each a dict of arrays -> one batch, with B as the first dimension."""
  return {key: np.stack([e[key] for e in examples]) for key in examples[0]}


def of_texts(
  texts: Sequence[Sequence[int] | np.ndarray], length: int, pad: int, *, padding_first: bool = False
) -> dict[str, np.ndarray]:
  """A batch with a text in each row: tokens, segments and positions, BxT with T = length.

  pad: the id of the padding. padding_first: all texts end in the last slot.
  """
  shape = (len(texts), length)
  batch = {
    "tokens": np.full(shape, pad, np.int32),
    "segments": np.zeros(shape, np.int32),
    "positions": np.zeros(shape, np.int32),
  }
  for row, ids in enumerate(texts):
    first = length - len(ids) if padding_first else 0
    places = slice(first, first + len(ids))
    batch["tokens"][row, places] = ids
    batch["segments"][row, places] = 1
    batch["positions"][row, places] = np.arange(len(ids))
  return batch


def pad_rows(batch: dict[str, np.ndarray], batch_size: int) -> dict[str, np.ndarray]:
  """Fills up a short last batch with rows of zeros, which have weight 0."""
  padded = {}
  for key, values in batch.items():
    missing = batch_size - len(values)
    padded[key] = np.pad(values, [(0, missing)] + [(0, 0)] * (values.ndim - 1))
  return padded


def own_rows(batch_size: int, mesh: Mesh) -> list[Part]:
  """The parts of a batch that this process's devices hold, each part once."""
  index_map = batch_sharding(mesh).addressable_devices_indices_map((batch_size,))
  parts = set()
  for index in index_map.values():
    assert index is not None  # every device of the mesh holds rows of a batch
    parts.add(index[0].indices(batch_size)[:2])
  return sorted(parts)


def to_mesh(parts: dict[Part, dict[str, np.ndarray]], batch_size: int, mesh: Mesh) -> Batch:
  """A global batch, made from the parts of it that this process holds."""
  sharding = batch_sharding(mesh)
  first_part = next(iter(parts.values()))

  def global_array(key: str) -> jax.Array:
    def rows_of_device(index):
      part = index[0].indices(batch_size)[:2]
      return parts[part][key]

    shape = (batch_size, *first_part[key].shape[1:])
    return jax.make_array_from_callback(shape, sharding, rows_of_device)

  return {key: global_array(key) for key in first_part}


def place(batch: dict[str, np.ndarray], mesh: Mesh) -> Batch:
  """A global batch, of which every process holds all rows."""
  count = len(next(iter(batch.values())))
  parts = {
    (start, stop): {key: values[start:stop] for key, values in batch.items()}
    for start, stop in own_rows(count, mesh)
  }
  return to_mesh(parts, count, mesh)


def stream(
  batches: Batches, start: int, stop: int, mesh: Mesh, prefetch: int, workers: int = 0
) -> grain.DatasetIterator[Batch]:
  """The batches of steps start .. stop-1 on the mesh, prepared ahead by Grain.

  A thread reads them and places them on devices. With `workers`, that many processes read for it.
  prefetch: the number of batches that wait on the mesh, and in each worker.
  """
  # Grain reads absl's flags, which nobody has parsed where this package is used as a library.
  if not flags.FLAGS.is_parsed():
    flags.FLAGS.mark_as_parsed()
  batch_size = batches.batch_size
  local_parts = own_rows(batch_size, mesh)

  def read_parts(step: int) -> dict[Part, dict[str, np.ndarray]]:
    return {part: batches.read(step, range(*part)) for part in local_parts}

  host_batches = grain.MapDataset.range(start, stop).map(read_parts)
  host_batches = host_batches.to_iter_dataset(
    grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
  )
  # Workers send batches through pipes: Grain leaves pieces of shared memory behind.
  host_batches = grain.experimental.WithOptionsIterDataset(
    host_batches, grain.experimental.DatasetOptions(min_shm_size=sys.maxsize)
  )
  host_batches = host_batches.mp_prefetch(
    grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=prefetch),
    worker_init_fn=_start_worker,
  )
  placed = host_batches.map(lambda parts: to_mesh(parts, batch_size, mesh))
  return iter(grain.experimental.ThreadPrefetchIterDataset(placed, prefetch_buffer_size=prefetch))


def _start_worker(worker: int, workers: int) -> None:
  """Makes a worker process end with its run, and not before.

  Workers ignore SIGINT and SIGTERM, which reach every process of a job: the run still needs their
  batches for its last save. When the run's process ends, the worker exits.
  """
  for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, signal.SIG_IGN)

  def exit_with_run():
    run = multiprocessing.parent_process()
    assert run is not None  # a worker has a parent
    run.join()
    os._exit(1)

  threading.Thread(target=exit_with_run, daemon=True).start()


def passes(rows: Any, batch_size: int, mesh: Mesh, limit: int = 0) -> Iterator[Batch]:
  """Every row once and in order, for evaluation. Rows of weight 0 fill up the last batch.

  The row's number seeds its random generator, so that all evaluations see the same rows. limit: the
  largest number of batches; 0 is all.
  """
  count = -(-len(rows) // batch_size)
  if limit:
    count = min(count, limit)
  parts = own_rows(batch_size, mesh)
  for step in range(count):
    first = step * batch_size
    host_batch = {part: _rows_in_order(rows, first + part[0], first + part[1]) for part in parts}
    yield to_mesh(host_batch, batch_size, mesh)


def _rows_in_order(rows: Any, start: int, stop: int) -> dict[str, np.ndarray]:
  """Rows start .. stop-1, with rows of zeros after the last."""
  present = range(start, min(stop, len(rows)))
  if present:
    examples = [rows.example(i, np.random.default_rng((0, i))) for i in present]
    return pad_rows(stack(examples), stop - start)
  example = rows.example(0, np.random.default_rng((0, 0)))
  return {key: np.zeros((stop - start, *v.shape), v.dtype) for key, v in example.items()}
