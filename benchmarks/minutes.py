"""What minutes of pretraining buy: the quickstart after several lengths of it.

  for steps in 480 1920 7680 30720; do
    python -m llm.quickstart --workdir=minutes/$steps --steps=$steps
  done
  python -m benchmarks.minutes minutes/* [--output=minutes/curve] [--tokens_per_second=31000]

On two cores of an AMD EPYC (family 25) these are about 1, 4, 16 and 64 minutes of the BERT. Where
the runs shared the machine, --tokens_per_second says what it does when nothing else runs.
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


def minutes(result: dict[str, Any]) -> float:
  """Those of the BERT's pretraining."""
  return result["pretraining"]["BERT"]["seconds"] / 60


def read(workdir: pathlib.Path, tokens_per_second: float) -> dict[str, Any]:
  """The result of a quickstart. tokens_per_second: of its pretraining; 0: as measured."""
  result = json.loads((workdir / "result.json").read_text())
  if tokens_per_second:
    result["pretraining"]["BERT"]["seconds"] = tokens(result) / tokens_per_second
  return result


def tables(results: Sequence[dict[str, Any]]) -> str:
  """A line a length of pretraining: what it reaches, then how far that is from scratch."""
  lengths = []
  for result in results:
    bert = result["pretraining"]["BERT"]
    passes = bert["data"]["embedded:reviews"]["epochs"]
    lengths.append(
      [
        f"{minutes(result):.1f}",
        f"{tokens(result) / 1e6:.1f} M",
        f"{passes:.0f}",
        f"{bert['flops']:.1e}",
      ]
    )
  reached = [
    [*length, *(report.cell(task, task.pretrained) for task in tasks(result))]
    for length, result in zip(lengths, results)
  ]
  last = tasks(results[-1])
  others = {
    "scratch": [task.scratch for task in last],
    "published": [task.others.get("published_bert") for task in last],
    "TF-IDF + LR": [task.others.get("tfidf_lr") for task in last],
  }
  for name, values in others.items():
    reached.append([name, "", "", "", *map(report.cell, last, values)])
  gained = [
    [length[0], *map(report.gain, tasks(result))] for length, result in zip(lengths, results)
  ]
  names = [task.task for task in last]
  headers = ["minutes", "tokens", "passes over the reviews", "FLOPs", *names]
  return "\n\n".join(
    [
      tabulate.tabulate(reached, headers, "github", disable_numparse=True),
      "Minus scratch:",
      tabulate.tabulate(gained, ["minutes", *names], "github", disable_numparse=True),
    ]
  )


def draw(results: Sequence[dict[str, Any]], path: pathlib.Path):
  """A panel a task: the pretrained network over the minutes, beside scratch."""
  count = len(tasks(results[0]))
  rows = math.ceil(count / 3)
  figure, grid = plt.subplots(rows, 3, figsize=(9, 3 * rows), layout="constrained", squeeze=False)
  times = [minutes(result) for result in results]
  for number, axis in enumerate(grid.flat[:count]):
    of_task = [tasks(result)[number] for result in results]
    scale = 1 if of_task[0].lower else 100
    axis.plot(times, [scale * task.pretrained for task in of_task], "o-", label="pretrained")
    axis.axhline(scale * of_task[-1].scratch, color="#d1495b", linestyle="--", label="scratch")
    published = of_task[-1].others.get("published_bert")
    if published is not None:
      axis.axhline(scale * published, color="#2a9d5c", linestyle=":", label="published")
    axis.set_xscale("log")
    axis.set_xticks(times, [f"{time:.0f}" for time in times], minor=False)
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
  parser.add_argument("--tokens_per_second", type=float, default=0, help="0: as measured")
  arguments = parser.parse_args()
  results = [read(workdir, arguments.tokens_per_second) for workdir in arguments.workdirs]
  results.sort(key=tokens)
  print(tables(results), end="\n\n")
  for result in results:
    print(f"- {report.worth_sentence(result['worth'], minutes(result))}")
  if arguments.output:
    draw(results, arguments.output)


if __name__ == "__main__":
  main()
