"""Compiles for growing slices and reads what a device computes, holds and sends.

  pip install -e '.[tpu]' && python benchmarks/weak_scaling.py [--output=weak_scaling.png]

The batch of a chip stays the same: 4 rows of 1,024 tokens. The model is a GPT small (124M). Its
parameters are split over the chips (fsdp, at most 256, which divides its width). The slices are v5e
from 4 to 256 chips and v5p from 8 to 512. The script prints a table and draws a plot.
"""

import argparse
import json
import pathlib
import subprocess
import sys
import tempfile

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import tabulate
import tqdm

ROOT = pathlib.Path(__file__).resolve().parents[1]
SLICES = {
  "v5e": {4: "2x2", 16: "4x4", 64: "8x8", 256: "16x16"},
  "v5p": {8: "2x2x2", 64: "4x4x4", 512: "8x8x8"},
}
ROWS = 4


def measured(version: str, chips: int, shape: str, folder: str) -> dict:
  """The report of preflight."""
  output = pathlib.Path(folder) / f"{version}-{chips}.json"
  command = [
    sys.executable,
    "-m",
    "llm.preflight",
    f"--config={ROOT}/configs/pretrain_gpt.py:small",
    f"--topology={version}:{shape}",
    f"--config.mesh.fsdp={min(chips, 256)}",
    "--config.mesh.data=-1",
    f"--config.training.batch_size={ROWS * chips}",
    "--config.model.dropout=0.0",
    f"--output={output}",
  ]
  subprocess.run(command, check=True, capture_output=True)
  return json.loads(output.read_text())


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--output", default="weak_scaling.png")
  options = parser.parse_args()
  rows = []
  with tempfile.TemporaryDirectory() as folder:
    for version, chips, shape in tqdm.tqdm(
      [(v, n, s) for v, shapes in SLICES.items() for n, s in shapes.items()], unit=" slices"
    ):
      found = measured(version, chips, shape, folder)
      rows.append(
        (
          version,
          chips,
          found["executed_flops"] / chips / 1e12,
          found["memory"]["peak"] / 2**30,
          sum(one["bytes"] for one in found["collectives"]) / 1e6,
          100 * found["mfu_bounds"][found["binding"]],
        )
      )
  headers = (
    "version",
    "chips",
    "TFLOP a chip",
    "peak, GiB a chip",
    "sent, MB a chip",
    "MFU at most, %",
  )
  print(tabulate.tabulate(rows, headers=headers, tablefmt="github", floatfmt=".2f"))
  figure, axes = plt.subplots(1, 3, figsize=(11, 3.5), layout="constrained")
  for column, one in zip((2, 3, 4), axes):
    for version in SLICES:
      points = [(row[1], row[column]) for row in rows if row[0] == version]
      one.plot(*zip(*points), "o-", label=version)
    one.set(xscale="log", xlabel="chips", title=headers[column], ylim=(0, None))
  axes[0].legend(frameon=False)
  figure.savefig(options.output, dpi=150)


if __name__ == "__main__":
  main()
