"""The policy of a batch that follows a law of the critical batch."""

from megahp.config import BatchConfig
from megahp.scaling import power_laws
from megahp.scaling.batch.policies.policy import Observation, Policy
from megahp.scaling.laws import PowerLaw


class Law(Policy):
    """Target a share of the critical batch, spread along the run (Power Lines, arXiv 2505.13738)."""

    def target(self, observed: Observation) -> float:
        batch = self.config.batch
        return batch.target * critical_batch_of_settings(batch, observed.tokens) / observed.length


def critical_batch_of_settings(batch: BatchConfig, tokens: float) -> float:
    """Return batch.critical_batch, a law of whole runs, spread along one: in tokens, after this many tokens."""
    scale, exponent = batch.critical_batch
    law = PowerLaw(scale, exponent, "batch.critical_batch", "given")
    return power_laws.critical_batch_along(tokens, law)
