"""Test slopes, correlations and bootstrap intervals."""

from __future__ import annotations

import numpy as np
import pytest

from megahp.diagnose.statistics import correlation, half_interval, interval, resampled, slope, student


def test_slope_and_correlation() -> None:
    x, y = np.array([1.0, 2.0, 4.0]), np.array([1.5, 2.5, 6.0])
    assert slope(x, y) == pytest.approx(np.linalg.lstsq(x[:, None], y, rcond=None)[0][0])
    assert correlation(x, y) == pytest.approx(np.corrcoef(x, y)[0, 1])
    both = np.stack((x, -y))
    assert correlation(both, np.stack((y, y))) == pytest.approx([correlation(x, y), -1.0])
    assert np.isnan(correlation(x[:2], y[:2])) and np.isnan(correlation(np.ones(3), y))


def test_intervals_hold_the_truth_as_often_as_they_say() -> None:
    """For means over batches at one checkpoint, and over checkpoints that differ."""
    random = np.random.default_rng(2)
    for spread in (0.0, 1.0):
        held = []
        for trial in range(200):
            places = spread * random.normal(size=(1 if spread == 0 else 20, 1))
            means = resampled(5 + places + random.normal(size=(len(places), 30)), 300, trial).mean(1)
            low, high = interval(means, 0.9)
            held.append(low < 5 < high)
        assert 0.82 < np.mean(held) < 0.95


def test_an_interval_of_what_means_nothing_is_none() -> None:
    values = np.arange(200.0)
    assert interval(values) == pytest.approx((0.025 * 199, 0.975 * 199))
    values[0] = np.inf
    assert np.isfinite(interval(values)).all()
    values[1:3] = np.nan
    assert np.isnan(interval(values)).all()


def test_a_means_interval_holds_it_as_often_as_it_says() -> None:
    random = np.random.default_rng(3)
    for count in (3, 5):
        draws = random.normal(1.0, 2.0, size=(2000, count))
        held = [abs(values.mean() - 1) < half_interval(values) for values in draws]
        assert np.mean(held) == pytest.approx(0.95, abs=0.015)


def test_students_interval_and_tail() -> None:
    """Against the tables: t of 95 %, two-sided, for 2 and 9 degrees of freedom; nothing is said of two values."""
    assert half_interval([1.0, 2.0, 3.0]) == pytest.approx(4.3027 / 3**0.5, rel=1e-4)
    ten = np.arange(10.0)
    assert half_interval(ten) == pytest.approx(2.2622 * ten.std(ddof=1) / 10**0.5, rel=1e-4)
    assert student(2.1314, 15) == pytest.approx(0.025, rel=1e-3) and student(-1, 3) == pytest.approx(1 - student(1, 3))
    assert np.isnan(half_interval([1.0, 2.0]))
