"""The policy of a batch that grows by equal increments."""

from megahp.scaling.batch.policies.policy import Observation, Policy, Proposal


class Ramp(Policy):
    """Propose Megatron-LM's linear ramp of the batch over consumed samples (before its release 0.18)."""

    def propose(self, observed: Observation) -> Proposal:
        batch, samples = self.config.batch, (observed.tokens - self.memory.began) // self.first_length
        if samples > batch.ramp_samples:
            return Proposal(batch.largest * self.first_length)
        increments = (batch.largest - batch.global_batch) // batch.increment
        done = int(samples / (batch.ramp_samples / increments))
        return Proposal((batch.global_batch + done * batch.increment) * self.first_length)
