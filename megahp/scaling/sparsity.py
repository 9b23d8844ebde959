"""Pruning while training, in closed form: the geometric schedule of The Journey Matters (arXiv 2501.12486), which keeps
the same share of the weights at each pruning, in the limit of many prunings.

Its begin and end are shares of the run's *compute*, which falls with the density: 25 % and 75 % are the paper's near
optimum. [closed forms derived; verified in code: tjingrant/sparse-llm-code's configurations]
"""

from __future__ import annotations

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


def _tokens(density: float, begin: float, end: float) -> tuple[float, float, float]:
    """Tokens until the pruning begins, until it ends, and of the run, in those that its compute would be dense."""
    mean = (density - 1) / math.log(density) if density < 1 else 1.0  # density while pruning, from 1 down
    last = begin + (end - begin) / mean
    return begin, last, last + (1 - end) / density
