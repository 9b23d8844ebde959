"""Pruning while training in closed form, and RigL's pace.

Pruning follows the geometric schedule of The Journey Matters (arXiv 2501.12486), which keeps the same share of the
weights at each pruning, in the limit of many prunings. Its begin and end are shares of the run's *compute*, which falls
with the density: 25 % and 75 % are the paper's near optimum. [closed forms derived; verified in code:
tjingrant/sparse-llm-code's configurations]
"""

import math

BEGIN, END = 0.25, 0.75


def average_density(density: float, begin: float = BEGIN, end: float = END) -> float:
    """N_avg / N_0, the mean over the tokens of a run that is dense until `begin` of its compute and at `density` from
    `end` on. The loss is that of a dense model of N_avg weights. (the paper's L = E + A / N_avg^alpha + B / D^beta)"""
    return 1 / _tokens(density, begin, end)[2]


def pruning_span(density: float, begin: float = BEGIN, end: float = END) -> tuple[float, float]:
    """Shares of the run's tokens at which the pruning begins and ends."""
    first, last, whole = _tokens(density, begin, end)
    return first / whole, last / whole


def density_at(share: float, density: float, span: tuple[float, float]) -> float:
    """Of the weights, what is left after this share of the run's tokens, where the pruning to `density` has this span
    of them."""
    first, last = span
    return density ** min(max((share - first) / (last - first), 0.0), 1.0)


def replaced_at(share: float, drop: float, end: float) -> float:
    """RigL: share of a matrix's weights that are replaced after this share of the run's tokens: from `drop` down to 0
    at `end`, as a cosine. (arXiv 1911.11134, section 3; verified in code: google-research/rigl)"""
    return drop / 2 * (1 + math.cos(math.pi * min(share / end, 1.0)))


def _tokens(density: float, begin: float, end: float) -> tuple[float, float, float]:
    """Tokens until the pruning begins, until it ends, and of the run, in those that its compute would be dense."""
    mean = (density - 1) / math.log(density) if density < 1 else 1.0  # density while pruning, from 1 down
    last = begin + (end - begin) / mean
    return begin, last, last + (1 - end) / density
