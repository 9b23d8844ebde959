"""The policy of a batch that follows the measured noise scale."""

import math

from megahp.scaling.batch.policies.policy import Observation, Policy, Proposal


class NoiseScale(Policy):
    """Propose a share of the least noise scale seen, once it has asked for enough growth during one half-life of the
    averages without a break.

    So a spike shorter than the half-life grows nothing. An unknown value asks for nothing.
    """

    measures = True

    def target(self, observed: Observation) -> float | None:
        batch, noise = self.config.batch, observed.noise_scale
        return None if noise is None else batch.target * batch.noise_to_total * noise

    def propose(self, observed: Observation) -> Proposal | None:
        batch, train, memory = self.config.batch, self.config.train, self.memory
        if observed.tokens < batch.delay * train.tokens:
            return None

        def batch_for(noise: float) -> float:  # in sequences of the first length, where it is rounded (Policy.propose)
            return batch.target * batch.noise_to_total * noise * observed.length / self.first_length

        noise = observed.noise_scale
        noise = noise if noise is not None and math.isfinite(noise) else 0.0
        present, asked = observed.batch // self.first_length, batch_for(noise)
        enough = asked >= batch.hysteresis * present and asked * self.first_length >= observed.larger
        if not enough or observed.larger <= observed.batch:
            memory.since = memory.least = None
            return None
        if memory.since is None or memory.least is None:
            memory.since, memory.least = observed.tokens, noise
        memory.least = min(memory.least, noise)
        if observed.tokens - memory.since < train.noise_half_life * train.tokens:
            return None
        tokens = min(batch_for(memory.least), batch.growth * present) * self.first_length
        return Proposal(tokens, memory.least)
