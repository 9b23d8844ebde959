"""Slopes, correlations, and intervals: by bootstrap over checkpoints and batches, by Student's t over seeds."""

import math
from collections.abc import Sequence

import numpy as np


def slope(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Return the slope of the least-squares line through the origin, over the last dimension."""
    return (x * y).sum(-1) / (x * x).sum(-1)


def correlation(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Return Pearson's correlation over the last dimension; NaN below three points, where it is always +-1 or
    undefined, and for a constant."""
    if x.shape[-1] < 3:
        return np.full(x.shape[:-1], np.nan)
    x, y = x - x.mean(-1, keepdims=True), y - y.mean(-1, keepdims=True)
    with np.errstate(invalid="ignore"):
        return (x * y).sum(-1) / np.sqrt((x * x).sum(-1) * (y * y).sum(-1))


def resampled(estimates: np.ndarray, draws: int = 1000, seed: int = 0) -> np.ndarray:
    """Return bootstrap draws of means over batches: [checkpoints, batches, ...] -> [draws, checkpoints, ...].

    Checkpoints are drawn with replacement, and for each of them its batches.
    """
    random = np.random.default_rng(seed)
    checkpoints, batches = estimates.shape[:2]
    checkpoint = random.integers(checkpoints, size=(draws, checkpoints, 1))
    return estimates[checkpoint, random.integers(batches, size=(draws, checkpoints, batches))].mean(2)


def interval(values: np.ndarray, level: float = 0.95) -> tuple[float, float]:
    """Return the central interval that holds `level` of a bootstrap's values [draws]; NaN where more than 1 % of them
    are not finite."""
    values, tail = np.where(np.isfinite(values), values, np.nan), (1 - level) / 2
    if np.isnan(values).mean() > 0.01:
        return np.nan, np.nan
    low, high = np.nanquantile(values, (tail, 1 - tail))
    return float(low), float(high)


def student(x: float, freedom: int) -> float:
    """Return P(T > x) of Student's t, by the trapezoid rule."""
    grid = np.linspace(0, abs(x), 20_001)
    density = (1 + grid**2 / freedom) ** (-(freedom + 1) / 2)
    scale = math.gamma((freedom + 1) / 2) / math.gamma(freedom / 2) / math.sqrt(freedom * math.pi)
    tail = 0.5 - scale * float(np.trapezoid(density, grid))
    return tail if x >= 0 else 1 - tail


def half_interval(values: Sequence[float] | np.ndarray) -> float:
    """Return half of the 95 % interval of a mean, by Student's t; NaN of fewer than three values."""
    freedom = len(values) - 1
    if freedom < 2:
        return math.nan
    low, high = 0.0, 1000.0  # of t at a tail of 2.5 %
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if student(middle, freedom) > 0.025 else (low, middle)
    return high * float(np.std(values, ddof=1)) / math.sqrt(len(values))
