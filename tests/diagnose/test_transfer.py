"""Test optima and drifts of synthetic curves."""

from __future__ import annotations

import math

import numpy as np
import pytest

from megahp.diagnose.transfer import Curve, drift, optimum, slope

GRID = [2.0**k for k in range(-10, -3)]


def parabola(at: float, curvature: float = 0.1, least: float = 2.5) -> list[float]:
    """Return losses over the grid whose optimum is 2^at."""
    return [least + curvature * (math.log2(value) - at) ** 2 for value in GRID]


@pytest.mark.parametrize("at", [-8.5, -7.2, -7.0, -5.01])
def test_the_optimum_of_a_parabola_is_found_between_the_points_of_the_grid(at: float) -> None:
    results = optimum(GRID, parabola(at))
    assert math.log2(results.value) == pytest.approx(at, abs=1e-9)
    assert results.loss == pytest.approx(2.5) and not results.at_edge


def test_an_uneven_grid_is_no_matter() -> None:
    values = [0.001, 0.003, 0.02]
    results = optimum(values, [1 + (math.log2(value) + 8) ** 2 for value in values])
    assert math.log2(results.value) == pytest.approx(-8)


@pytest.mark.parametrize(("at", "edge"), [(-11.0, -10), (-3.0, -4)])
def test_an_optimum_at_the_edge_is_said_to_be_there(at: float, edge: float) -> None:
    results = optimum(GRID, parabola(at))
    assert (results.value, results.at_edge) == (2.0**edge, True)


@pytest.mark.parametrize("gone", [math.inf, math.nan])
def test_beside_a_run_that_diverged_the_optimum_is_the_best_point_and_no_edge(gone: float) -> None:
    losses = [*parabola(-5.3)[:5], gone, gone]
    results = optimum(GRID, losses)
    assert (results.value, results.loss, results.at_edge) == (GRID[4], losses[4], False)
    with pytest.raises(ValueError, match="every run diverged"):
        optimum(GRID, [gone] * len(GRID))


def family(rate: float, noise: float = 0.0, seeds: int = 3) -> dict[float, Curve]:
    """Return curves of sizes 2 to 32, whose optimum moves by `rate` octaves per octave."""
    random = np.random.RandomState(1)
    return {
        size: Curve(
            GRID, np.array([parabola(-7 + rate * math.log2(size / 8) + noise * random.randn()) for _ in range(seeds)]).T
        )
        for size in (2.0, 4.0, 8.0, 16.0, 32.0)
    }


@pytest.mark.parametrize("rate", [0.0, -0.5, 0.25])
def test_the_drift_of_exact_curves_is_exact(rate: float) -> None:
    results = drift(family(rate))
    assert vars(results.slope).values() == pytest.approx([4 * rate] * 3, abs=1e-9)
    assert vars(results.spread).values() == pytest.approx([4 * abs(rate)] * 3, abs=1e-9)


def test_the_interval_holds_the_drift_and_is_as_wide_as_the_seeds_scatter() -> None:
    results = drift(family(-0.25, noise=0.2, seeds=20))
    assert results.slope.low < -1 < results.slope.high
    # a seed's slope scatters by 0.2 / sqrt(10) x 4 octaves, the mean of 20 by a root of 20 less
    expected = 2 * 1.96 * 0.2 / math.sqrt(10) * 4 / math.sqrt(20)
    assert results.slope.high - results.slope.low == pytest.approx(expected, rel=0.3)
    assert results.spread.low <= results.spread.value <= results.spread.high


def test_seeds_that_shift_all_sizes_alike_do_not_widen_the_interval() -> None:
    shifts = np.array([-0.5, 0.1, 0.4])
    shifted = {
        size: Curve(GRID, np.array([parabola(-7 + shift) for shift in shifts]).T) for size in (64.0, 128.0, 256.0)
    }
    assert vars(drift(shifted).slope).values() == pytest.approx([0, 0, 0], abs=1e-9)


def test_one_seed_has_no_interval() -> None:
    results = drift(family(0.1, seeds=1))
    assert (
        results.slope.value == pytest.approx(0.4) and math.isnan(results.slope.low) and math.isnan(results.spread.high)
    )


def test_the_slope_of_a_power_law_is_its_exponent() -> None:
    sizes = [64.0, 128.0, 512.0]
    law = np.array([[3 * factor * size**-0.5 for factor in (1.0, 1.2, 0.9, 50.0)] for size in sizes])
    assert vars(slope(sizes, law)).values() == pytest.approx([-0.5] * 3)
