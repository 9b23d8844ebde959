"""Pruning's closed forms against the paper's schedule, prune by prune."""

from __future__ import annotations

import pytest

from megahp.scaling import loss_laws
from megahp.scaling.sparsity import average_density, pruning_span


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
    ("steps", "first", "last", "sparsity", "average", "shares"),
    [(72_200, 12_500, 47_200, 0.5, 0.6929, (0.2499, 0.7501)), (26_800, 4_100, 16_600, 0.6, 0.6105, (0.2506, 0.7506))],
)
def test_the_papers_runs(
    steps: int, first: int, last: int, sparsity: float, average: float, shares: tuple[float, float]
) -> None:
    """Check 28: the two published configurations, pruned every 100 steps to the same share each time; other shares of
    compute than a quarter and three quarters give their schedules back too."""
    prunings = (last - first) // 100 + 1
    density = [
        (1 - sparsity) ** (min(max(0, (step - first) // 100 + 1), prunings) / prunings) if step >= first else 1.0
        for step in range(steps)
    ]
    compute = sum(density)
    assert compute / steps == pytest.approx(average, abs=1e-3)
    found = sum(density[:first]) / compute, sum(density[:last]) / compute
    assert found == pytest.approx(shares, abs=1e-3)
    assert pruning_span(1 - sparsity, *found) == pytest.approx((first / steps, last / steps), abs=1e-3)
    assert average_density(1 - sparsity, *found) == pytest.approx(compute / steps, abs=1e-3)


def test_a_dense_run_has_chinchillas_loss() -> None:
    """Check 29."""
    law = loss_laws.LOSS_LAWS["hoffmann"]
    assert average_density(1.0) == 1.0 and law(1e9 * average_density(1.0), 2e10) == law(1e9, 2e10)
    assert pruning_span(1.0) == (0.25, 0.75)
