"""pretune: two-phase training of language models in JAX/Flax (import package `llm`)."""
import importlib.metadata
import warnings
from typing import Any, NamedTuple

try:
  importlib.metadata.distribution("llm")
except importlib.metadata.PackageNotFoundError:
  pass
else:
  warnings.warn(
      "the distribution 'llm' (another project with the same import name) is installed beside "
      "pretune: one of them hides the other. Use a virtual environment without it.")


class Bundle(NamedTuple):
  """What a checkpoint holds. `model.apply({"params": params}, batch, train=False)` runs it."""
  model: Any
  params: dict
  tokenizer: Any
  config: Any


def load(checkpoint) -> Bundle:
  """A workdir, a step, a folder of transformers, hf:ORG/NAME or embedded:NAME, for a notebook.

  Parameters are host arrays, adapters as they were saved. Raises core.UserError where there is no such
  checkpoint.
  """
  from llm.checkpoints import locate, manager   # importing llm alone stays light
  from llm.training import experiment
  step = locate.find(checkpoint)
  saved = experiment.from_checkpoint(step)
  return Bundle(saved.model, manager.restore(step, "params"), saved.tokenizer, saved.config)
