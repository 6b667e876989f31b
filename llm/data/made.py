"""Made sources: prompts and targets by a rule. No held-out prompt is in the training split."""

import functools
import string

import numpy as np

from llm.core import UserError

TRAIN = 50_000  # records, less those that are held out
VALIDATION = 1_000
LETTERS, COPIED = 16, 8  # letters of a word, and those that are copied


def _addition(rng: np.random.Generator) -> tuple[str, str]:
  """Two numbers of three digits and their sum of four, all filled up with zeros."""
  a, b = rng.integers(0, 1_000, 2)
  return f"{a:03}+{b:03}=", f"{a + b:04}"


def _reversed_addition(rng: np.random.Generator) -> tuple[str, str]:
  """The sum begins with its last digit, so that each digit follows from few (Lee et al. 2023)."""
  prompt, total = _addition(rng)
  return prompt, total[::-1]


def _copying(rng: np.random.Generator) -> tuple[str, str]:
  """Distinct letters, then one of them: the target is what followed it.

  It takes an induction head (Olsson et al. 2022): the distance to what is copied is random.
  """
  word = "".join(rng.permutation(list(string.ascii_lowercase))[:LETTERS])
  start = 1 + rng.integers(LETTERS - COPIED)
  return f"{word}|{word[start - 1]}", word[start : start + COPIED]


KINDS = {"addition": _addition, "reversed_addition": _reversed_addition, "copying": _copying}


@functools.cache
def records(name: str, split: str) -> tuple[dict, ...]:
  """The records of a made source. Raises UserError on an unknown name or split."""
  if name not in KINDS or split not in ("train", "validation"):
    raise UserError(
      f"made:{name}[{split}]: there is {', '.join(KINDS)}, each with train and validation"
    )
  rng = np.random.default_rng(0)  # of both splits: the held-out records are drawn first
  held_out: dict[str, str] = {}
  while len(held_out) < VALIDATION:
    prompt, target = KINDS[name](rng)
    held_out[prompt] = target
  if split == "validation":
    return tuple({"text": prompt, "target": target} for prompt, target in held_out.items())
  drawn = (KINDS[name](rng) for _ in range(TRAIN))
  return tuple(
    {"text": prompt, "target": target} for prompt, target in drawn if prompt not in held_out
  )
