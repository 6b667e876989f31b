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

from llm.checkpoints import adapters, vocabulary
from llm.config import TransferConfig
from llm.core import Params, UserError, flatten, unflatten, virtual_paths


@dataclasses.dataclass(frozen=True)
class Entry:
  """One line of the audit. action: copied, renamed, resized, matched, fresh or dropped."""

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
    return [
      f"the rule {self.name}={p!r} matches nothing" for p in self.patterns if p not in self.used
    ]


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


def _layers(params: Params) -> dict[str, tuple]:
  """Virtual path -> (leaf, layer), layer None where the leaf is no stack. Nothing is copied."""
  out = {}
  for path, leaf in flatten(params).items():
    paths = virtual_paths(path, leaf)
    for layer, virtual in enumerate(paths):
      out[virtual] = (leaf, layer if paths != [path] else None)
  return out


def _value(leaf, layer) -> np.ndarray:
  return np.asarray(leaf) if layer is None else np.asarray(leaf[layer])


def _shape(leaf, layer) -> tuple[int, ...]:
  return tuple(leaf.shape) if layer is None else tuple(leaf.shape[1:])


def _renamed(old: dict, renames, rename: _Rules) -> dict[str, str]:
  """New path -> path in the checkpoint."""
  sources = {}
  for path in old:
    new = path
    for pattern, replacement in renames:
      if rename.match(new):
        new = re.sub(pattern, replacement, new)
    if new in sources:
      raise UserError(f"config.transfer.rename gives {new} to both {sources[new]} and {path}")
    sources[new] = path
  return sources


def transfer(
  params: Params, loaded: Params, rules: TransferConfig, matching: vocabulary.Matching | None = None
) -> tuple[Params, list[Entry]]:
  """Fresh parameters with those of `loaded` put in their place, and the audit, a line a layer.

  matching: how the rows of the vocabulary follow from the checkpoint's, where it is another one.
  Raises UserError with the list of every mismatch that no rule explains and every idle rule.
  """
  fresh, old = _layers(params), _layers(loaded)
  skip, adapt = _Rules("skip", rules.skip), _Rules("adapt", rules.adapt)
  renames = _renames(rules)
  rename = _Rules("rename", [pattern for pattern, _ in renames])
  sources = _renamed(old, renames, rename)
  taken, audit, problems = {}, [], []
  for path, (leaf, layer) in fresh.items():
    shape = _shape(leaf, layer)
    if skip.match(path) or adapters.is_adapter(path):  # config.model.lora_rank asked for these
      audit.append(Entry(path, "fresh", "", shape))
    elif path not in sources:
      problems.append(
        f"{path} {shape} is not in the checkpoint (skip it to start it fresh, or rename)"
      )
    else:
      source = old[sources[path]]
      if matching and path in vocabulary.PATHS:
        taken[path] = matching.apply(_value(leaf, layer), _value(*source))
        audit.append(Entry(path, "matched", str(matching), shape))
      elif _shape(*source) == shape:
        taken[path] = _value(*source)
        audit.append(
          Entry(path, "copied" if path == sources[path] else "renamed", sources[path], shape)
        )
      elif len(_shape(*source)) == len(shape) and adapt.match(path):
        taken[path] = _overlap(_value(leaf, layer), _value(*source))
        audit.append(Entry(path, "resized", f"{sources[path]} {_shape(*source)}", shape))
      else:
        problems.append(
          f"{path} has shape {shape} here and {_shape(*source)} in the checkpoint "
          "(adapt it, or skip it)"
        )
  for path, source in sources.items():
    if path in fresh and not skip.match(path):
      continue
    if skip.match(path):
      audit.append(Entry(source, "dropped", source, _shape(*old[source])))
    else:
      problems.append(
        f"{source} {_shape(*old[source])} of the checkpoint has no place here "
        "(skip it to drop it, or rename)"
      )
  problems += skip.unused() + rename.unused() + adapt.unused()
  if problems:
    raise UserError("the checkpoint does not fit the model:\n  " + "\n  ".join(_grouped(problems)))
  return _stacked(params, taken), audit


def _stacked(params: Params, taken: dict[str, np.ndarray]) -> Params:
  """`params` with what was taken in its place, layers stacked again."""
  result = {}
  for path, leaf in flatten(params).items():
    paths = virtual_paths(path, leaf)
    if not any(p in taken for p in paths):
      result[path] = leaf
    elif paths == [path]:
      result[path] = taken[path]
    else:
      result[path] = np.stack(
        [taken[p] if p in taken else np.asarray(leaf[i]) for i, p in enumerate(paths)]
      )
  return unflatten(result)


_LAYER = re.compile(r"(?<=/layers/)\d+(?=/)")


def _grouped(lines: list[str]) -> list[str]:
  """Lines that differ in the number of a layer alone become one."""
  numbers = {}
  for line in lines:
    numbers.setdefault(_LAYER.sub("{}", line, count=1), []).append(_LAYER.search(line))
  return [
    text.replace("{}", _span([int(n[0]) for n in found])) if found[0] else text
    for text, found in numbers.items()
  ]


def _span(numbers: list[int]) -> str:
  """[0, 1, 2, 5] -> "0..2,5"."""
  parts = []
  for n in numbers:
    if parts and parts[-1][1] == n - 1:
      parts[-1][1] = n
    else:
      parts.append([n, n])
  return ",".join(str(a) if a == b else f"{a}..{b}" for a, b in parts)


def table(audit: list[Entry]) -> str:
  """The audit for the console: a line a parameter, layers of one fate together, and counts."""
  lines = {}
  for e in audit:
    generic = _LAYER.sub("*", e.path, count=1)
    number = _LAYER.search(e.path)
    source = "" if e.source == e.path else _LAYER.sub("*", e.source, count=1)
    lines.setdefault((e.action, generic, e.shape, source), []).append(
      (int(number[0]) if number else None, e.size)
    )
  rows = [
    (
      action,
      path.replace("*", _span([n for n, _ in found])) if found[0][0] is not None else path,
      "x".join(map(str, shape)),
      f"{sum(size for _, size in found):,}",
      source,
    )
    for (action, path, shape, source), found in lines.items()
  ]
  counts, sizes = collections.Counter(e.action for e in audit), collections.Counter()
  for entry in audit:
    sizes[entry.action] += entry.size
  summary = ", ".join(f"{counts[a]} {a} ({sizes[a]:,} parameters)" for a in counts)
  return (
    tabulate.tabulate(rows, headers=("transfer", "parameter", "shape", "size", "from"))
    + "\n"
    + summary
  )
