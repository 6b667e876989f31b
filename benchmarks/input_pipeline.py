"""The input pipeline alone: tokens a second on one core, and what packing leaves.

python benchmarks/input_pipeline.py
"""

import os
import time

import tabulate

from llm import cache
from llm.config import DataConfig, ModelConfig, TokenizerConfig
from llm.data import sources, tokenizer_training
from llm.data.batches import Batches
from llm.objectives import causal_lm, masked_lm, span_corruption


def main():
  """Rows are read in this thread alone, as one prefetching thread of a run does."""
  if hasattr(os, "sched_setaffinity"):
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
  data = DataConfig()
  (source,) = sources.parse("embedded:wikipedia", data)
  vocabulary = tokenizer_training.make(
    TokenizerConfig(name="sentencepiece", vocab_size=8192, sentinels=100),
    [source],
    cache.cache_dir(),
  )
  table = []
  for name, objective, kind, length, rows in (
    ("causal_lm", causal_lm.Objective(), "gpt", 64, 12),
    ("causal_lm", causal_lm.Objective(), "gpt", 1024, 8),
    ("masked_lm, pairs", masked_lm.Objective(), "bert", 128, 32),
    ("masked_lm, packed", masked_lm.Objective(next_sentence=False), "bert", 128, 32),
    ("span_corruption", span_corruption.Objective(), "t5", 128, 16),
  ):
    made = objective.rows(source, vocabulary, data, ModelConfig(name=kind), length)
    batches = Batches([made], [1.0], rows, 0)
    batches[0]
    steps, start = 0, time.perf_counter()
    while time.perf_counter() - start < 2.0:
      batches[steps]
      steps += 1
    pace = steps * rows * length / (time.perf_counter() - start)
    plan = getattr(made, "plan", None)
    dropped = 1 - made.tokens / len(made.documents.tokens_N)
    table.append(
      (
        name,
        f"{rows} x {length}",
        f"{pace:,.0f}",
        f"{plan.fill(length):.2%}" if plan else "",
        f"{plan.cut_documents / len(made.documents):.1%}" if plan else "",
        f"{dropped:.2%}",
      )
    )
  print(
    tabulate.tabulate(
      table,
      headers=(
        "objective",
        "batch",
        "tokens/s, one core",
        "fill",
        "documents cut",
        "tokens dropped",
      ),
    )
  )


if __name__ == "__main__":
  main()
