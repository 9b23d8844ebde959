"""Test the rule for the critical batch on synthetic losses."""

from __future__ import annotations

import math

import numpy as np
import pytest

from megahp.diagnose.critical_batch import harmless, largest_harmless, limit, scatter, smoothed


def test_smoothed_is_the_exponential_average_at_the_end() -> None:
    assert smoothed([4.0]) == 4.0
    assert smoothed([4.0, 2.0, 1.0]) == 0.25 * 4 + 0.25 * 2 + 0.5 * 1
    losses = np.random.default_rng(0).normal(3, 0.1, 50)
    weights = 0.1 * 0.9 ** np.arange(49, -1, -1)
    weights[0] = 0.9**49
    assert weights.sum() == pytest.approx(1)
    assert smoothed(losses, decay=0.9) == pytest.approx(weights @ losses, rel=1e-12)


def test_smoothed_is_not_finite_once_a_loss_is_not() -> None:
    assert math.isnan(smoothed([1.0, math.nan, 1.0]))
    assert smoothed([1.0, math.inf, 1.0]) == math.inf
    with pytest.raises(ValueError, match="without a step"):
        smoothed([])


@pytest.mark.parametrize("decay", [0.5, 0.9])
def test_scatter_is_the_standard_deviation_of_the_smoothed_loss(decay: float) -> None:
    """Over 2,000 branches of falling losses with independent noise, to 5 % (standard error 1.6 %)."""
    noise = np.random.default_rng(2).normal(0, 0.1, (2000, 100))
    branches = np.linspace(4, 3, 100) + noise
    truth = np.std([smoothed(branch, decay) for branch in branches])
    assert np.sqrt(np.mean([scatter(branch, decay) ** 2 for branch in branches])) == pytest.approx(truth, rel=0.05)
    assert scatter([3.0, 3.0]) == 0 and math.isnan(scatter([3.0]))


CASES = {
    "all harmless": ([3.0, 3.0, 2.99, 2.98], 8),
    "grows": ([3.0, 3.004, 3.008, 3.02], 4),
    "none above 1": ([3.0, 3.011, 3.02, 3.03], 1),
    "measured against the best so far, not the first": ([3.0, 2.98, 2.995, 2.989], 8),
    "harmful against the best so far, though not against the first": ([3.0, 2.98, 2.995, 2.991], 2),
    "a dip after a bump within the tolerance of all": ([3.0, 3.05, 3.009, 3.05], 4),
    "a dip after a bump that is not": ([3.0, 3.05, 3.02, 3.011], 1),
    "NaN is harmful": ([3.0, 3.0, math.nan, math.nan], 2),
    "infinity is harmful": ([3.0, 3.0, 3.0, math.inf], 4),
    "one that diverged asks nothing of a larger one": ([3.0, math.nan, 3.005, math.inf], 4),
}


@pytest.mark.parametrize(("losses", "expected"), CASES.values(), ids=CASES)
def test_the_rule(losses: list[float], expected: float) -> None:
    """Check 35."""
    table = dict(zip((1.0, 2.0, 4.0, 8.0), losses, strict=True))
    assert largest_harmless(table, tolerance=0.01) == expected
    assert largest_harmless(dict(reversed(table.items())), tolerance=0.01) == expected


def test_a_tie_with_the_limit_is_harmless() -> None:
    losses = {1.0: 3.0, 2.0: 3.25, 4.0: 3.25 + 1e-12}
    assert limit(losses, 4, 0.25) == 3.25 and limit(losses, 1, 0.25) == math.inf
    assert [harmless(losses, factor, 0.25) for factor in losses] == [True, True, False]
    assert largest_harmless(losses, 0.25) == 2
    assert largest_harmless({1: 3.0, 2: 3.0, 4: 3.0}, 0.0) == 4
    assert not harmless({1: math.inf}, 1)  # no tie with the infinite limit


def test_equal_to_the_rule_written_out() -> None:
    """L_{k*} <= L_k + tolerance for every tested k < k*, on 500 random curves."""
    random = np.random.default_rng(1)
    for _ in range(500):
        losses = dict(zip((1, 1.5, 2, 3, 4, 8), random.normal(3, 0.02, 6), strict=True))
        allowed = [k for k in losses if all(losses[k] <= losses[j] + 0.01 for j in losses if j < k)]
        assert largest_harmless(losses, 0.01) == max(allowed)


@pytest.mark.parametrize("losses", [{}, {2: 3.0, 4: 3.0}, {1: math.nan, 2: 3.0}])
def test_without_factor_1_there_is_no_answer(losses: dict[float, float]) -> None:
    with pytest.raises(ValueError, match="factor 1"):
        largest_harmless(losses)
