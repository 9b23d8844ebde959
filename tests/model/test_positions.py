"""Positions: ALiBi and its interpolation."""

from __future__ import annotations

import pytest
import torch

from megahp.model.positions import alibi_slopes


@pytest.mark.parametrize(
    ("heads", "expected"),
    [
        (8, [2.0**-i for i in range(1, 9)]),
        (1, [2.0**-8]),
        (6, [2.0 ** -(2 * i) for i in range(1, 5)] + [2.0**-1, 2.0**-3]),
    ],
)
def test_alibi_slopes(heads: int, expected: list[float]) -> None:
    assert alibi_slopes(heads).tolist() == pytest.approx(expected)


@pytest.mark.parametrize("heads", [8, 12])
def test_alibi_is_interpolated_beyond_the_longest_training_length(heads: int) -> None:
    """check 24: at twice the length all slopes are exactly half; up to the length they stay."""
    slopes = alibi_slopes(heads)
    assert torch.equal(alibi_slopes(heads, 2.0), slopes / 2)
    assert torch.equal(alibi_slopes(heads, 1.0), slopes) and torch.equal(alibi_slopes(heads, 0.25), slopes)
