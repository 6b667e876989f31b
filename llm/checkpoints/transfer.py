"""Transfer of parameters from a checkpoint to a new model, with an audit of every parameter.

Both must have the same parameters, with the same paths and shapes. Rules name every exception, and
every rule must match something. Otherwise the run stops with the list of all problems.
"""

import collections
import dataclasses
import re
from typing import Any, Iterable

import jax
import numpy as np
import tabulate

from llm import sharding
from llm.checkpoints import adapters, vocabulary
from llm.config import TransferConfig
from llm.core import Params, UserError, flatten, unflatten, virtual_paths


@dataclasses.dataclass(frozen=True)
class Entry:
  """One line of the audit.

  action: copied, renamed, resized, matched, fresh or dropped. source: the path in the checkpoint
  and, of a resized parameter, the shape there; or how rows of a vocabulary were matched.
  """

  path: str
  action: str
  source: str
  shape: tuple[int, ...]

  @property
  def size(self) -> int:
    """The number of values."""
    return int(np.prod(self.shape))


class _Patterns:
  """The regular expressions of one config key. They remember which of them matched."""

  def __init__(self, name: str, patterns: Iterable[str]):
    self.name = name
    self.patterns = list(patterns)
    self.used: set[str] = set()
    for pattern in self.patterns:
      try:
        re.compile(pattern)
      except re.error as error:
        raise UserError(f"config.transfer.{name}: {pattern!r} is no regular expression: {error}")

  def match(self, path: str) -> bool:
    """Whether a pattern matches the path."""
    matching = [pattern for pattern in self.patterns if re.search(pattern, path)]
    self.used.update(matching)
    return bool(matching)

  def problems(self) -> list[str]:
    """A line for every pattern that matched nothing."""
    unused = [pattern for pattern in self.patterns if pattern not in self.used]
    return [f"the rule {self.name}={pattern!r} matches nothing" for pattern in unused]


class _Rules:
  """The rules of a config. Raises UserError where one is malformed."""

  def __init__(self, config: TransferConfig):
    self.skip = _Patterns("skip", config.skip)
    self.adapt = _Patterns("adapt", config.adapt)
    self.replacements = [_pattern_and_replacement(text) for text in config.rename]
    self.rename = _Patterns("rename", [pattern for pattern, _ in self.replacements])

  def renamed(self, path: str) -> str:
    """The path in the new model of a parameter of the checkpoint."""
    for pattern, replacement in self.replacements:
      if self.rename.match(path):
        path = re.sub(pattern, replacement, path)
    return path

  def problems(self) -> list[str]:
    """A line for every rule that matched nothing."""
    return self.skip.problems() + self.rename.problems() + self.adapt.problems()


def _pattern_and_replacement(text: str) -> tuple[str, str]:
  parts = text.split("=>")
  if len(parts) != 2:
    raise UserError(f"config.transfer.rename: {text!r} is not of the form 'pattern=>replacement'")
  pattern, replacement = parts
  try:
    re.sub(pattern, replacement, "")
  except re.error as error:
    raise UserError(f"config.transfer.rename: {text!r} is no replacement by a regex: {error}")
  return pattern, replacement


@dataclasses.dataclass(frozen=True)
class _Parameter:
  """A parameter at a virtual path. layer: its number in a stacked leaf; None in any other leaf."""

  leaf: Any
  layer: int | None

  @property
  def shape(self) -> tuple[int, ...]:
    shape = tuple(self.leaf.shape)
    return shape if self.layer is None else shape[1:]

  @property
  def value(self) -> np.ndarray:
    return _on_host(self.leaf if self.layer is None else self.leaf[self.layer])


def _on_host(leaf: Any) -> np.ndarray:
  """A parameter, also where each process holds a part of it."""
  return sharding.host_rows(leaf) if isinstance(leaf, jax.Array) else np.asarray(leaf)


def _by_virtual_path(params: Params) -> dict[str, _Parameter]:
  """Virtual path -> parameter. Nothing is copied."""
  parameters = {}
  for path, leaf in flatten(params).items():
    paths = virtual_paths(path, leaf)
    is_stacked = paths != [path]
    for layer, virtual_path in enumerate(paths):
      parameters[virtual_path] = _Parameter(leaf, layer if is_stacked else None)
  return parameters


def transfer(
  params: Params, loaded: Params, rules: TransferConfig, matching: vocabulary.Matching | None = None
) -> tuple[Params, list[Entry]]:
  """Transfers the parameters of a checkpoint (`loaded`) into those of a new model (`params`).

  matching: the old rows of each new vocabulary row, where the vocabularies differ.

  Returns the parameters, and the audit with a line for every parameter of every layer. Raises
  UserError with the list of all mismatches that no rule explains and all rules without a match.
  """
  fresh = _by_virtual_path(params)
  saved = _by_virtual_path(loaded)
  patterns = _Rules(rules)
  sources = _new_paths(saved, patterns)
  taken: dict[str, np.ndarray] = {}
  audit: list[Entry] = []
  problems: list[str] = []
  for path, parameter in fresh.items():
    shape = parameter.shape
    # The adapters that config.model.lora_rank asks for start fresh.
    if patterns.skip.match(path) or adapters.is_adapter(path):
      audit.append(Entry(path, "fresh", "", shape))
    elif path not in sources:
      problems.append(_missing(path, shape))
    else:
      source = sources[path]
      if fitted := _fitted(path, parameter, source, saved[source], patterns.adapt, matching):
        taken[path], entry = fitted
        audit.append(entry)
      else:
        problems.append(_misfit(path, shape, saved[source].shape))
  for path, source in sources.items():
    if patterns.skip.match(path):
      audit.append(Entry(source, "dropped", source, saved[source].shape))
    elif path not in fresh:
      problems.append(_without_place(source, saved[source].shape))
  problems += patterns.problems()
  if problems:
    raise UserError("the checkpoint does not fit the model:\n  " + "\n  ".join(_grouped(problems)))
  return _stacked(params, taken), audit


def _missing(path: str, shape: tuple[int, ...]) -> str:
  return f"{path} {shape} is not in the checkpoint (skip it to start it fresh, or rename)"


def _misfit(path: str, shape: tuple[int, ...], saved_shape: tuple[int, ...]) -> str:
  return f"{path} has shape {shape} here and {saved_shape} in the checkpoint (adapt it, or skip it)"


def _without_place(source: str, shape: tuple[int, ...]) -> str:
  return f"{source} {shape} of the checkpoint has no place here (skip it to drop it, or rename)"


def _new_paths(saved: dict[str, _Parameter], rules: _Rules) -> dict[str, str]:
  """Path in the new model -> path in the checkpoint, for every parameter of the checkpoint."""
  sources = {}
  for source in saved:
    path = rules.renamed(source)
    if path in sources:
      raise UserError(f"config.transfer.rename gives {path} to both {sources[path]} and {source}")
    sources[path] = source
  return sources


def _fitted(
  path: str,
  parameter: _Parameter,
  source: str,
  saved: _Parameter,
  adapt: _Patterns,
  matching: vocabulary.Matching | None,
) -> tuple[np.ndarray, Entry] | None:
  """The value that a parameter takes from its source, and its line in the audit.

  None where the shapes differ and no rule says how the value fits.
  """
  shape = parameter.shape
  if matching and path in vocabulary.PATHS:
    value = matching.apply(parameter.value, saved.value)
    return value, Entry(path, "matched", str(matching), shape)
  if saved.shape == shape:
    return saved.value, Entry(path, "copied" if path == source else "renamed", source, shape)
  if len(saved.shape) == len(shape) and adapt.match(path):
    value = _overlap(parameter.value, saved.value)
    return value, Entry(path, "resized", f"{source} {saved.shape}", shape)
  return None


def _overlap(fresh: np.ndarray, loaded: np.ndarray) -> np.ndarray:
  """`fresh`, with the values of `loaded` at the indices that both arrays have."""
  corner = tuple(slice(0, min(a, b)) for a, b in zip(fresh.shape, loaded.shape))
  resized = np.array(fresh)
  resized[corner] = loaded[corner]
  return resized


def _stacked(params: Params, taken: dict[str, np.ndarray]) -> Params:
  """`params` with the values that were taken, by virtual path. Layers are stacked again."""
  result = {}
  for path, leaf in flatten(params).items():
    paths = virtual_paths(path, leaf)
    if not any(virtual_path in taken for virtual_path in paths):
      result[path] = leaf
    elif paths == [path]:
      result[path] = taken[path]
    else:
      layers = []
      for layer, virtual_path in enumerate(paths):
        if virtual_path in taken:
          layers.append(taken[virtual_path])
        else:
          layers.append(_on_host(leaf[layer]))
      result[path] = np.stack(layers)
  return unflatten(result)


_LAYER = re.compile(r"(?<=/layers/)\d+(?=/)")


def _split_at_layer(text: str) -> tuple[str, int | None, str]:
  """The text before the number of a layer, the number, and the text after it.

  Text without such a number is all before it, and the number is None.
  """
  match = _LAYER.search(text)
  if not match:
    return text, None, ""
  return text[: match.start()], int(match[0]), text[match.end() :]


def _join_at_layer(before: str, layers: list[int | None], after: str) -> str:
  """The inverse of `_split_at_layer`, for several layers at once."""
  return before + _span([layer for layer in layers if layer is not None]) + after


def _grouped(lines: list[str]) -> list[str]:
  """Lines that differ only in the number of a layer become one line."""
  groups: dict[tuple[str, str], list[int | None]] = {}
  for line in lines:
    before, layer, after = _split_at_layer(line)
    groups.setdefault((before, after), []).append(layer)
  return [_join_at_layer(before, layers, after) for (before, after), layers in groups.items()]


def _span(numbers: list[int]) -> str:
  """[0, 1, 2, 5] -> "0..2,5"."""
  parts: list[list[int]] = []
  for n in numbers:
    if parts and parts[-1][1] == n - 1:
      parts[-1][1] = n
    else:
      parts.append([n, n])
  return ",".join(str(a) if a == b else f"{a}..{b}" for a, b in parts)


def table(audit: list[Entry]) -> str:
  """The audit for the console: what was not simply copied, and in the last line all by counts.

  Layers with equal entries share a line.
  """
  groups: dict[tuple, list[Entry]] = {}
  for entry in audit:
    if entry.action == "copied":
      continue
    before, _, after = _split_at_layer(entry.path)
    source = "" if entry.source == entry.path else _LAYER.sub("*", entry.source, count=1)
    key = (entry.action, before, after, entry.shape, source)
    groups.setdefault(key, []).append(entry)
  rows = []
  for (action, before, after, shape, source), entries in groups.items():
    layers = [_split_at_layer(entry.path)[1] for entry in entries]
    path = _join_at_layer(before, layers, after)
    size = sum(entry.size for entry in entries)
    rows.append((action, path, "x".join(map(str, shape)), f"{size:,}", source))
  if not rows:
    return f"transfer    {_summary(audit)}"
  headers = ("transfer", "parameter", "shape", "size", "from")
  return f"{tabulate.tabulate(rows, headers=headers)}\n{_summary(audit)}"


def _summary(audit: list[Entry]) -> str:
  """The number of parameters of each action."""
  counts: collections.Counter[str] = collections.Counter()
  sizes: collections.Counter[str] = collections.Counter()
  for entry in audit:
    counts[entry.action] += 1
    sizes[entry.action] += entry.size
  return ", ".join(f"{counts[a]} {a} ({sizes[a]:,} parameters)" for a in counts)
