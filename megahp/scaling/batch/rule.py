"""How the optimizer's hyperparameters follow the batch."""

import math
from dataclasses import dataclass

from megahp.config import BatchConfig, OptimizerConfig
from megahp.scaling import power_laws
from megahp.scaling.batch.policies import POLICIES


@dataclass(frozen=True)
class Hyperparameters:
    """The optimizer's base values at one batch."""

    lr: float  # at the schedule's peak
    weight_decay: float
    beta1: float
    beta2: float
    eps: float

    def timescale(self, batch_tokens: float, horizon: float) -> float:
        """Return tau, the share of the run AdamW averages over; infinite without weight decay."""
        if self.weight_decay == 0:
            return math.inf
        return power_laws.timescale(self.lr, self.weight_decay, batch_tokens, horizon)


def rule_of(batch: BatchConfig) -> str:
    """Return the rule that hyperparameters follow: the policy's own, or else the one that the user has chosen."""
    return POLICIES[batch.policy].rule or batch.rule


def follow(rule: str, optimizer: OptimizerConfig, kappa: float) -> Hyperparameters:
    """Return the base hyperparameters at kappa times the batch they were set for.

    power-lines: weight decay times kappa, so that tau stays (arXiv 2505.13738). sqrt: learning rate and weight decay
    times sqrt(kappa), beta2 to max(beta2^kappa, 0.9), eps over sqrt(kappa). sde: the same, and beta1 to beta1^kappa, so
    that both moments average over as many tokens as before: to first order the square-root scaling rule of Malladi et
    al. (arXiv 2205.10287), which has 1 - kappa (1 - beta). none: nothing.
    """
    lr, decay, beta1, beta2, eps = (
        getattr(optimizer, name) for name in ("lr", "weight_decay", "beta1", "beta2", "eps")
    )
    if rule == "power-lines":
        return Hyperparameters(lr, decay * kappa, beta1, beta2, eps)
    if rule in ("sqrt", "sde"):
        root = math.sqrt(kappa)
        momentum = beta1**kappa if rule == "sde" else beta1
        # The floor is ours: without one the second moment of a large kappa is a single gradient's. A floor of 0.6 was
        # no clear gain (docs/log.md). A beta2 that is set below it stays.
        return Hyperparameters(lr * root, decay * root, momentum, max(beta2**kappa, min(beta2, 0.9)), eps / root)
    return Hyperparameters(lr, decay, beta1, beta2, eps)
