"""pretune: two-phase training of language models in JAX/Flax (import package `llm`)."""
import importlib.metadata
import warnings

try:
  importlib.metadata.distribution("llm")
except importlib.metadata.PackageNotFoundError:
  pass
else:
  warnings.warn(
      "the distribution 'llm' (another project with the same import name) is installed beside "
      "pretune: one of them hides the other. Use a virtual environment without it.")
