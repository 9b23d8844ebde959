"""Learning-rate schedules: the fraction of the peak at a point of the run, counted in tokens."""

from __future__ import annotations

from megahp import config


def fraction(schedule: config.Schedule, tokens: float, horizon: float) -> float:
    """Fraction of the peak learning rate after `tokens` of `horizon` tokens.

    Rises linearly from 0 over the warm-up, then falls linearly to exactly 0 at the horizon (D2Z, arXiv 2502.15938)
    or stays at 1.
    """
    warmup = schedule.warmup * horizon
    if tokens < warmup:
        return tokens / warmup
    if schedule.name == "constant":
        return 1.0
    return max(0.0, (horizon - tokens) / (horizon - warmup)) if horizon > warmup else 0.0
