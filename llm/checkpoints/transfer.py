"""From one run to another: which parameters are taken over, and a record of every one.

Nothing happens that no rule names. A parameter of the new model must find one of the same path and
shape in the checkpoint, a parameter of the checkpoint must find its place in the new model, and
every rule must match something; anything else stops the run with the whole list.
"""
import collections
import dataclasses
import re

import numpy as np
import tabulate

from llm.config import TransferConfig
from llm.core import Params, UserError, flatten, unflatten


@dataclasses.dataclass(frozen=True)
class Entry:
  """One line of the audit. action: copied, renamed, resized, fresh or dropped."""
  path: str
  action: str
  source: str
  shape: tuple[int, ...]

  @property
  def size(self) -> int:
    return int(np.prod(self.shape))


class _Rules:
  """Compiled regexes that remember whether they matched."""

  def __init__(self, name: str, patterns):
    self.name, self.used = name, set()
    self.patterns = list(patterns)
    for pattern in self.patterns:
      try:
        re.compile(pattern)
      except re.error as error:
        raise UserError(f"config.transfer.{name}: {pattern!r} is no regular expression: {error}")

  def match(self, path: str) -> bool:
    hits = [p for p in self.patterns if re.search(p, path)]
    self.used.update(hits)
    return bool(hits)

  def unused(self) -> list[str]:
    return [f"the rule {self.name}={p!r} matches nothing" for p in self.patterns if p not in self.used]


def _renames(rules: TransferConfig) -> list[tuple[str, str]]:
  pairs = [tuple(text.split("=>")) for text in rules.rename]
  if bad := [text for text, pair in zip(rules.rename, pairs) if len(pair) != 2]:
    raise UserError(f"config.transfer.rename: {bad[0]!r} is not of the form 'pattern=>replacement'")
  return pairs


def _overlap(fresh: np.ndarray, loaded: np.ndarray) -> np.ndarray:
  """`fresh` with the corner that both have taken from `loaded`."""
  corner = tuple(slice(0, min(a, b)) for a, b in zip(fresh.shape, loaded.shape))
  out = np.array(fresh)
  out[corner] = loaded[corner]
  return out


def transfer(params: Params, loaded: Params, rules: TransferConfig) -> tuple[Params, list[Entry]]:
  """Fresh parameters with those of `loaded` put in their place, and the audit.

  Raises UserError with the list of every mismatch that no rule explains and every idle rule.
  """
  fresh, sources = flatten(params), {}
  skip, adapt = _Rules("skip", rules.skip), _Rules("adapt", rules.adapt)
  renames = _renames(rules)
  rename = _Rules("rename", [pattern for pattern, _ in renames])
  for path in flatten(loaded):
    new = path
    for pattern, replacement in renames:
      if rename.match(new) and re.search(pattern, new):
        new = re.sub(pattern, replacement, new)
    if new in sources:
      raise UserError(f"config.transfer.rename gives {new} to both {sources[new]} and {path}")
    sources[new] = path
  old = flatten(loaded)
  result, audit, problems = {}, [], []
  for path, leaf in fresh.items():
    result[path] = leaf
    shape = tuple(leaf.shape)
    if skip.match(path):
      audit.append(Entry(path, "fresh", "", shape))
    elif path not in sources:
      problems.append(f"{path} {shape} is not in the checkpoint (skip it to start it fresh, or rename)")
    else:
      source = old[sources[path]]
      if tuple(source.shape) == shape:
        result[path] = source
        audit.append(Entry(path, "copied" if path == sources[path] else "renamed", sources[path], shape))
      elif source.ndim == leaf.ndim and adapt.match(path):
        result[path] = _overlap(np.asarray(leaf), np.asarray(source))
        audit.append(Entry(path, "resized", f"{sources[path]} {tuple(source.shape)}", shape))
      else:
        problems.append(f"{path} has shape {shape} here and {tuple(source.shape)} in the checkpoint "
                        "(adapt it, or skip it)")
  for path, source in sources.items():
    if path not in fresh or skip.match(path):
      if skip.match(path):
        audit.append(Entry(source, "dropped", source, tuple(old[source].shape)))
      else:
        problems.append(f"{source} {tuple(old[source].shape)} of the checkpoint has no place here "
                        "(skip it to drop it, or rename)")
  problems += skip.unused() + rename.unused() + adapt.unused()
  if problems:
    raise UserError("the checkpoint does not fit the model:\n  " + "\n  ".join(problems))
  return unflatten(result), audit


def table(audit: list[Entry]) -> str:
  """The audit for the console: a line a parameter, and counts."""
  rows = [(e.action, e.path, "x".join(map(str, e.shape)), f"{e.size:,}",
           e.source if e.source != e.path else "") for e in audit]
  counts = collections.Counter(e.action for e in audit)
  sizes = collections.Counter()
  for entry in audit:
    sizes[entry.action] += entry.size
  summary = ", ".join(f"{counts[a]} {a} ({sizes[a]:,} parameters)" for a in counts)
  return tabulate.tabulate(rows, headers=("transfer", "parameter", "shape", "size", "from")) + "\n" + summary
