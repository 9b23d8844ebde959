"""Whether things stay where they are while a model grows: the optimum of a hyperparameter, the size of activations.

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
    """Where a curve is least."""

    value: float  # of the hyperparameter
    loss: float
    at_edge: bool  # of the grid: the optimum may lie beyond it


@dataclass(frozen=True)
class Estimate:
    """A number and its 95 % bootstrap interval over the seeds, NaN of one seed."""

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
    """The drift of the mean optimum over a family of two or more sizes, of the same seeds each."""
    logs = np.log2([[each.value for each in curve.optima] for curve in family.values()])
    at = np.log2(list(family))
    return Drift(
        estimate(lambda drawn: np.polyfit(at, drawn.mean(-1), 1)[0] * np.ptp(at), logs),
        estimate(lambda drawn: np.ptp(drawn.mean(-1), axis=0), logs),
    )


def slope(sizes: Sequence[float], values: np.ndarray) -> Estimate:
    """Slope of log value against log size, the value being the mean over the seeds of values [sizes, seeds]."""
    return estimate(lambda drawn: np.polyfit(np.log(sizes), np.log(drawn.mean(-1)), 1)[0], values)


def estimate(statistic: Callable[[np.ndarray], np.ndarray], values: np.ndarray) -> Estimate:
    """A statistic, [sizes, n, seeds] -> [n], of values [sizes, seeds]. Seeds are drawn with replacement, each with all
    its sizes, since these saw the same data."""
    seeds = values.shape[1]
    drawn = np.random.RandomState(0).randint(seeds, size=(RESAMPLES, seeds))
    low, high = np.percentile(statistic(values[:, drawn]), [2.5, 97.5]) if seeds > 1 else (math.nan, math.nan)
    return Estimate(statistic(values[:, None]).item(), float(low), float(high))
