"""The policy of a batch that stays."""

from megahp.scaling.batch.policies.policy import Policy


class Constant(Policy):
    """Keep batch.global_batch, whatever a checkpoint's batch was (BatchConfig.grows)."""
