"""What a search draws from: choices and ranges of a key."""

import ast
import dataclasses
import re
from typing import Any, Sequence

import numpy as np

from llm.core import UserError

RANGE = re.compile(r"(uniform|log)\(([^,]+),([^,]+)\)")
FORM = "expected GROUP.KEY=a|b|c, GROUP.KEY=uniform(low,high) or GROUP.KEY=log(low,high)"


@dataclasses.dataclass(frozen=True)
class Dimension:
  """The values of a key. choices: () for a range. log: whether its logarithm is drawn."""

  key: str
  choices: tuple = ()
  low: float = 0.0
  high: float = 0.0
  log: bool = False

  def draw(self, rng: np.random.Generator) -> Any:
    """A random value."""
    if self.choices:
      return self.choices[rng.integers(len(self.choices))]
    return self._at(rng.random())

  def points(self, count: int) -> list[Any]:
    """All choices, or `count` values of the range at equal distances, its ends among them."""
    return list(self.choices) or [self._at(share) for share in np.linspace(0, 1, count)]

  def _at(self, share: float) -> float:
    """The value at a share of the way from low to high, rounded to three digits."""
    if self.log:
      return float(f"{self.low * (self.high / self.low) ** share:.3g}")
    return float(f"{self.low + share * (self.high - self.low):.3g}")

  def design(self, values: Sequence[Any]) -> np.ndarray:
    """Trials x columns for least squares: one a choice, or 1, x and x^2 of a range."""
    if self.choices:
      return np.array([[value == choice for choice in self.choices] for value in values], float)
    x = np.array(values, float)
    x = np.log(x / self.low) / np.log(self.high / self.low) if self.log else x
    x = (x - x.mean()) / max(np.ptp(x), 1e-12)
    return np.stack([np.ones_like(x), x, x**2], axis=1)


def parse(text: str) -> Dimension:
  """The dimension of GROUP.KEY=VALUES. Raises UserError on another form."""
  name, equals, values = (part.strip() for part in text.partition("="))
  if not equals or "." not in name or not values:
    raise UserError(f"config.study.keys: {text!r}: {FORM}")
  if not (match := RANGE.fullmatch(values)):
    return Dimension(name, tuple(_literal(choice.strip()) for choice in values.split("|")))
  try:
    low, high = float(match[2]), float(match[3])
  except ValueError:
    raise UserError(f"config.study.keys: {text!r}: the ends of a range are numbers; {FORM}")
  if not low < high or match[1] == "log" and low <= 0:
    raise UserError(
      f"config.study.keys: {text!r}: a range goes from a lower to a higher number, and that of a "
      "logarithm from one above 0"
    )
  return Dimension(name, (), low, high, match[1] == "log")


def _literal(text: str) -> Any:
  """A number, a bool or a tuple as Python writes it; any other text as it is."""
  try:
    return ast.literal_eval(text)
  except (ValueError, SyntaxError):
    return text
