"""The power laws of Power Lines (arXiv 2505.13738).

Its text was not read in full: the constants come from two or three independent secondary sources that agree, and can
be overridden wherever they are used. Batches are in tokens here; the paper counts sequences of 2,048 tokens. That the
laws hold in tokens at other sequence lengths is an assumption, unverified.
"""

from megahp.scaling.laws import PowerLaw, increasing_root

PAPER_SEQUENCE = 2048
_PAPER = "Power Lines, arXiv 2505.13738"
_AGREE = "secondary source: {} that agree; the paper's text was not read in full"

# tau_opt = c TPP^m, R^2 0.975
TAU = PowerLaw(1.084, -0.527, f"{_PAPER}, eq. 3", _AGREE.format("3"), fitted=(20, 1280))
# tokens of a batch = c D^p, R^2 0.984
OPTIMAL_BATCH = PowerLaw(PAPER_SEQUENCE * 0.0306, 0.383, f"{_PAPER}, eq. 5", _AGREE.format("2"), fitted=(2e9, 1e11))
# tokens of a batch = c D_min^p, R^2 0.940; other fits of the exponent: 0.49 to 0.53
CRITICAL_BATCH = PowerLaw(PAPER_SEQUENCE * 0.0471, 0.462, f"{_PAPER}, eq. 5", _AGREE.format("2"), fitted=(2e9, 1e11))


def timescale(lr: float, weight_decay: float, batch: float, tokens: float) -> float:
    """Return tau = B / (eta lambda D), the share of the run AdamW averages over. (eq. 2)

    lr: the peak, as applied to hidden weights; batch and tokens in the same unit.
    """
    return batch / (lr * weight_decay * tokens)


def optimal_weight_decay(lr: float, batch: float, tokens: float, parameters: float, law: PowerLaw = TAU) -> float:
    """Return lambda_opt = B / (eta D tau_opt(D / N)); batch and tokens in tokens. (eq. 4)"""
    return batch / (lr * tokens * law(tokens / parameters))


def critical_batch_along(tokens: float, law: PowerLaw = CRITICAL_BATCH) -> float:
    """Return (1 + p) a t^p in tokens, after t tokens: the critical batch a D^p of whole runs spread along one.

    Its mean over a run of D tokens is a D^p.
    """
    return (1 + law.exponent) * law(tokens) if tokens else 0.0


def least_tokens(tokens: float, batch: float, law: PowerLaw = CRITICAL_BATCH) -> float:
    """Return D_min of a run of D tokens at batch B (tokens): the solution of D = D_min (1 + B / B_crit(D_min)).

    There is one, since the right side grows with D_min. (eq. 6)
    """
    return increasing_root(lambda least: least * (1 + batch / law(least)), tokens, 1e-9 * tokens, tokens)
