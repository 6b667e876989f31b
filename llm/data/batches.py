"""Batches by number: `batches[step]` depends on the seed and the step alone.

So a run that resumes at a step sees what the uninterrupted one saw, whatever the number of
processes, and the data position of a run is its step.
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


@dataclasses.dataclass(frozen=True)
class Batches:
  """The batches of a run: rows shuffled anew in every epoch, sources mixed by weight.

  rows: one `Rows` a source. weights: their shares of the rows. batch_size: rows of a batch, whatever
  the number of examples that share each.
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
    """Batches until every row of the first source was seen once."""
    return len(self.rows[0]) * sum(self.weights) / self.weights[0] / self.batch_size

  def examples(self) -> float:
    """Examples of a batch, on average."""
    return self.batch_size * examples_a_row(self.rows, self.weights)

  def tokens(self) -> float:
    """Tokens of a batch, on average: what is real of its rows, without padding."""
    return sum(tokens for _, tokens in self.usage(1))

  def usage(self, steps: int) -> list[tuple[float, float]]:
    """(epochs, tokens) that each source gives in `steps` batches."""
    drawn = [steps * self.batch_size * w / sum(self.weights) for w in self.weights]
    return [(n / len(rows), n / len(rows) * rows.tokens) for n, rows in zip(drawn, self.rows)]


def examples_a_row(rows: Sequence, weights: Sequence[float]) -> float:
  """Examples that share a row of a mixture, on average."""
  shares = [w * (r.examples / len(r)) for w, r in zip(weights, rows)]
  return sum(shares) / sum(weights)


def rows_a_batch(examples: int, parts: int, rows: Sequence, weights: Sequence[float]) -> int:
  """The rows of a batch that come nearest to so many examples; as many where a row is one example.

  A batch is worked through in `parts`. Each of them has 1, 2, 4 or a multiple of 8 rows, which most
  meshes can share. The number does not depend on the mesh, so that batches are equal on every mesh.
  """
  together = examples_a_row(rows, weights)
  if together == 1:
    return examples
  wanted = examples / together / parts
  of_part = 8 * round(wanted / 8) if wanted > 6 else min((1, 2, 4), key=lambda n: abs(n - wanted))
  return parts * of_part


def stack(examples) -> dict[str, np.ndarray]:
  """Examples -> one batch."""
  return {key: np.stack([e[key] for e in examples]) for key in examples[0]}


def pad_rows(batch: dict[str, np.ndarray], batch_size: int) -> dict[str, np.ndarray]:
  """A short last batch, filled up with rows of zeros, which have no weight."""
  return {
    k: np.pad(v, [(0, batch_size - len(v))] + [(0, 0)] * (v.ndim - 1)) for k, v in batch.items()
  }


def own_rows(batch_size: int, mesh: Mesh) -> list[tuple[int, int]]:
  """The parts (from, to) of a batch that lie on this process's devices, each once."""
  index_map = batch_sharding(mesh).addressable_devices_indices_map((batch_size,))
  return sorted({rows.indices(batch_size)[:2] for (rows,) in index_map.values()})


def to_mesh(
  parts: dict[tuple[int, int], dict[str, np.ndarray]], batch_size: int, mesh: Mesh
) -> Batch:
  """A global batch from this process's parts of it, by (from, to)."""
  sharding = batch_sharding(mesh)
  first = next(iter(parts.values()))

  def array(key):
    part = lambda index: parts[index[0].indices(batch_size)[:2]][key]
    return jax.make_array_from_callback((batch_size, *first[key].shape[1:]), sharding, part)

  return {key: array(key) for key in first}


def _of_the_run(worker: int, workers: int):
  """A worker ends with its run: not by a signal to all processes of a job, which the run saves after, and not after it."""
  for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, signal.SIG_IGN)

  def watch():
    multiprocessing.parent_process().join()
    os._exit(1)

  threading.Thread(target=watch, daemon=True).start()


def stream(
  batches: Batches, start: int, stop: int, mesh: Mesh, prefetch: int, workers: int = 0
) -> Any:
  """The batches of steps start .. stop-1 on the mesh, made and placed ahead by Grain: by a thread, or by processes for it."""
  if (
    not flags.FLAGS.is_parsed()
  ):  # Grain reads flags of its own, of which a library's user knows nothing
    flags.FLAGS.mark_as_parsed()
  size, own = batches.batch_size, own_rows(batches.batch_size, mesh)
  made = grain.MapDataset.range(start, stop).map(
    lambda step: {part: batches.read(step, range(*part)) for part in own}
  )
  made = made.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0))
  # Through pipes: of shared memory, Grain would leave pieces behind.
  piped = grain.experimental.WithOptionsIterDataset(
    made, grain.experimental.DatasetOptions(min_shm_size=sys.maxsize)
  )
  ahead = piped.mp_prefetch(
    grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=prefetch),
    worker_init_fn=_of_the_run,
  )
  placed = ahead.map(lambda parts: to_mesh(parts, size, mesh))
  return iter(grain.experimental.ThreadPrefetchIterDataset(placed, prefetch_buffer_size=prefetch))


def passes(rows: Any, batch_size: int, mesh: Mesh, limit: int = 0) -> Iterator[Batch]:
  """Every row once, in order, the last batch filled up with rows of no weight: for evaluation.

  Chance is drawn from the row's number, so that every evaluation sees the same. limit: batches.
  """

  def read(step: int, first: int, last: int) -> dict[str, np.ndarray]:
    numbers = range(step * batch_size + first, step * batch_size + last)
    examples = [rows.example(i, np.random.default_rng((0, i))) for i in numbers if i < len(rows)]
    if examples:
      return pad_rows(stack(examples), len(numbers))
    example = rows.example(0, np.random.default_rng((0, 0)))
    return {k: np.zeros((len(numbers), *v.shape), v.dtype) for k, v in example.items()}

  count = -(-len(rows) // batch_size)
  parts = own_rows(batch_size, mesh)
  for step in range(min(count, limit) if limit else count):
    yield to_mesh({part: read(step, *part) for part in parts}, batch_size, mesh)
