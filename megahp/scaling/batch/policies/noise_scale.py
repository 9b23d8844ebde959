"""The policy of a batch that follows the measured noise scale."""

import math

from megahp.scaling.batch.policies.policy import Observation, Policy


class NoiseScale(Policy):
    """Want a share of the least noise scale seen, once it has asked for enough growth during one half-life without a
    break.

    A spike shorter than the half-life therefore grows nothing. A value that is unknown asks for nothing.
    """

    measures = True

    def target(self, now: Observation) -> float | None:
        batch, noise = self.config.batch, now.noise_scale
        return None if noise is None else batch.target * batch.noise_to_total * noise

    def propose(self, now: Observation) -> float | None:
        batch, train, memory = self.config.batch, self.config.train, self.memory
        if not self.is_decision_step(now.step) or now.tokens < batch.delay * train.tokens:
            return None
        noise = now.noise_scale if now.noise_scale is not None and math.isfinite(now.noise_scale) else 0.0
        asked, present = self._asked(noise, now.length), now.batch // self.first_length
        if asked < batch.hysteresis * present or asked * self.first_length < now.larger or now.larger <= now.batch:
            memory.since = memory.least = None
            return None
        if memory.since is None or memory.least is None:
            memory.since, memory.least = now.tokens, noise
        memory.least = min(memory.least, noise)
        if now.tokens - memory.since < train.noise_half_life * train.tokens:
            return None
        return min(self._asked(memory.least, now.length), batch.growth * present) * self.first_length

    def noise(self, now: Observation) -> float | None:
        return self.memory.least

    def _asked(self, noise: float, length: int) -> float:
        """Return what is aimed at in sequences of the run's first length, where it is rounded (see Policy.wanted)."""
        return self.config.batch.target * self.config.batch.noise_to_total * noise * length / self.first_length
