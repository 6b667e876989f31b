"""Qwen3 (Yang et al. 2025): Llama with norms of queries and keys, and a head width of its own."""

import dataclasses
from typing import ClassVar

from llm.models import llama
from llm.models.architecture import Facts

FACTS = dataclasses.replace(llama.FACTS, norm_epsilon=1e-6, qk_norm=True)

# The published dense models; tiny is for a laptop.
SIZES = {
  name: dict(
    num_layers=layers,
    width=width,
    num_heads=heads,
    num_kv_heads=kv_heads,
    head_width=head_width,
    mlp_dim=mlp_dim,
    max_length=length,
    rope_theta=1e6,
    tied=tied,
    dropout=0.0,
  )
  for name, layers, width, heads, kv_heads, head_width, mlp_dim, length, tied in (
    ("tiny", 4, 128, 4, 2, 64, 384, 256, True),
    ("0.6b", 28, 1024, 16, 8, 128, 3072, 40_960, True),
    ("1.7b", 28, 2048, 16, 8, 128, 6144, 40_960, True),
    ("4b", 36, 2560, 32, 8, 128, 9728, 40_960, True),
    ("8b", 36, 4096, 32, 8, 128, 12_288, 40_960, False),
    ("14b", 40, 5120, 40, 8, 128, 17_408, 40_960, False),
    ("32b", 64, 5120, 64, 8, 128, 25_600, 40_960, False),
  )
}


class Backbone(llama.Backbone):
  """Llama's, with the facts of Qwen3."""

  facts: ClassVar[Facts] = FACTS
