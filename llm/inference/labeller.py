"""A fine-tuned checkpoint labels records, or answers questions on them."""

import functools
from typing import Any, Callable, Sequence

import jax
import numpy as np
import tqdm
from etils import epath
from flax import linen as nn

from llm import core, sharding
from llm.config import MeshConfig
from llm.core import Batch, Params, UserError
from llm.data import batches as batches_lib
from llm.objectives import base
from llm.training import experiment as experiment_lib

BATCH_SIZE = 32  # rows at a time, or the next number that the devices share


class Labeller:
  """A verified step that is ready to label records.

  Raises UserError if it was trained for an objective that labels nothing.
  """

  def __init__(self, step: epath.Path):
    self.saved = experiment_lib.from_checkpoint(step)
    name = self.saved.config.objective["name"]
    if not isinstance(self.saved.objective, base.Labels):
      raise UserError(
        f"{step} was trained for {name}, which labels no text: fine-tune it with "
        "configs/finetune_classification.py or finetune_qa.py first"
      )
    self.objective: base.Labels = self.saved.objective
    self.step = step
    self.name = name

  def check(self, record: dict):
    """Raises UserError if a record lacks a field, or has one that would be ignored."""
    known = (*self.objective.fields, *self.objective.optional)
    takes = f"a checkpoint of {self.name} takes {', '.join(known)}"
    where = record.get("_where", "the record")
    if missing := [field for field in self.objective.fields if not record.get(field)]:
      raise UserError(f"{where} has no {missing[0]}: {takes}")
    inputs = ("text", "text_pair", "question")
    for field in inputs:
      if not isinstance(record.get(field) or "", str):
        raise UserError(f"{where}: the field {field!r} must be a string")
    if ignored := [field for field in inputs if field in record and field not in known]:
      raise UserError(f"{where} has a {ignored[0]}, which would be ignored: {takes}")

  @functools.cached_property
  def mesh(self) -> jax.sharding.Mesh:
    """Of all devices."""
    return sharding.make_mesh(MeshConfig())

  @functools.cached_property
  def program(self) -> tuple[Params, Callable]:
    """(the parameters on the mesh, the compiled function of them and a batch)."""
    params, forward = self.load()
    return jax.device_put(params, sharding.shardings(params, self.mesh)), forward

  def load(self) -> tuple[Params, Callable]:
    """(the parameters on the host, the compiled function of them and a batch)."""
    config = self.saved.config
    params = experiment_lib.params_of(self.step, self.saved)
    model = experiment_lib.build(self.objective, config.model, config.training.sequence_length)
    return params, jax.jit(functools.partial(_predicted, model, self.objective))

  def label(self, records: Sequence[dict]) -> tuple[base.Predictions, base.Rows]:
    """(predictions, rows), for the objective's `results` and `write`."""
    config = self.saved.config
    length = config.training.sequence_length
    rows = self.objective.encode(records, self.saved.tokenizer, config.model, length)
    mesh = self.mesh
    batch_size = core.round_up(BATCH_SIZE, mesh.size)
    with jax.set_mesh(mesh):
      params, forward = self.program
      batches = tqdm.tqdm(
        batches_lib.passes(rows, batch_size, mesh),
        desc="predicting",
        total=-(-len(rows) // batch_size),
        unit=" batches",
        disable=None,
      )
      by_batch = [jax.tree.map(sharding.host_rows, forward(params, batch)) for batch in batches]
    predictions = {}
    for name in by_batch[0]:
      parts = [of_batch[name] for of_batch in by_batch]
      predictions[name] = np.concatenate(parts)[: len(rows)]  # the last batch was filled up
    return predictions, rows


def _predicted(
  model: nn.Module, objective: base.Objective, params: Params, batch: Batch
) -> dict[str, jax.Array]:
  """What an objective predicts for a batch."""
  outputs: Any = model.apply({"params": params}, batch, train=False)
  return objective.predict(outputs, batch)
