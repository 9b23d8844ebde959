"""Schedules over tokens."""

from __future__ import annotations

import pytest

from megahp.config import Schedule
from megahp.scaling.schedules import fraction


@pytest.mark.parametrize(
    ("tokens", "expected"), [(0, 0.0), (50, 0.5), (100, 1.0), (550, 0.5), (990, 0.011111), (1000, 0.0)]
)
def test_decay_to_zero_at_known_points(tokens: int, expected: float) -> None:
    assert fraction(Schedule("decay-to-zero", warmup=0.1), tokens, 1000) == pytest.approx(expected, abs=1e-6)


def test_never_negative_beyond_the_horizon() -> None:
    assert fraction(Schedule(), 2000, 1000) == 0.0


def test_constant_stays_at_the_peak() -> None:
    schedule = Schedule("constant", warmup=0.1)
    assert [fraction(schedule, tokens, 1000) for tokens in (50, 100, 999)] == [0.5, 1.0, 1.0]


def test_no_warmup_starts_at_the_peak() -> None:
    assert fraction(Schedule(warmup=0.0), 0, 1000) == 1.0
