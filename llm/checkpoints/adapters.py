"""LoRA adapters of a checkpoint, and their merging into kernels (Hu et al. 2021)."""

import numpy as np

from llm.core import STACKED, Params, flatten, unflatten


def is_adapter(path: str) -> bool:
  """Whether a parameter is part of a LoRA adapter."""
  return path.endswith(("/lora_a", "/lora_b"))


def merge(params: Params, alpha: float) -> Params:
  """Merges every adapter into its kernel: kernel + A B alpha / rank.

  The result has no adapters. Merged kernels are host arrays.
  """
  leaves = flatten(params)
  merged = {path: leaf for path, leaf in leaves.items() if not is_adapter(path)}
  for path in leaves:
    if not path.endswith("/lora_a"):
      continue
    layer = path.removesuffix("/lora_a")
    kernel = np.asarray(leaves[f"{layer}/kernel"])
    a = np.asarray(leaves[f"{layer}/lora_a"], np.float64)
    b = np.asarray(leaves[f"{layer}/lora_b"], np.float64)
    num_layers = kernel.shape[0] if STACKED in path else 1
    merged[f"{layer}/kernel"] = _merged_kernel(kernel, a, b, alpha, num_layers)
  return unflatten(merged)


def _merged_kernel(
  kernel: np.ndarray, a: np.ndarray, b: np.ndarray, alpha: float, num_layers: int
) -> np.ndarray:
  """kernel + A B alpha / rank, layer by layer where layers are stacked."""
  rank = a.shape[-1]
  a = a.reshape(num_layers, *a.shape[-2:])
  b = b.reshape(num_layers, *b.shape[-2:])
  change = (a @ b) * (alpha / rank)
  return (kernel + change.reshape(kernel.shape)).astype(kernel.dtype)
