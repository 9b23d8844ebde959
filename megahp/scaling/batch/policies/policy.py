"""What every policy of the batch is, what it remembers, and what it decides from."""

from dataclasses import dataclass

from megahp.config import Config


@dataclass
class PolicyState:
    """Hold what a policy remembers. Only NoiseScale sets `since` and `least`; the others hand them on, as they stand in
    a checkpoint."""

    since: int | None = None  # tokens since which the noise scale has asked for more, without a break
    least: float | None = None  # the least noise scale since then
    began: int = 0  # tokens of the run at which the plan began


@dataclass(frozen=True)
class Observation:
    """Hold what a policy may look at after a step."""

    step: int
    tokens: int  # of the run
    batch: int  # tokens
    larger: int  # tokens of the next larger batch that can be run; not above `batch` where the limit allows none
    length: int  # tokens of a sequence
    noise_scale: float | None  # what the policy sees of it, in sequences of this length


class Policy:
    """Answer what BatchScheduler asks. As it stands here, it asks for nothing."""

    grows = True  # False: a resumed run begins again with batch.global_batch
    measures = False  # True: it decides from the noise scale, and so at looks alone
    noise_key = "noise_scale"  # which of NoiseScale.numbers it decides from

    def __init__(self, config: Config) -> None:
        self.config = config
        self.first_length = config.data.sequence_length
        self.memory = PolicyState()

    def is_decision_step(self, step: int) -> bool:
        """Return whether the noise scale after this step can decide something."""
        return self.measures and step % self.config.batch.look_every == 0

    def is_calibration_step(self, step: int) -> bool:
        """Return whether the whole model's gradient of one example is to be measured after this step."""
        return False

    def target(self, now: Observation) -> float | None:
        """Return the batch wanted if nothing held it back, in sequences of the present length; None where the policy
        follows no critical batch."""
        return None

    def bounds(self, now: Observation) -> dict[str, float]:
        """Return what holds the batch, name -> the largest one it allows in sequences of the present length."""
        return {}

    def propose(self, now: Observation) -> float | None:
        """Return the batch wanted from here on, in tokens; None for that which there is.

        What is aimed at is rounded in sequences of the run's first length, as `batch.global_batch` is counted: a replay
        compares with the logs of older runs to the last bit.
        """
        aim = self.target(now)
        return None if aim is None else aim * now.length / self.first_length * self.first_length

    def rate(self, shape: float, kappa: float) -> float:
        """Return the share of the peak learning rate, at kappa times batch.global_batch, where the schedule has
        `shape`."""
        return shape

    def noise(self, now: Observation) -> float | None:
        """Return the noise scale that a change made now is based on; None where the policy measures nothing."""
        return None

    def why(self, now: Observation) -> str:
        """Return the reason of a change made now, "" for the policy's name and what it asks for."""
        return ""
