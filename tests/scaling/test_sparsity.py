"""The pace of pruning and of RigL, against the numbers of papers.md 7d and the formulas of the papers."""

from __future__ import annotations

import math

import numpy as np
import pytest

from megahp.scaling.sparsity import average_density, density_at, pruning_span, replaced_at


@pytest.mark.parametrize(
    ("sparsity", "average", "begin", "end"),
    [
        (0.2, 0.8926, 0.2231, 0.7211),
        (0.4, 0.7662, 0.1915, 0.6808),
        (0.5, 0.6929, 0.1732, 0.6535),
        (0.6, 0.6103, 0.1526, 0.6186),
        (0.8, 0.3991, 0.0998, 0.5012),
    ],
)
def test_pruning_from_25_to_75_percent_of_compute(sparsity: float, average: float, begin: float, end: float) -> None:
    """Check 28."""
    assert average_density(1 - sparsity) == pytest.approx(average, abs=1e-4)
    assert pruning_span(1 - sparsity) == pytest.approx((begin, end), abs=1e-4)


@pytest.mark.parametrize(
    ("steps", "sparsity", "first", "last", "average"),
    [(72_200, 0.5, 12_500, 47_200, 0.6929), (26_800, 0.6, 4_100, 16_600, 0.6103)],
)
def test_pruning_takes_the_middle_half_of_the_compute(
    steps: int, sparsity: float, first: int, last: int, average: float
) -> None:
    """Check 28: the paper's 1B and 70M runs, pruned every 100 steps; compute is density x tokens."""
    span = pruning_span(1 - sparsity)
    assert span == pytest.approx((first / steps, last / steps), abs=1e-3)
    changes = [density_at(step / steps, 1 - sparsity, span) for step in range(0, steps, 100)]
    density = np.minimum.accumulate(np.repeat(changes, 100))
    assert (np.diff(density) <= 0).all() and density[0] == 1 and density[-1] == pytest.approx(1 - sparsity, rel=1e-12)
    late = 50 * sparsity / steps  # what falls at once has been due for half of 100 steps, on average
    assert density.mean() - late == pytest.approx(average, abs=1e-4)
    spent = density.cumsum() / density.sum()
    begins, ends = np.flatnonzero(density < 1)[0], np.flatnonzero(density == density[-1])[0]
    assert (spent[begins], spent[ends]) == (pytest.approx(0.25, abs=2e-3), pytest.approx(0.75, abs=2e-3))
    kept = np.divide(changes[1:], changes[:-1])[begins // 100 : ends // 100 - 1]
    assert kept.max() - kept.min() < 1e-12  # of the weights there are, the same share each time


def test_rigl_slows_down_as_a_cosine() -> None:
    assert [replaced_at(share, 0.3, 0.75) for share in (0, 0.375, 0.75, 1)] == pytest.approx(
        [0.3, 0.15, 0, 0], abs=1e-15
    )
    assert replaced_at(0.25, 0.3, 0.75) == pytest.approx(0.15 * (1 + math.cos(math.pi / 3)))
    assert replaced_at(0.8, 0.3, 0.75) == 0
