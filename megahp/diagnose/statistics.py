"""Slopes, correlations and bootstrap intervals of what was measured at several checkpoints and batches."""

import numpy as np


def slope(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Of the line through the origin that fits y to x best in least squares, over the last dimension."""
    return (x * y).sum(-1) / (x * x).sum(-1)


def correlation(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Pearson's, over the last dimension; NaN below three points, where it says nothing, and where all are one."""
    x, y = x - x.mean(-1, keepdims=True), y - y.mean(-1, keepdims=True)
    if x.shape[-1] < 3:
        return np.full(x.shape[:-1], np.nan)
    with np.errstate(invalid="ignore"):
        return (x * y).sum(-1) / np.sqrt((x * x).sum(-1) * (y * y).sum(-1))


def resampled(estimates: np.ndarray, draws: int = 1000, seed: int = 0) -> np.ndarray:
    """The bootstrap of means over batches: estimates [places, batches, ...] -> [draws, places, ...], the places (such
    as checkpoints) drawn with replacement, and for each of these its batches."""
    random = np.random.default_rng(seed)
    places, batches = estimates.shape[:2]
    place = random.integers(places, size=(draws, places, 1))
    return estimates[place, random.integers(batches, size=(draws, places, batches))].mean(2)


def interval(values: np.ndarray, level: float = 0.95) -> tuple[float, float]:
    """Where so much of a bootstrap's values [draws] lies, as much of the rest below as above; NaN where more than 1 %
    of them mean nothing."""
    values, tail = np.where(np.isfinite(values), values, np.nan), (1 - level) / 2
    if np.isnan(values).mean() > 0.01:
        return np.nan, np.nan
    low, high = np.nanquantile(values, (tail, 1 - tail))
    return float(low), float(high)
