"""Whether an optimum stays where it is while a model grows: losses over a grid of one hyperparameter, a curve a size.

tools/transfer_sweep.py trains the runs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

RESAMPLES = 10_000


@dataclass(frozen=True)
class Optimum:
    """Where a curve is least."""

    value: float  # of the hyperparameter
    loss: float
    at_edge: bool  # of the grid: the optimum may lie beyond it


@dataclass(frozen=True)
class Drift:
    """How far the optimum moves over a family of sizes, in octaves, with 95 % bootstrap intervals over the seeds."""

    slope: float  # of log2 optimum against log2 size, times the family's span in log2 size
    slope_interval: tuple[float, float]
    spread: float  # largest less smallest optimum
    spread_interval: tuple[float, float]


@dataclass(frozen=True)
class Curve:
    """Losses of one model over the grid. losses: [values, seeds], infinite or NaN where a run diverged."""

    values: Sequence[float]
    losses: np.ndarray

    @cached_property
    def optima(self) -> list[Optimum]:
        """One a seed. Raises ValueError where all of a seed's runs diverged."""
        return [optimum(self.values, losses.tolist()) for losses in self.losses.T]

    @property
    def optimum(self) -> float:
        """The geometric mean of the seeds' optima."""
        return float(np.exp2(np.log2([each.value for each in self.optima]).mean()))

    @property
    def at_edge(self) -> bool:
        """Whether any seed's optimum is."""
        return any(each.at_edge for each in self.optima)


def optimum(values: Sequence[float], losses: Sequence[float]) -> Optimum:
    """The least point of the parabola in log2 value through the best point of the grid and its two neighbours.

    values: ascending, positive; losses: one each, infinite or NaN where the run diverged. Beside a neighbour that
    diverged, which no parabola goes through, and at the grid's edge the optimum is the best point itself. Raises
    ValueError where every run diverged.
    """
    known = np.where(np.isnan(losses), np.inf, losses)
    best = int(known.argmin())
    if not math.isfinite(known[best]):
        raise ValueError("every run diverged")
    there = Optimum(float(values[best]), float(known[best]), best in (0, len(values) - 1))
    around = slice(best - 1, best + 2)
    if there.at_edge or not np.isfinite(known[around]).all():
        return there
    offsets = np.log2(values[around]) - math.log2(values[best])
    a, b, c = np.polyfit(offsets, known[around], 2)
    if a <= 0:  # all three equal
        return there
    return Optimum(float(values[best] * 2 ** (-b / (2 * a))), float(c - b * b / (4 * a)), False)


def drift(family: Mapping[float, Curve]) -> Drift:
    """The drift of the mean optimum over a family of two or more sizes, of the same seeds each.

    Seeds are drawn with replacement, each with all its sizes, since these saw the same data. Of one seed there is no
    interval: NaN.
    """
    logs = np.log2([[each.value for each in curve.optima] for curve in family.values()])
    at = np.log2(list(family))
    seeds = logs.shape[1]
    drawn = np.random.RandomState(0).randint(seeds, size=(RESAMPLES, seeds))
    slopes, spreads = _drifts(at, logs[:, drawn].mean(-1))
    slope, spread = _drifts(at, logs.mean(1, keepdims=True))
    return Drift(slope.item(), _interval(slopes, seeds), spread.item(), _interval(spreads, seeds))


def _drifts(at: np.ndarray, logs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Slope times span, and spread, of each column of logs [sizes, n]."""
    return np.polyfit(at, logs, 1)[0] * np.ptp(at), np.ptp(logs, axis=0)


def _interval(values: np.ndarray, seeds: int) -> tuple[float, float]:
    low, high = np.percentile(values, [2.5, 97.5]) if seeds > 1 else (math.nan, math.nan)
    return float(low), float(high)
