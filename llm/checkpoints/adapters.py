"""Low-rank adapters that a checkpoint carries, added into the kernels that they stand beside."""

import numpy as np

from llm.core import STACKED, Params, flatten, unflatten


def is_adapter(path: str) -> bool:
  """Whether a parameter is part of a LoRA adapter."""
  return path.endswith(("/lora_a", "/lora_b"))


def merge(params: Params, alpha: float) -> Params:
  """kernel + A B alpha / rank for every adapter; no adapters in the result. Host arrays."""
  leaves = flatten(params)
  out = {path: leaf for path, leaf in leaves.items() if not is_adapter(path)}
  for path in leaves:
    if path.endswith("/lora_a"):
      layer = path.removesuffix("/lora_a")
      a, b = (np.asarray(leaves[f"{layer}/{name}"], np.float64) for name in ("lora_a", "lora_b"))
      kernel = np.asarray(leaves[f"{layer}/kernel"])
      stacked = kernel.shape[0] if STACKED in path else 1
      added = (a.reshape(stacked, *a.shape[-2:]) @ b.reshape(stacked, *b.shape[-2:])) * (
        alpha / a.shape[-1]
      )
      out[f"{layer}/kernel"] = (kernel + added.reshape(kernel.shape)).astype(kernel.dtype)
  return unflatten(out)
