"""Slopes, correlations and bootstrap intervals over several checkpoints and batches."""

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


T_95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)  # Student's t, two-sided, at 1 to 9 degrees


def half_interval(values: np.ndarray) -> float:
    """Return half of the 95 % interval of the mean of values [runs], by Student's t: 2 to 10 of them, else NaN."""
    count = len(values)
    return T_95[count - 2] * float(np.std(values, ddof=1)) / count**0.5 if 2 <= count <= 10 else np.nan


def interval(values: np.ndarray, level: float = 0.95) -> tuple[float, float]:
    """Return the central interval that holds `level` of a bootstrap's values [draws]; NaN where more than 1 % of them
    are not finite."""
    values, tail = np.where(np.isfinite(values), values, np.nan), (1 - level) / 2
    if np.isnan(values).mean() > 0.01:
        return np.nan, np.nan
    low, high = np.nanquantile(values, (tail, 1 - tail))
    return float(low), float(high)
