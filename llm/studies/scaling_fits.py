"""The fits of the scaling laws: power laws, iso-FLOP parabolas, and the parametric loss.

N: parameters. D: tokens of training. C: FLOPs. L: nats a token on held-out text.
"""

import dataclasses
import itertools
from typing import Sequence

import numpy as np
import scipy.optimize
import scipy.special

from llm import blas
from llm.core import UserError

# Of the parametric law: a, b, e, alpha, beta. The best STARTS of the grid are minimised.
GRID = ((0, 5, 10, 20), (0, 5, 10, 20), (-1, 0, 1), (0.1, 0.5, 1), (0.1, 0.5, 1))
STARTS = 12
DELTA = 1e-3  # of the Huber loss of log L (Hoffmann et al. 2022, section 3.3)


@dataclasses.dataclass(frozen=True)
class PowerLaw:
  """L = (scale / x) ** exponent (Kaplan et al. 2020, equations 1.1 to 1.3)."""

  scale: float
  exponent: float

  def __call__(self, x: np.ndarray | float) -> np.ndarray:
    return (self.scale / np.asarray(x, float)) ** self.exponent


def power_law(x: np.ndarray, loss: np.ndarray) -> PowerLaw:
  """Least squares of log L on log x.

  Raises UserError for fewer than 3 distinct x, and where the loss does not fall.
  """
  need(len(np.unique(x)), 3, "a power law", "sizes, lengths or budgets")
  slope, intercept = np.polyfit(np.log(x), np.log(loss), 1)
  if slope > -1e-4:
    raise UserError("a power law needs a loss that falls, and this one does not")
  return PowerLaw(float(np.exp(intercept / -slope)), float(-slope))


@dataclasses.dataclass(frozen=True)
class Parametric:
  """L = E + A / N^alpha + B / D^beta (Hoffmann et al. 2022, equation 2)."""

  E: float
  A: float
  B: float
  alpha: float
  beta: float

  def __call__(self, n: np.ndarray | float, d: np.ndarray | float) -> np.ndarray:
    n = np.asarray(n, float)
    d = np.asarray(d, float)
    # Runs drawn again may have a fit without a minimum, whose constants are 0 or infinite.
    with np.errstate(all="ignore"):
      return self.E + self.A / n**self.alpha + self.B / d**self.beta

  def optimal(self, flops: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(N, D) with the least loss for C = 6 N D FLOPs (Hoffmann et al. 2022, equation 4)."""
    total = self.alpha + self.beta
    ratio = (self.alpha * self.A / (self.beta * self.B)) ** (1 / total)
    budget = np.asarray(flops, float) / 6
    return ratio * budget ** (self.beta / total), budget ** (self.alpha / total) / ratio


def parametric(
  n: np.ndarray, d: np.ndarray, loss: np.ndarray, near: Parametric | None = None
) -> Parametric:
  """The parameters with the least Huber loss of log L, by L-BFGS from a grid of starts.

  Every start is minimised until it converges: the original stopped early, which bent its intervals
  (Besiroglu et al. 2024). near: the only start, for resampled runs. Raises UserError for fewer
  than 6 points, or 3 distinct N or D.
  """
  need(len(loss), 6, "the parametric law", "runs")
  need(min(len(np.unique(n)), len(np.unique(d))), 3, "the parametric law", "sizes and lengths each")
  log_n, log_d, log_loss = np.log(n), np.log(d), np.log(loss)

  def objective(parameters: np.ndarray) -> tuple[float, np.ndarray]:
    """The mean Huber loss and its gradient. parameters: a, b, e, alpha, beta; A = exp(a)."""
    a, b, e, alpha, beta = parameters
    terms = np.stack([a - alpha * log_n, b - beta * log_d, np.full_like(log_n, e)])
    predicted = scipy.special.logsumexp(terms, axis=0)
    shares = np.exp(terms - predicted)
    error = predicted - log_loss
    huber = scipy.special.huber(DELTA, error).mean()
    slope = np.clip(error, -DELTA, DELTA) / len(error)
    gradient = [
      (slope * shares[0]).sum(),
      (slope * shares[1]).sum(),
      (slope * shares[2]).sum(),
      (slope * shares[0] * -log_n).sum(),
      (slope * shares[1] * -log_d).sum(),
    ]
    scale = 1 / DELTA**2  # otherwise the tolerances end it early
    return scale * huber, scale * np.array(gradient)

  starts = list(itertools.product(*GRID))
  if near:
    # A constant that the fit found to be 0 starts at the smallest number that has a logarithm.
    constants = np.maximum((near.A, near.B, near.E), np.finfo(float).tiny)
    starts = [(*np.log(constants), near.alpha, near.beta)]
  ranked = sorted(starts, key=lambda start: objective(np.array(start, float))[0])
  with blas.one_thread():
    fits = [
      scipy.optimize.minimize(
        objective,
        np.array(start, float),
        jac=True,
        method="L-BFGS-B",
        options={"maxiter": 2000, "maxfun": 5000, "ftol": 1e-12, "gtol": 1e-8},
      )
      for start in ranked[:STARTS]
    ]
  a, b, e, alpha, beta = min(fits, key=lambda fit: fit.fun).x
  return Parametric(*(float(v) for v in (np.exp(e), np.exp(a), np.exp(b), alpha, beta)))


def iso_flops(
  n: np.ndarray, d: np.ndarray, loss: np.ndarray, budgets: Sequence[float]
) -> list[tuple[float, float, float]]:
  """(C, N, L) at the minimum of a parabola in log N, for each budget that has one.

  Approach 2 of Hoffmann et al. 2022. The losses of a size are interpolated in log D at C / (6 N).
  A parabola is only right near its minimum: far from it, it shifts the optimum (Besiroglu et al.
  2024 and others), and so does a grid that is not centred on it. Runs of equal N and D (seeds)
  count as one, with their mean loss.
  """
  cells = np.stack([n, d], 1)
  distinct, cell = np.unique(cells, axis=0, return_inverse=True)
  loss = np.bincount(cell.ravel(), loss) / np.bincount(cell.ravel())
  n, d = distinct.T
  minima = []
  for budget in budgets:
    log_n, at_budget = [], []
    for size in np.unique(n):
      of_size = n == size
      order = np.argsort(d[of_size])
      lengths = np.log(d[of_size][order])
      wanted = np.log(budget / (6 * size))
      if len(lengths) > 1 and lengths[0] <= wanted <= lengths[-1]:
        log_n.append(np.log(size))
        at_budget.append(np.interp(wanted, lengths, loss[of_size][order]))
    if len(log_n) < 3:
      continue
    curvature, slope, constant = np.polyfit(log_n, at_budget, 2)
    lowest = -slope / (2 * curvature) if curvature > 0 else np.inf
    if log_n[0] <= lowest <= log_n[-1]:
      minimum = constant - slope**2 / (4 * curvature)
      minima.append((float(budget), float(np.exp(lowest)), float(minimum)))
  return minima


def envelope(
  compute: np.ndarray, n: np.ndarray, loss: np.ndarray
) -> list[tuple[float, float, float]]:
  """(C, N, L) of the runs that no run of as much or less compute beats, by C.

  Approach 1 of Hoffmann et al. 2022, on whole runs instead of training curves, since a curve is not
  at the end of its schedule.
  """
  best = np.inf
  lowest = []
  for i in np.argsort(compute, kind="stable"):
    if loss[i] < best:
      best = loss[i]
      lowest.append((float(compute[i]), float(n[i]), float(loss[i])))
  return lowest


def exponent(points: Sequence[tuple[float, float, float]]) -> float | None:
  """a of N_optimal ~ C^a by least squares; None for fewer than 3 points."""
  if len(points) < 3:
    return None
  compute, size, _ = np.log(np.array(points)).T
  return float(np.polyfit(compute, size, 1)[0])


def need(count: int, least: int, what: str, of: str) -> None:
  """Raises UserError where there are too few points."""
  if count < least:
    raise UserError(f"{what} needs {least} {of} at least, and there are {count}")
