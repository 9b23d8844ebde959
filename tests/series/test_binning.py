"""Bins against numerical integration, scipy's Pareto distribution, and sums over every interval, in float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import integrate, stats

from megahp.series.binning import Binning, fit_tails

RANDOM = np.random.default_rng(0)
C2FAR = Binning((4, 10, 10), -0.1, 1.3, (3.0, 5.0))
BINNINGS = [C2FAR, Binning((12, 12, 12), -0.08, 1.2, (40.0, 2.5)), Binning((36,), -0.1, 1.3, (1.5, 1.2))]
BINNINGS += [Binning((2, 3), 0.0, 1.0, (2.0, 9.0))]  # whose lower tail would begin below 0


def probabilities(binning: Binning) -> list[np.ndarray]:
    """Of each level's digits, given those before: [..., bins]."""
    shapes = [binning.levels[: level + 1] for level in range(len(binning.levels))]
    return [RANDOM.dirichlet(np.ones(shape[-1]), shape[:-1]) for shape in shapes]


@pytest.mark.parametrize("binning", BINNINGS)
def test_the_density_integrates_to_one(binning: Binning) -> None:
    """Check 37: whatever a model says of the digits. Every interval is integrated by itself, tails to infinity."""
    conditional = probabilities(binning)

    def density(z: float) -> float:
        digits = binning.encode(np.array(z)).tolist()
        chances = (table[tuple(digits[: level + 1])] for level, table in enumerate(conditional))
        return float(math.prod(chances) * math.exp(binning.log_density(np.array(z))))

    edges = binning.edges
    inside = sum(density(z) for z in (edges[1:-2] + edges[2:-1]) / 2) * binning.width
    tails = [integrate.quad(density, *ends, limit=200)[0] for ends in ((-math.inf, edges[1]), (edges[-2], math.inf))]
    shares = [math.prod(t[tuple(d[: n + 1])] for n, t in enumerate(conditional)) for d in ends_of(binning)]
    assert tails == pytest.approx(shares, rel=1e-6)
    assert inside + sum(tails) == pytest.approx(1, abs=1e-6)


def ends_of(binning: Binning) -> list[list[int]]:
    return [[0] * len(binning.levels), [size - 1 for size in binning.levels]]


def test_width() -> None:
    """Check 37: -5.655."""
    assert C2FAR.intervals == 400
    assert C2FAR.log_density(np.array(0.5)) == pytest.approx(-math.log(1.4 / 400)) == pytest.approx(5.655, abs=5e-4)


@pytest.mark.parametrize("binning", BINNINGS)
def test_round_trip(binning: Binning) -> None:
    """Check 37. The middle of an interval, its left edge and just below its right edge have the same digits, which
    every level refines; decoded, a number is within half a width."""
    edges, inner = binning.edges, slice(1, -1)
    assert edges[[0, -1]].tolist() == [binning.low, binning.high]
    middles = (edges[1:] + edges[:-1]) / 2
    digits = binning.encode(middles)
    assert (digits == [list(np.ndindex(*binning.levels))[n] for n in range(binning.intervals)]).all()
    assert (binning.encode(edges[:-1]) == digits).all() and (
        binning.encode(np.nextafter(edges[1:], -9)) == digits
    ).all()
    assert np.allclose(binning.decode(digits)[inner], middles[inner], rtol=0, atol=1e-12)
    z = RANDOM.uniform(edges[1], edges[-2], 1000)
    assert np.abs(binning.decode(binning.encode(z)) - z).max() <= binning.width / 2 + 1e-12
    beyond = np.array([-1e9, binning.low - 1e-9, binning.high, 1e9])
    assert (binning.encode(beyond) == [ends_of(binning)[n] for n in (0, 0, 1, 1)]).all()
    with_missing = np.array([np.nan, 0.5])
    assert (binning.encode(with_missing)[0] == -1).all() and (binning.encode(with_missing)[1] >= 0).all()
    assert np.isnan(binning.decode(binning.encode(with_missing))).tolist() == [True, False]
    assert np.isnan(binning.log_density(with_missing)).tolist() == [True, False]


@pytest.mark.parametrize("binning", BINNINGS)
def test_tails_are_scipys(binning: Binning) -> None:
    """Density and quantiles: x = x0 + excess is Pareto."""
    u, excess = np.linspace(0, 0.99, 50), np.linspace(0, 3, 50)
    below, above = (stats.pareto(a, scale=x0) for a, x0 in zip(binning.tails, binning.starts, strict=True))
    first, last = ends_of(binning)
    lower, upper = binning.starts
    inner = binning.edges[[1, -2]]
    assert np.allclose(binning.decode(np.array(first), u), inner[0] - (below.ppf(u) - lower))
    assert np.allclose(binning.decode(np.array(last), u), inner[1] + (above.ppf(u) - upper))
    assert np.allclose(binning.log_density(inner[0] - excess[1:]), below.logpdf(lower + excess[1:]))
    assert np.allclose(binning.log_density(inner[1] + excess), above.logpdf(upper + excess))
    assert binning.starts[1] == binning.edges[-2]
    assert binning.starts[0] == (-binning.edges[1] if binning.edges[1] < -1e-3 else 0.1)


def test_fitted_tails() -> None:
    """Against scipy's fit of the same excesses; and without any, a mean excess of one width."""
    x0 = C2FAR.starts
    excess = [stats.pareto(a, scale=s).rvs(4000, random_state=1) - s for a, s in zip((4.0, 7.0), x0, strict=True)]
    z = np.concatenate((C2FAR.edges[1] - excess[0] - 1e-12, C2FAR.edges[-2] + excess[1], [0.5, np.nan]))
    fitted = fit_tails(C2FAR, np.split(z.astype(np.float64), [1000, 5000]))
    wanted = [stats.pareto.fit(e + s, floc=0, fscale=s)[0] for e, s in zip(excess, x0, strict=True)]
    assert fitted == pytest.approx(wanted, rel=2e-3)
    for a, s in zip(fit_tails(C2FAR, [np.full(3, 0.5)]), x0, strict=True):
        assert stats.pareto(a, scale=s).mean() - s == pytest.approx(C2FAR.width)
    heavy = C2FAR.edges[-2] + np.full(99, 1e6)
    assert fit_tails(C2FAR, [heavy])[1] == 1.1
