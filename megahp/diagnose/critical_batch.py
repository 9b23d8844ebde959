"""The critical batch from branched training: the largest batch at which a run does not lose anything.

Merrill et al., arXiv 2505.23971; `megahp measure critical-batch` trains the branches.
"""

import math
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

TOLERANCE = 0.01  # nats per token; the paper's
DECAY = 0.5  # of the average a step; the paper's


def smoothed(losses: Iterable[float], decay: float = DECAY) -> float:
    """Return the exponential average of a branch's losses, one per step, at its end: nats per token.

    It starts at the first loss, and each step keeps `decay` of it. It is not finite once a loss is not. Raises
    ValueError where there is no loss.
    """
    average: float | None = None
    for loss in losses:
        average = loss if average is None else decay * average + (1 - decay) * loss
    if average is None:
        raise ValueError("a branch without a step has no loss")
    return average


def scatter(losses: Sequence[float], decay: float = DECAY) -> float:
    """Return the standard deviation of `smoothed` from the noise of single steps, nats per token; NaN below two losses.

    An exponential average of independent losses has (1 - decay) / (1 + decay) of their variance, which is half that of
    the differences of neighbours. Differences, of the branch's second half, are hardly affected by a slow fall.
    """
    differences = np.diff(losses[(len(losses) - 1) // 2 :])
    if not len(differences):
        return math.nan
    return float(np.sqrt(np.mean(differences**2) / 2 * (1 - decay) / (1 + decay)))


def limit(losses: Mapping[float, float], factor: float, tolerance: float = TOLERANCE) -> float:
    """Return the highest harmless loss: the tolerance above the best of the smaller factors; infinite where there is
    none. Smaller branches that diverged do not count."""
    smaller = [loss for k, loss in losses.items() if k < factor and math.isfinite(loss)]
    return min(smaller, default=math.inf) + tolerance


def harmless(losses: Mapping[float, float], factor: float, tolerance: float = TOLERANCE) -> bool:
    """Return whether the branch at this factor lost nothing: L_k <= L_j + tolerance for every tested j < k. A branch
    that diverged is harmful."""
    return math.isfinite(losses[factor]) and losses[factor] <= limit(losses, factor, tolerance)


def largest_harmless(losses: Mapping[float, float], tolerance: float = TOLERANCE) -> float:
    """Return k*, the largest harmless factor: the critical batch is k* times the batch at the checkpoint.

    losses: factor of the batch -> smoothed loss at the branch's end, in nats per token, as the tolerance. A larger
    factor may be harmless again after a harmful one, but only within the tolerance of all smaller ones. Raises
    ValueError where factor 1, the reference, is missing or diverged.
    """
    if not math.isfinite(losses.get(1, math.nan)):
        raise ValueError("factor 1 must be there, with a finite loss")
    return max(factor for factor in losses if harmless(losses, factor, tolerance))
