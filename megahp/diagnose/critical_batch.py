"""The critical batch from branched training: the largest batch at which a run still loses nothing.

Merrill et al., arXiv 2505.23971; `megahp measure critical-batch` trains the branches.
"""

import math
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

TOLERANCE = 0.01  # nats per token, the paper's
DECAY = 0.5  # the paper's


def smoothed(losses: Iterable[float], decay: float = DECAY) -> float:
    """The exponential average of a branch's losses, one a step, at its end: nats per token.

    It begins at the first loss; each step keeps `decay` of it. Not finite once a loss is not. Raises ValueError where
    there is no loss.
    """
    average: float | None = None
    for loss in losses:
        average = loss if average is None else decay * average + (1 - decay) * loss
    if average is None:
        raise ValueError("a branch without a step has no loss")
    return average


def scatter(losses: Sequence[float], decay: float = DECAY) -> float:
    """The standard deviation `smoothed` has from the noise of single steps, nats per token; NaN for fewer than two.

    An exponential average of independent losses has (1 - decay) / (1 + decay) of their variance, which is half that of
    the differences of neighbours. They are taken from the branch's second half, and are hardly touched by a slow fall.
    """
    differences = np.diff(losses[(len(losses) - 1) // 2 :])
    if not len(differences):
        return math.nan
    return float(np.sqrt(np.mean(differences**2) / 2 * (1 - decay) / (1 + decay)))


def limit(losses: Mapping[float, float], factor: float, tolerance: float = TOLERANCE) -> float:
    """The most a branch may lose: the tolerance above the best of the smaller factors; infinite where there is none.
    A smaller branch that diverged asks for nothing."""
    smaller = [loss for k, loss in losses.items() if k < factor and math.isfinite(loss)]
    return min(smaller, default=math.inf) + tolerance


def harmless(losses: Mapping[float, float], factor: float, tolerance: float = TOLERANCE) -> bool:
    """Whether the branch at this factor has lost nothing: L_k <= L_j + tolerance for every tested j < k. One that
    diverged has."""
    return math.isfinite(losses[factor]) and losses[factor] <= limit(losses, factor, tolerance)


def largest_harmless(losses: Mapping[float, float], tolerance: float = TOLERANCE) -> float:
    """k*, the largest harmless factor: the critical batch is k* times the batch at the checkpoint.

    losses: factor of the batch -> smoothed loss at the branch's end, in nats per token like the tolerance. A larger
    factor may be harmless again after a harmful one, but only within the tolerance of all that are smaller. Raises
    ValueError where factor 1, against which all are measured, is missing or diverged.
    """
    if not math.isfinite(losses.get(1, math.nan)):
        raise ValueError("factor 1 must be there, with a finite loss")
    return max(factor for factor in losses if harmless(losses, factor, tolerance))
