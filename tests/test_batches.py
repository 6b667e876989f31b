"""A batch is a function of (seed, step), in any order and for any number of processes.

Every row comes once an epoch.
"""

import numpy as np
import pytest

from llm import sharding
from llm.config import MeshConfig
from llm.data import batches as batches_lib
from llm.data import packing
from llm.training import experiment
from tests.conftest import tiny


class Numbers:
  """Rows that are their own numbers."""

  def __init__(self, count, first=0):
    self.count, self.tokens, self.examples = count, 10 * count, count
    self.first = first

  def __len__(self):
    return self.count

  def example(self, i, rng):
    return {
      "row": np.int32(self.first + i),
      "weight": np.float32(1),
      "chance": np.float32(rng.random()),
    }


def numbered(count, batch_size, seed=0, weights=(1.0,)):
  return batches_lib.Batches([Numbers(count)] * len(weights), weights, batch_size, seed)


def test_every_row_once_an_epoch_and_drawn_anew():
  batches = numbered(30, 5)
  epochs = [np.concatenate([batches[e * 6 + s]["row"] for s in range(6)]) for e in range(3)]
  chances = [
    np.concatenate([batches[e * 6 + s]["chance"] for s in range(6)])[np.argsort(rows)]
    for e, rows in enumerate(epochs)
  ]
  for rows in epochs:
    assert sorted(rows) == list(range(30))
  assert not (epochs[0] == epochs[1]).all() and not (chances[0] == chances[1]).any()
  assert not (numbered(30, 5, seed=1)[0]["row"] == batches[0]["row"]).all()


def test_batches_are_the_same_out_of_order(corpus):
  made = experiment.prepare(tiny("bert", f"text:{corpus}")).batches
  again = experiment.prepare(tiny("bert", f"text:{corpus}")).batches
  forward = [made[s] for s in range(7)]
  for s in (6, 2, 5, 0):
    found = again[s]
    assert all((found[k] == forward[s][k]).all() for k in found)


@pytest.mark.parametrize("processes", [2, 4, 8])
def test_one_process_reads_what_several_put_together(corpus, processes):
  batches = experiment.prepare(tiny("bert", f"text:{corpus}")).batches
  whole, share = batches[3], 8 // processes
  parts = [batches.read(3, range(p * share, (p + 1) * share)) for p in range(processes)]
  for key in whole:
    assert (np.concatenate([p[key] for p in parts]) == whole[key]).all()


def test_devices_hold_the_rows_that_the_mesh_gives_them():
  batches = numbered(64, 16)
  mesh = sharding.make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
  own = batches_lib.own_rows(16, mesh)
  placed = batches_lib.to_mesh({part: batches.read(1, range(*part)) for part in own}, 16, mesh)
  assert (np.asarray(placed["row"]) == batches[1]["row"]).all()
  assert own == [(0, 4), (4, 8), (8, 12), (12, 16)]  # each once
  assert all(s.data.shape == (4,) for s in placed["row"].addressable_shards)


def test_worker_processes_make_the_same_batches_in_the_same_order(corpus):
  mesh, wanted = sharding.make_mesh(MeshConfig()), ("bert", "t5")
  for batches in (experiment.prepare(tiny(name, f"text:{corpus}")).batches for name in wanted):
    # Five batches are no whole number of turns of two workers.
    found = batches_lib.stream(batches, 3, 8, mesh, prefetch=2, workers=2)
    for step, batch in zip(range(3, 8), found, strict=True):
      assert all((np.asarray(batch[key]) == value).all() for key, value in batches[step].items()), (
        step
      )


def test_mixture_keeps_its_weights():
  rows = np.concatenate([numbered_mixture()[s]["row"] for s in range(20)])
  assert (rows >= 1000).mean() == pytest.approx(0.3, abs=0.02)
  epochs, tokens = numbered_mixture().usage(20)[1]
  assert epochs == pytest.approx((rows >= 1000).sum() / 100, abs=0.05) and tokens == pytest.approx(
    epochs * 1000
  )


def numbered_mixture():
  return batches_lib.Batches([Numbers(100), Numbers(100, first=1000)], (0.7, 0.3), 10, 0)


def test_evaluation_sees_every_row_once_the_rest_without_weight():
  mesh = sharding.make_mesh(MeshConfig())
  seen = [
    {k: np.asarray(v) for k, v in b.items()} for b in batches_lib.passes(Numbers(21), 8, mesh)
  ]
  assert np.concatenate([b["row"] for b in seen])[:21].tolist() == list(range(21))
  assert np.concatenate([b["weight"] for b in seen]).tolist() == [1.0] * 21 + [0.0] * 3
  again = [np.asarray(b["chance"]) for b in batches_lib.passes(Numbers(21), 8, mesh)]
  assert all((a == b["chance"]).all() for a, b in zip(again, seen))


def test_best_fit_decreasing_is_the_textbook_algorithm():
  rng = np.random.default_rng(0)
  for capacity, lengths in (
    (10, [6, 5, 4, 3, 2, 2, 1]),
    (64, rng.integers(1, 65, 500)),
    (16, [16] * 3),
  ):
    lengths = np.array(lengths)
    rooms = []  # one piece at a time, into the fullest bin that takes it
    for n in sorted(lengths, reverse=True):
      fitting = [r for r in rooms if r >= n]
      if fitting:
        rooms.remove(min(fitting))
      rooms.append((min(fitting) if fitting else capacity) - n)
    bins = packing.best_fit_decreasing(lengths, capacity)
    assert sorted(np.concatenate(bins).tolist()) == list(range(len(lengths)))
    assert max(lengths[b].sum() for b in bins) <= capacity
    assert sorted(capacity - lengths[b].sum() for b in bins) == sorted(rooms)
