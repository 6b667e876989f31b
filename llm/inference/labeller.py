"""A fine-tuned checkpoint that labels records, or answers questions on them."""

import functools
from typing import Sequence

import jax
import numpy as np
import tqdm
from etils import epath

from llm import sharding
from llm.checkpoints import manager
from llm.config import MeshConfig
from llm.core import UserError
from llm.data import batches as batches_lib
from llm.objectives import base
from llm.training import experiment as experiment_lib
from llm.training.evaluation import host_rows

BATCH_SIZE = 32  # rows at a time


class Labeller:
  """A verified step ready to label. Raises UserError where it was trained for something else."""

  def __init__(self, step: epath.Path):
    self.saved = experiment_lib.from_checkpoint(step)
    name = self.saved.config.objective["name"]
    if not isinstance(self.saved.objective, base.Labels):
      raise UserError(
        f"{step} was trained for {name}, which labels no text: fine-tune it with "
        "configs/finetune_classification.py or finetune_qa.py first"
      )
    self.objective: base.Labels = self.saved.objective
    self.step, self.name = step, name

  def check(self, record: dict):
    """Raises UserError where a record lacks a field, or has one that would be ignored."""
    known = (*self.objective.fields, *self.objective.optional)
    takes = f"a checkpoint of {self.name} takes {', '.join(known)}"
    where = record.get("_where", "the record")
    if missing := [field for field in self.objective.fields if not record.get(field)]:
      raise UserError(f"{where} has no {missing[0]}: {takes}")
    inputs = ("text", "text_pair", "question")
    if ignored := [field for field in inputs if field in record and field not in known]:
      raise UserError(f"{where} has a {ignored[0]}, which would be ignored: {takes}")

  def label(self, records: Sequence[dict]) -> tuple[base.Predictions, base.Rows]:
    """What `results` and `write` of the objective are made of."""
    config = self.saved.config
    length = config.training.sequence_length
    rows = self.objective.encode(records, self.saved.tokenizer, config.model, length)
    mesh = sharding.make_mesh(MeshConfig())
    with jax.set_mesh(mesh):
      params = manager.restore(self.step, "params")
      params = jax.device_put(params, sharding.shardings(params, mesh))
      model = experiment_lib.build(self.objective, config.model, length)
      forward = jax.jit(functools.partial(_predict, model, self.objective))
      batches = tqdm.tqdm(
        batches_lib.passes(rows, BATCH_SIZE, mesh),
        desc="predicting",
        total=-(-len(rows) // BATCH_SIZE),
        unit=" batches",
        disable=None,
      )
      predicted = [jax.tree.map(host_rows, forward(params, batch)) for batch in batches]
    merged = {
      name: np.concatenate([of_batch[name] for of_batch in predicted])[: len(rows)]
      for name in predicted[0]
    }
    return merged, rows


def _predict(model, objective: base.Objective, params: dict, batch: dict) -> dict[str, jax.Array]:
  return objective.predict(model.apply({"params": params}, batch, train=False), batch)
