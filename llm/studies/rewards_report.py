"""What the study of rewards says: a table of its arms and the course of its GRPO runs."""

import json
from typing import Any, Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
import tabulate
from etils import epath

from llm.runs import metrics
from llm.studies import plots

ARMS = {
  "grpo": "GRPO, reward of exact match",
  "sft": "SFT on the same demonstrations, as long",
  "dpo": "DPO on pairs of its own answers",
  "sft_answers": "SFT on GRPO's problems with answers, as long",
}
CURVES = {
  "reward": "mean reward of the answers",
  "length": "tokens an answer",
  "entropy": "entropy of a token, nats",
  "silent_groups": "share of groups without signal",
}


def compared(right: Mapping[tuple[str, int], np.ndarray], arm: str, seeds: int) -> dict[str, float]:
  """Exact match before and after an arm, and the 95% interval of the difference, all in percent.

  Seeds and held-out problems are taken as drawn.
  """
  trained = [seed for seed in range(seeds) if (arm, seed) in right]
  before_SxN = 100 * np.array([right["start", seed] for seed in trained])
  after_SxN = 100 * np.array([right[arm, seed] for seed in trained])
  gained_SxN = after_SxN - before_SxN
  low, high = metrics.seeds_interval(gained_SxN)
  return {
    "exact_match_before": float(before_SxN.mean()),
    "exact_match_after": float(after_SxN.mean()),
    "low": low,
    "high": high,
  }


def table(arms: Sequence[Mapping[str, Any]]) -> str:
  """A line an arm. arms: as in result.json."""
  rows = []
  for arm in arms:
    gain = arm["exact_match_after"] - arm["exact_match_before"]
    rows.append(
      (
        ARMS[arm["name"]],
        f"{arm['exact_match_before']:.1f}",
        f"{arm['exact_match_after']:.1f}",
        f"{gain:+.1f} [{arm['low']:+.1f}, {arm['high']:+.1f}]",
        f"{arm['seconds']:.0f}",
      )
    )
  headers = ("after the start", "before, %", "after, %", "difference [95%]", "seconds")
  return tabulate.tabulate(rows, headers, "github", disable_numparse=True)


def draw(workdirs: Sequence[epath.Path], folder: epath.Path) -> None:
  """The course of the GRPO runs, a line a seed."""
  figure, axes = plt.subplots(1, len(CURVES), figsize=(14, 3.2), layout="constrained")
  for workdir in workdirs:
    lines = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    lines = [line for line in lines if line["split"] == "train"]
    steps = [line["step"] for line in lines]
    for axis, name in zip(axes, CURVES):
      axis.plot(steps, [line[name] for line in lines], linewidth=1, label=workdir.name)
  for axis, title in zip(axes, CURVES.values()):
    axis.set(xlabel="step", title=title)
  axes[0].legend(frameon=False, fontsize=7)
  plots.save(figure, folder / "rewards")
