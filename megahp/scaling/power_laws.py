"""Power laws of Power Lines (arXiv 2505.13738). Its text was not read in full: the constants below come from two or
three independent secondary sources that agree, and can be overridden wherever they are used.

Batches are in tokens here; the paper counts sequences of 2,048 tokens. That the laws hold in tokens at other sequence
lengths is an assumption.
"""

from __future__ import annotations

PAPER_SEQUENCE = 2048

TAU = (1.084, -0.527)  # tau_opt = c TPP^m, R^2 0.975
OPTIMAL_BATCH = (0.0306, 0.383)  # sequences of 2,048 = c D^p, R^2 0.984
CRITICAL_BATCH = (0.0471, 0.462)  # sequences of 2,048 = c D_min^p, R^2 0.940; other fits of the exponent: 0.49 to 0.53


def timescale(lr: float, weight_decay: float, batch: float, tokens: float) -> float:
    """tau = B / (eta lambda D): the share of the run AdamW averages over. lr: the peak, as applied to hidden weights;
    batch and tokens in the same unit. (eq. 2)"""
    return batch / (lr * weight_decay * tokens)


def optimal_timescale(tokens_per_parameter: float, law: tuple[float, float] = TAU) -> float:
    """tau_opt(TPP). (eq. 3)"""
    return law[0] * tokens_per_parameter ** law[1]


def optimal_weight_decay(lr: float, batch: float, tokens: float, parameters: float) -> float:
    """lambda_opt = B / (eta D tau_opt(D / N)); batch and tokens in tokens. (eq. 4)"""
    return batch / (lr * tokens * optimal_timescale(tokens / parameters))


def optimal_batch(tokens: float, law: tuple[float, float] = OPTIMAL_BATCH) -> float:
    """B_opt in tokens, for a run of so many tokens. (eq. 5)"""
    return PAPER_SEQUENCE * law[0] * tokens ** law[1]


def critical_batch(least_tokens: float, law: tuple[float, float] = CRITICAL_BATCH) -> float:
    """B_crit in tokens, D_min the tokens a run of vanishing batch needs for the same loss. (eq. 5)"""
    return PAPER_SEQUENCE * law[0] * least_tokens ** law[1]


def critical_batch_along(tokens: float, law: tuple[float, float] = CRITICAL_BATCH) -> float:
    """(1 + p) a t^p in tokens, after t tokens: the critical batch of whole runs spread along one, so that its mean over
    the run is B_crit(D)."""
    return (1 + law[1]) * critical_batch(tokens, law) if tokens else 0.0


def least_tokens(tokens: float, batch: float, law: tuple[float, float] = CRITICAL_BATCH) -> float:
    """D_min of a run of D tokens at batch B (tokens): the solution of D = D_min (1 + B / B_crit(D_min)), by bisection.
    (eq. 6; the left side grows with D_min, so there is one)"""
    low, high = 0.0, tokens
    for _ in range(200):
        middle = (low + high) / 2
        if middle and middle * (1 + batch / critical_batch(middle, law)) < tokens:
            low = middle
        else:
            high = middle
    return high
