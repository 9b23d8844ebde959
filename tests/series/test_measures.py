"""Measures against their definitions in loops, closed forms of known distributions, and integrals."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import integrate, stats

from megahp.series.measures import QUANTILES, coverage, crps, normalized_deviation, weighted_quantile_loss

RANDOM = np.random.default_rng(3)
VALUES = RANDOM.normal(2, 1, (3, 4))
VALUES[1, 2] = np.nan
FORECASTS = np.sort(RANDOM.normal(2, 1, (len(QUANTILES), 3, 4)), 0)
KNOWN = [place for place in np.ndindex(3, 4) if place != (1, 2)]


def test_weighted_quantile_loss() -> None:
    total = sum(abs(VALUES[place]) for place in KNOWN)
    losses = []
    for q, forecast in zip(QUANTILES, FORECASTS, strict=True):
        errors = [VALUES[place] - forecast[place] for place in KNOWN]
        losses.append(2 * sum(q * e if e > 0 else (q - 1) * e for e in errors) / total)
    assert weighted_quantile_loss(VALUES, FORECASTS) == pytest.approx(sum(losses) / len(losses))
    median = FORECASTS[QUANTILES.index(0.5)]
    deviation = sum(abs(VALUES[place] - median[place]) for place in KNOWN) / total
    assert normalized_deviation(VALUES, median) == pytest.approx(deviation)
    assert weighted_quantile_loss(VALUES, median[None], [0.5]) == pytest.approx(deviation)  # twice half the error
    assert math.isnan(normalized_deviation(np.zeros(3), np.ones(3))) and math.isnan(crps(np.array(np.nan), np.ones(3)))


def test_crps() -> None:
    """The integral of (F - [x >= y])^2; all pairs; and the normal distribution's closed form, for many samples."""
    samples = RANDOM.normal(size=(7, 2))
    values = np.array([0.3, -2.0])
    found = crps(values, samples)
    for n in range(2):
        x, y = samples[:, n], values[n]
        pairs = np.abs(x[:, None] - x).mean() / 2
        assert found[n] == pytest.approx(np.abs(x - y).mean() - pairs, rel=1e-12)
        points = sorted([*x, y])
        whole = sum(
            integrate.quad(lambda t, x=x, y=y: ((x <= t).mean() - (y <= t)) ** 2, a, b)[0]
            for a, b in zip(points, points[1:], strict=False)
        )
        assert found[n] == pytest.approx(whole, rel=1e-6)
    normal, y = stats.norm.ppf((np.arange(20000) + 0.5) / 20000), 0.7
    closed = y * (2 * stats.norm.cdf(y) - 1) + 2 * stats.norm.pdf(y) - 1 / math.sqrt(math.pi)
    assert crps(np.array(y), normal) == pytest.approx(closed, rel=1e-3)


def test_coverage() -> None:
    values = np.array([1.0, 2.0, 3.0, np.nan, 5.0])
    assert coverage(values, np.array([1.0, 0, 4, 0, 0]), np.array([1.0, 1.9, 9, 9, 9])) == 0.5
    assert math.isnan(coverage(np.array([np.nan]), np.zeros(1), np.ones(1)))
