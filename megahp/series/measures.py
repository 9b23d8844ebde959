"""How good a forecast is: weighted quantile loss, normalised deviation, CRPS, coverage. Missing values do not count.

values: float [...], NaN = missing. A measure is NaN where no value is known, or where it divides by values that are
all 0.
"""

from collections.abc import Sequence

import numpy as np

QUANTILES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)


def weighted_quantile_loss(values: np.ndarray, forecasts: np.ndarray, quantiles: Sequence[float] = QUANTILES) -> float:
    """Return the mean over quantiles of 2 sum_t rho_q(y_t - f_qt) / sum_t |y_t|, rho_q(d) = d (q - [d < 0]).

    forecasts: [quantiles, ...]. (DeepAR, arXiv 1704.04110, section 4.1, where it is called rho-risk)
    """
    known = ~np.isnan(values)
    q = np.asarray(quantiles)[:, None]
    errors = values[known] - forecasts[:, known]  # [quantiles, n]
    return 2 * _ratio(float((errors * (q - (errors < 0))).sum(1).mean()), values[known])


def normalized_deviation(values: np.ndarray, forecast: np.ndarray) -> float:
    """Return sum_t |y_t - f_t| / sum_t |y_t|, f the median."""
    known = ~np.isnan(values)
    return _ratio(float(np.abs(values - forecast)[known].sum()), values[known])


def crps(values: np.ndarray, samples: np.ndarray) -> np.ndarray:
    """Return the CRPS of each value (float64 [...]), in its unit, for the distribution that gives each of the samples
    [n, ...] the same probability: E|X - y| - E|X - X'| / 2. (Gneiting and Raftery 2007, equation 21)"""
    n = len(samples)
    ranks = 2 * np.arange(1, n + 1) - n - 1  # sum_ij |x_i - x_j| = 2 sum_i rank_i x_(i)
    spread = np.tensordot(ranks, np.sort(samples, 0), (0, 0)) / n**2
    return np.abs(samples - values).mean(0) - spread


def coverage(values: np.ndarray, lower: np.ndarray, upper: np.ndarray) -> float:
    """Return the share of values within their intervals, ends included."""
    known = ~np.isnan(values)
    inside = ((lower <= values) & (values <= upper))[known]
    return float(inside.mean()) if inside.size else float("nan")


def _ratio(loss: float, values: np.ndarray) -> float:
    total = float(np.abs(values).sum())
    return loss / total if total else float("nan")
