"""What a job's run has written: figures, checkpoints and its end, as the API tells them."""

import csv
import io
import json
import pathlib
from typing import Any

from llm.core import first_line

# Figures of metrics.jsonl -> their names in the API.
NAMES = {"loss": "loss", "accuracy": "mean_token_accuracy"}
START = b"--- the run starts ---\n"  # in its log, which is that of all attempts
OWN = ("margin", "reward", "entropy", "length")  # those of other methods keep theirs


def figures(workdir: pathlib.Path, first: int = 0) -> list[dict[str, Any]]:
  """The lines of metrics.jsonl from number `first` on; a line that is being written is left."""
  path = workdir / "metrics.jsonl"
  if not path.exists():
    return []
  lines = path.read_text().split("\n")[first:-1]
  records = []
  for line in lines:
    try:
      records.append(json.loads(line))
    except ValueError:  # a killed run cut it off; the next one drops it
      pass
  return records


def metrics(record: dict[str, Any]) -> dict[str, Any]:
  """A line of metrics.jsonl by the names of the API."""
  prefix = "train" if record["split"] == "train" else "valid"
  told = [name for name in (*NAMES, *OWN) if name in record]
  named = {f"{prefix}_{NAMES.get(name, name)}": record[name] for name in told}
  if prefix == "valid":  # all of the validation file was evaluated
    named |= {f"full_{name}": value for name, value in named.items()}
  return {"step": record["step"], **named}


def total_steps(workdir: pathlib.Path) -> int:
  """The steps of the run; 0 until it is known."""
  try:
    return json.loads((workdir / "resolved.json").read_text())["training"]["steps"]
  except (OSError, ValueError):
    return 0


def result(workdir: pathlib.Path) -> dict[str, Any] | None:
  """What result.json holds; None while the run has not ended."""
  try:
    return json.loads((workdir / "result.json").read_text())
  except (OSError, ValueError):
    return None


def steps(workdir: pathlib.Path) -> list[pathlib.Path]:
  """The complete checkpoints, newest first."""
  folders = [path for path in (workdir / "checkpoints").glob("*") if path.name.isdigit()]
  complete = [path for path in folders if (path / "manifest.json").exists()]
  return sorted(complete, key=lambda path: -int(path.name))


def at_step(workdir: pathlib.Path, step: int) -> dict[str, Any]:
  """The last figures up to a step."""
  told: dict[str, Any] = {}
  for record in figures(workdir):
    if record["step"] <= step:
      told |= metrics(record)
  return {**told, "step": step}


def as_csv(workdir: pathlib.Path) -> bytes:
  """The figures of all steps: a line a step, a column a figure."""
  by_step: dict[int, dict[str, Any]] = {}
  for record in figures(workdir):
    by_step.setdefault(record["step"], {}).update(metrics(record))
  columns = dict.fromkeys(name for row in by_step.values() for name in row)
  text = io.StringIO()
  writer = csv.DictWriter(text, list(columns) or ["step"])
  writer.writeheader()
  writer.writerows(by_step.values())
  return text.getvalue().encode()


def failure(log: pathlib.Path) -> str:
  """Why a run failed: the last line of its last attempt that says so."""
  text = log.read_bytes().rpartition(START)[2].decode(errors="replace")
  lines = [line.strip() for line in text.splitlines() if line.strip()]
  errors = [line for line in lines if line.startswith("error: ")]
  if errors:
    return first_line(ValueError(errors[-1].removeprefix("error: ")))
  return lines[-1] if lines else "the run ended without a word"
