"""pretune: two-phase training of language models in JAX/Flax (import package `llm`)."""

import importlib.metadata
import warnings

from llm import environment

environment.prepare()

try:
  importlib.metadata.distribution("llm")
except importlib.metadata.PackageNotFoundError:
  pass
else:
  warnings.warn(
    "the distribution 'llm' (another project with the same import name) is installed beside "
    "pretune: one of them hides the other. Use a virtual environment without it."
  )


def load(checkpoint):
  """(model, params, tokenizer, config) of a checkpoint, for a notebook: a workdir, a step, a folder of transformers,
  a GGUF file, hf:ORG/NAME or embedded:NAME.

  `model.apply({"params": params}, batch, train=False)` runs it. Parameters are host arrays, adapters as they were
  saved. Raises core.UserError where there is no such
  checkpoint.
  """
  from llm.checkpoints import locate  # importing llm alone stays light
  from llm.training import experiment

  return experiment.load(locate.find(checkpoint))
