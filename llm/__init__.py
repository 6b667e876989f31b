"""pretune: two-phase training of language models in JAX/Flax (import package `llm`)."""

import importlib.metadata
import pathlib
import typing
import warnings

from llm import environment

if typing.TYPE_CHECKING:
  from llm.training.experiment import Bundle

environment.prepare()

try:
  importlib.metadata.distribution("llm")
except importlib.metadata.PackageNotFoundError:
  pass
else:
  warnings.warn(
    "the distribution 'llm' (another project with the same import name) is installed beside "
    "pretune: one of them hides the other. Use a virtual environment without it.",
    stacklevel=1,
  )


def load(checkpoint: str | pathlib.PurePath) -> "Bundle":
  """The (model, params, tokenizer, config) of a checkpoint, for a notebook.

  checkpoint: a workdir, a step, a folder of transformers, a GGUF file, hf:ORG/NAME or
  embedded:NAME.

  `model.apply({"params": params}, batch, train=False)` runs the model. Parameters are host arrays;
  adapters are not merged into their kernels. Raises core.UserError where there is no such
  checkpoint.
  """
  # Imported here, so that importing llm alone stays light.
  from llm.checkpoints import locate
  from llm.training import experiment

  return experiment.load(locate.find(checkpoint))
