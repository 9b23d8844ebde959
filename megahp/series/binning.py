"""Numbers as digits: evenly spaced intervals, named level by level, from coarse to fine (C2FAR).

A level refines one bin of the level above, so that levels of 12, 12 and 12 bins tell 1,728 intervals apart by 36 ids.
Within an interval the density is uniform; in the first and the last one, which hold all that is beyond too, it is a
Pareto tail. Whatever probabilities a model gives the digits, the density of the numbers then integrates to 1.

Source: C2FAR (NeurIPS 2022) and its code, huaweicloud/c2far_forecasting. There a network gives the tails' exponents;
here they are two constants, fitted to data.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import numpy as np

SHIFTED_START = 0.1  # of a tail whose edge is not above START_TOLERANCE, as in C2FAR's code
START_TOLERANCE = 1e-3  # unverified: C2FAR's code has one, of a value that is not known here
LEAST_EXPONENT = 1.1  # of a fitted tail: its mean, and so the CRPS of a forecast, is finite above 1


@dataclass(frozen=True)
class Binning:
    """Intervals of equal width from low to high, in as many digits as levels.

    levels: bins of each level, the coarsest first, at least 2 each. tails: Pareto exponents of the lower and the upper
    tail.
    """

    levels: tuple[int, ...]
    low: float
    high: float
    tails: tuple[float, float]

    @property
    def intervals(self) -> int:
        return math.prod(self.levels)

    @property
    def width(self) -> float:
        return (self.high - self.low) / self.intervals

    @cached_property
    def edges(self) -> np.ndarray:
        """Where the intervals begin, and where the last one ends (float64 [intervals + 1])."""
        return self.low + (self.high - self.low) * (np.arange(self.intervals + 1) / self.intervals)

    @property
    def starts(self) -> tuple[float, float]:
        """The Pareto tails' scales x0: the inner edges of the first and the last interval, of the first negated; where
        that is not positive, x is shifted, so that x0 is SHIFTED_START."""
        inner = float(-self.edges[1]), float(self.edges[-2])
        below, above = (edge if edge > START_TOLERANCE else SHIFTED_START for edge in inner)
        return below, above

    def intervals_of(self, z: np.ndarray) -> np.ndarray:
        """Return the interval that holds each number (int64), its left edge included; -1 for NaN."""
        index = np.searchsorted(self.edges[1:-1], z, side="right")
        return np.where(np.isnan(z), -1, index)

    def encode(self, z: np.ndarray) -> np.ndarray:
        """Return the digits of numbers, int64 [..., levels], the coarsest first; -1 in all digits of a NaN."""
        index = self.intervals_of(z)
        digits = np.stack(np.unravel_index(np.maximum(index, 0), self.levels), -1)
        return np.where(index[..., None] < 0, -1, digits)

    def decode(self, digits: np.ndarray, u: np.ndarray | float = 0.5) -> np.ndarray:
        """Return the numbers (float64 [...]) at the quantiles u in [0, 1) of their intervals, digits [..., levels]; in
        the first one u counts from its right edge. With uniform u they are samples; NaN where a digit is negative.

        With u = 0.5 a number within [low, high) comes back to half a width, but for the first and the last interval,
        whose median is that of a tail.
        """
        index = np.ravel_multi_index(tuple(np.moveaxis(np.maximum(digits, 0), -1, 0)), self.levels)
        u = np.asarray(u, np.float64)
        # a quantile of the tail's excess y >= 0 beyond the inner edge: P(excess > y) = (1 + y / x0)^-a
        excess = [x0 * np.expm1(-np.log1p(-u) / a) for x0, a in zip(self.starts, self.tails, strict=True)]
        z = self.edges[index] + u * self.width
        z = np.where(index == 0, self.edges[1] - excess[0], z)
        z = np.where(index == self.intervals - 1, self.edges[-2] + excess[1], z)
        return np.where((digits < 0).any(-1), np.nan, z)

    def log_density(self, z: np.ndarray) -> np.ndarray:
        """Return the log density of each number, given its interval (float64): -log(width), or that of a Pareto tail,
        a x0^a / x^(a + 1) with x = x0 at the inner edge. NaN for NaN."""
        excess = self.edges[1] - z, z - self.edges[-2]
        below, above = (
            math.log(a / x0) - (a + 1) * np.log1p(np.maximum(y, 0) / x0)
            for y, x0, a in zip(excess, self.starts, self.tails, strict=True)
        )
        index = self.intervals_of(z)
        inside = np.where(index < 0, np.nan, -math.log(self.width))
        return np.where(index == 0, below, np.where(index == self.intervals - 1, above, inside))


def fit_tails(binning: Binning, parts: Iterable[np.ndarray]) -> tuple[float, float]:
    """Return the exponents of the tails for numbers that come in parts, in any shape; NaNs do not count.

    The most likely exponent of n excesses y is n / sum log(1 + y / x0). One more observation stands for what is known
    before: a tail whose mean excess is the width of an interval, x0 / (a - 1) = width, as without anything beyond.
    """
    counts, logs = [1.0, 1.0], [1 / (1 + x0 / binning.width) for x0 in binning.starts]
    for z in parts:
        index = binning.intervals_of(z)
        beyond = binning.edges[1] - z[index == 0], z[index == binning.intervals - 1] - binning.edges[-2]
        for tail, (excess, x0) in enumerate(zip(beyond, binning.starts, strict=True)):
            counts[tail] += excess.size
            logs[tail] += float(np.log1p(excess / x0).sum())
    lower, upper = (max(LEAST_EXPONENT, n / total) for n, total in zip(counts, logs, strict=True))
    return lower, upper
