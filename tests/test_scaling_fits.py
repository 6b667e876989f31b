"""Fits of scaling laws recover what was planted, the published refit among it."""

import pathlib

import numpy as np
import pytest

from llm.core import UserError
from llm.studies import scaling_fits

GOLDEN = pathlib.Path(__file__).parent / "golden"

# Chinchilla as published, and refitted (Hoffmann et al. 2022; Besiroglu et al. 2024).
PUBLISHED = scaling_fits.Parametric(1.69, 406.4, 410.7, 0.34, 0.28)
REFIT = scaling_fits.Parametric(1.8172, 482.01, 2085.43, 0.3478, 0.3658)


def grid(noise, seed=0, law=REFIT):
  """Runs over the sizes and lengths of Chinchilla's: 44 M to 16 B parameters."""
  rng = np.random.default_rng(seed)
  n, d = (a.ravel() for a in np.meshgrid(np.geomspace(44e6, 16e9, 12), np.geomspace(3e8, 3e11, 12)))
  return n, d, law(n, d) * np.exp(noise * rng.standard_normal(len(n)))


@pytest.mark.parametrize("law", [PUBLISHED, REFIT])
def test_the_parametric_law_is_recovered(law):
  found = scaling_fits.parametric(*grid(0.0, law=law))
  assert found.E == pytest.approx(law.E, rel=2e-3)
  assert found.alpha == pytest.approx(law.alpha, rel=5e-3)
  assert found.beta == pytest.approx(law.beta, rel=5e-3)
  assert found.A == pytest.approx(law.A, rel=0.1)
  assert found.B == pytest.approx(law.B, rel=0.1)


def test_the_published_runs_give_the_published_refit():
  """Within two of its standard errors (Besiroglu et al. 2024, table 1), without five outliers."""
  flops, n, loss = np.loadtxt(GOLDEN / "chinchilla.txt").T * [[1e18], [1e6], [1]]
  d = flops / (6 * n)
  fitted = np.argsort(d / n)[5:]
  found = scaling_fits.parametric(n[fitted], d[fitted], loss[fitted])
  assert found.E == pytest.approx(REFIT.E, abs=2 * 0.03)
  assert found.A == pytest.approx(REFIT.A, abs=2 * 124.58)
  assert found.B == pytest.approx(REFIT.B, abs=2 * 1293.23)
  assert found.alpha == pytest.approx(REFIT.alpha, abs=2 * 0.02)
  assert found.beta == pytest.approx(REFIT.beta, abs=2 * 0.02)
  # The five outliers alone would change the law.
  assert scaling_fits.parametric(n, d, loss).beta > found.beta + 0.02


def test_noise_moves_it_little_and_outliers_less_than_squares_would():
  n, d, loss = grid(0.003)
  loss[::37] *= 1.3
  found = scaling_fits.parametric(n, d, loss)
  assert found.alpha == pytest.approx(REFIT.alpha, abs=0.05)
  assert found.beta == pytest.approx(REFIT.beta, abs=0.05)


def test_the_optimum_is_that_of_a_search():
  """Beside a search over N: and 20 tokens a parameter at Chinchilla's budget, by the refit."""
  budget = 5.76e23
  n, d = REFIT.optimal(budget)
  sizes = np.geomspace(1e9, 1e12, 20_001)
  searched = sizes[np.argmin(REFIT(sizes, budget / (6 * sizes)))]
  assert n == pytest.approx(searched, rel=1e-3)
  assert 6 * n * d == pytest.approx(budget)
  assert 15 < d / n < 30


def test_three_approaches_agree_on_the_exponent():
  """a = beta / (alpha + beta) of N ~ C^a: 0.513 by the refit."""
  n, d, loss = grid(0.0)
  expected = REFIT.beta / (REFIT.alpha + REFIT.beta)
  budgets = np.geomspace(1e20, 1e22, 7)
  by_parabolas = scaling_fits.exponent(scaling_fits.iso_flops(n, d, loss, budgets))
  noise = 0.002 * np.random.default_rng(0).standard_normal(len(loss))
  seeds = [np.tile(n, 2), np.tile(d, 2), np.concatenate([loss * (1 + noise), loss * (1 - noise)])]
  of_seeds = scaling_fits.exponent(scaling_fits.iso_flops(*seeds, budgets))
  assert of_seeds == pytest.approx(by_parabolas, abs=1e-6)
  by_envelope = scaling_fits.exponent(scaling_fits.envelope(6 * n * d, n, loss))
  assert by_parabolas == pytest.approx(expected, abs=0.05)
  assert by_envelope == pytest.approx(expected, abs=0.1)


def test_a_power_law_is_recovered():
  x = np.geomspace(1e5, 1e9, 9)
  found = scaling_fits.power_law(x, (8.8e13 / x) ** 0.076)
  assert found.exponent == pytest.approx(0.076) and found.scale == pytest.approx(8.8e13)
  np.testing.assert_allclose(found(x), (8.8e13 / x) ** 0.076)


@pytest.mark.parametrize("count", [2, 5])
def test_too_few_points_say_how_many_are_needed(count):
  n, d, loss = (a[:count] for a in grid(0.0))
  with pytest.raises(UserError, match="needs 6 runs at least, and there are"):
    scaling_fits.parametric(n, d, loss)
