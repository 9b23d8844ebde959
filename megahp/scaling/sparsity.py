"""Closed forms of pruning during training, and of RigL's rate of replacement.

Pruning follows the geometric schedule of The Journey Matters (arXiv 2501.12486), which keeps the same share of the
weights at each pruning, in the limit of many prunings. Its begin and end are shares of the run's *compute*, which falls
with the density: 25 % and 75 % are the paper's near optimum. (The closed forms are derived here; the configurations of
tjingrant/sparse-llm-code verify them.)
"""

import math

BEGIN, END = 0.25, 0.75


def average_density(density: float, begin: float = BEGIN, end: float = END) -> float:
    """Return N_avg / N_0, the mean density over the tokens of a run that is dense until `begin` of its compute and at
    `density` from `end` on.

    Its loss is that of a dense model of N_avg weights. (The paper's L = E + A / N_avg^alpha + B / D^beta)
    """
    return 1 / _tokens(density, begin, end)[2]


def pruning_span(density: float, begin: float = BEGIN, end: float = END) -> tuple[float, float]:
    """Return the shares of the run's tokens at which pruning begins and ends."""
    first, last, whole = _tokens(density, begin, end)
    return first / whole, last / whole


def density_at(share: float, density: float, span: tuple[float, float]) -> float:
    """Return the density after this share of the run's tokens, of a pruning to `density` over this span of shares."""
    first, last = span
    return density ** min(max((share - first) / (last - first), 0.0), 1.0)


def replaced_at(share: float, drop: float, end: float) -> float:
    """Return the share of a matrix's weights that RigL replaces after this share of the run's tokens: a cosine from
    `drop` to 0 at `end`. (arXiv 1911.11134, section 3; verified in code: google-research/rigl)"""
    return drop / 2 * (1 + math.cos(math.pi * min(share / end, 1.0)))


def _tokens(density: float, begin: float, end: float) -> tuple[float, float, float]:
    """Return the tokens until pruning begins, until it ends, and of the run; unit: the run's tokens if it stayed dense
    at the same compute."""
    mean = (density - 1) / math.log(density) if density < 1 else 1.0  # over the compute of a geometric decay
    last = begin + (end - begin) / mean
    return begin, last, last + (1 - end) / density
