"""Whether quantities stay constant as a model grows: the optimum of a hyperparameter, the size of activations.

`megahp transfer-sweep` and `megahp coordinate-check` measure them.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

RESAMPLES = 10_000


@dataclass(frozen=True)
class Optimum:
    """The minimum of a curve."""

    value: float  # of the hyperparameter
    loss: float
    at_edge: bool  # of the grid: the optimum may lie beyond it


@dataclass(frozen=True)
class Estimate:
    """A number and its 95 % bootstrap interval over the seeds, NaN for a single seed."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Drift:
    """How far the optimum moves over a family of sizes, in octaves."""

    slope: Estimate  # of log2 optimum against log2 size, times the family's span in log2 size
    spread: Estimate  # largest less smallest optimum


@dataclass(frozen=True)
class Curve:
    """Losses of one model over the grid. losses: [values, seeds], infinite or NaN where a run diverged."""

    values: Sequence[float]
    losses: np.ndarray

    @cached_property
    def optima(self) -> list[Optimum]:
        """One per seed. Raises ValueError where all of a seed's runs diverged."""
        return [optimum(self.values, losses.tolist()) for losses in self.losses.T]

    @property
    def optimum(self) -> float:
        """The geometric mean of the seeds' optima."""
        return float(np.exp2(np.log2([seed.value for seed in self.optima]).mean()))

    @property
    def beyond(self) -> list[float]:
        """The next value of the grid, by its own step, at each end where a seed's optimum is."""
        if len(self.values) < 2:
            return []
        ends = (self.values[0], self.values[1]), (self.values[-1], self.values[-2])
        best = {each.value for each in self.optima if each.at_edge}
        return [end**2 / inner for end, inner in ends if end in best]

    @property
    def diverged(self) -> int:
        """How many runs did."""
        return int((~np.isfinite(self.losses)).sum())


def optimum(values: Sequence[float], losses: Sequence[float]) -> Optimum:
    """Return the minimum of the parabola in log2 value through the best point of the grid and its two neighbours.

    values: ascending, positive; losses: one each, infinite or NaN where the run diverged. At the grid's edge, or beside
    a neighbour that diverged, through which there is no parabola, it is the best point itself. Raises ValueError where
    every run diverged.
    """
    known = np.where(np.isnan(losses), np.inf, losses)
    best = int(known.argmin())
    if not math.isfinite(known[best]):
        raise ValueError("every run diverged")
    on_grid = Optimum(float(values[best]), float(known[best]), best in (0, len(values) - 1))
    three = slice(best - 1, best + 2)
    if on_grid.at_edge or not np.isfinite(known[three]).all():
        return on_grid
    offsets = np.log2(values[three]) - math.log2(values[best])
    a, b, c = np.polyfit(offsets, known[three], 2)
    if a <= 0:  # all three equal
        return on_grid
    return Optimum(float(values[best] * 2 ** (-b / (2 * a))), float(c - b * b / (4 * a)), False)


def drift(family: Mapping[float, Curve]) -> Drift:
    """Return the drift of the mean optimum over a family of two or more sizes, with the same seeds at each."""
    optima = np.log2([[seed.value for seed in curve.optima] for curve in family.values()])
    sizes = np.log2(list(family))
    return Drift(
        estimate(lambda drawn: np.polyfit(sizes, drawn.mean(-1), 1)[0] * np.ptp(sizes), optima),
        estimate(lambda drawn: np.ptp(drawn.mean(-1), axis=0), optima),
    )


def slope(sizes: Sequence[float], values: np.ndarray) -> Estimate:
    """Return the slope of log value against log size, the value being the mean over seeds of values [sizes, seeds]."""
    return estimate(lambda drawn: np.polyfit(np.log(sizes), np.log(drawn.mean(-1)), 1)[0], values)


def estimate(statistic: Callable[[np.ndarray], np.ndarray], values: np.ndarray) -> Estimate:
    """Return a statistic, [sizes, n, seeds] -> [n], of values [sizes, seeds] and its bootstrap interval.

    Seeds are drawn with replacement, each with all of its sizes, since these were trained on the same data.
    """
    seeds = values.shape[1]
    drawn = np.random.RandomState(0).randint(seeds, size=(RESAMPLES, seeds))
    low, high = np.percentile(statistic(values[:, drawn]), [2.5, 97.5]) if seeds > 1 else (math.nan, math.nan)
    return Estimate(statistic(values[:, None]).item(), float(low), float(high))
