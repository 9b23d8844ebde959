"""The policy of a batch that the user lists."""

from megahp.config import Config, parse_table
from megahp.scaling.batch.policies.policy import Observation, Policy, Proposal


class Table(Policy):
    """Propose the last batch of batch.table whose tokens are reached."""

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.table = [(tokens, size * self.first_length) for tokens, size in parse_table(config.batch.table)]

    def propose(self, observed: Observation) -> Proposal | None:
        reached = [batch for tokens, batch in self.table if observed.tokens >= tokens]
        return Proposal(max(reached)) if reached else None
