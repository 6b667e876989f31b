"""What minutes of pretraining buy: the quickstart after several lengths of it.

  for steps in 850 3400 13600 54400; do
    python -m llm.quickstart --workdir=minutes/$steps --steps=$steps
  done
  python -m benchmarks.minutes minutes/* [--output=minutes/curve]

On two cores of an AMD EPYC (family 26) these are about 1, 4, 16 and 64 minutes of the BERT.
"""

import argparse
import json
import math
import pathlib
from typing import Any, Sequence

import matplotlib.pyplot as plt
import tabulate

from llm.studies import plots, report
from llm.studies.report import Compared


def tasks(result: dict[str, Any]) -> list[Compared]:
  """The tasks of a quickstart."""
  return [Compared(**task) for task in result["compared"]]


def tokens(result: dict[str, Any]) -> float:
  """That the BERT was pretrained on."""
  return sum(source["tokens"] for source in result["pretraining"]["BERT"]["data"].values())


def table(results: Sequence[dict[str, Any]]) -> str:
  """A line a length of pretraining, then scratch and a published checkpoint."""
  rows = []
  for result in results:
    bert = result["pretraining"]["BERT"]
    passes = bert["data"]["embedded:reviews"]["epochs"]
    rows.append(
      [
        f"{bert['seconds'] / 60:.1f}",
        f"{tokens(result) / 1e6:.1f} M",
        f"{passes:.0f}",
        f"{bert['flops']:.1e}",
        *(_cell(task, task.pretrained) for task in tasks(result)),
      ]
    )
  last = tasks(results[-1])
  rows.append(["scratch", "", "", "", *(_cell(task, task.scratch) for task in last)])
  published = [task.others.get("published_bert") for task in last]
  rows.append(["published", "", "", "", *map(_cell, last, published)])
  headers = ["minutes", "tokens", "passes over the reviews", "FLOPs", *(t.task for t in last)]
  return tabulate.tabulate(rows, headers, "github", disable_numparse=True)


def _cell(task: Compared, value: float | None) -> str:
  return "" if value is None else f"{value:.2f}" if task.lower else f"{100 * value:.1f}"


def draw(results: Sequence[dict[str, Any]], path: pathlib.Path):
  """A panel a task: the pretrained network over the minutes, beside scratch."""
  count = len(tasks(results[0]))
  rows = math.ceil(count / 3)
  figure, grid = plt.subplots(rows, 3, figsize=(9, 3 * rows), layout="constrained", squeeze=False)
  minutes = [result["pretraining"]["BERT"]["seconds"] / 60 for result in results]
  for number, axis in enumerate(grid.flat[:count]):
    of_task = [tasks(result)[number] for result in results]
    scale = 1 if of_task[0].lower else 100
    axis.plot(minutes, [scale * task.pretrained for task in of_task], "o-", label="pretrained")
    axis.axhline(scale * of_task[-1].scratch, color="#d1495b", linestyle="--", label="scratch")
    published = of_task[-1].others.get("published_bert")
    if published is not None:
      axis.axhline(scale * published, color="#2a9d5c", linestyle=":", label="published")
    axis.set_xscale("log")
    axis.set_xticks(minutes, [f"{m:.0f}" for m in minutes], minor=False)
    axis.minorticks_off()
    axis.set(title=of_task[0].task, xlabel="minutes of pretraining", ylabel=of_task[0].figure)
  grid[0, 0].legend(frameon=False, fontsize=8)
  plots.save(figure, path)


def main():
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawTextHelpFormatter
  )
  parser.add_argument("workdirs", nargs="+", type=pathlib.Path)
  parser.add_argument("--output", type=pathlib.Path, help="the picture, without its ending")
  arguments = parser.parse_args()
  results = [json.loads((path / "result.json").read_text()) for path in arguments.workdirs]
  results.sort(key=tokens)
  print(table(results))
  for result in results:
    minutes = result["pretraining"]["BERT"]["seconds"] / 60
    print(f"- {report.worth_sentence(result['worth'], minutes)}")
  if arguments.output:
    draw(results, arguments.output)


if __name__ == "__main__":
  main()
