"""What all policies of the batch share: what they observe, what they remember, what they decide."""

from dataclasses import dataclass

from megahp.config import Config


@dataclass
class PolicyState:
    """What a policy remembers, and a checkpoint keeps. Of the policies only the one called noise-scale sets `since` and
    `least`."""

    since: int | None = None  # tokens since which the noise scale has asked for more, without a break
    least: float | None = None  # the least noise scale since then
    began: int = 0  # tokens of the run at which this plan of the batch began


@dataclass(frozen=True)
class Observation:
    """What a policy decides from after a step."""

    step: int
    tokens: int  # of the run
    batch: int  # tokens
    larger: int  # tokens of the next larger batch that can be run; not above `batch` where the limit allows none
    length: int  # tokens of a sequence
    noise_scale: float | None  # the one of NoiseScale.numbers under `noise_key`, in sequences of this length


@dataclass(frozen=True)
class Proposal:
    """The batch that a policy proposes, in tokens, and what it is based on."""

    tokens: float
    noise_scale: float | None = None  # examples; None for policies that measure nothing
    reason: str = ""  # "" for the standard one


class Policy:
    """Decide the batch of the next steps.

    A policy overrides `target` (sequences), or `propose` (tokens) where it needs more than a target; BatchScheduler
    rounds the proposal to what the layout can run. CONTRIBUTING.md lists what else a new one needs.
    """

    rule = ""  # of scaling/batch/rule.py, where the policy rests on one; "": the user chooses, by batch.rule
    measures = False  # True: it decides from the noise scale, and so at decision steps alone
    calibrates = False  # True: it needs the noise scale of the whole model, with an interval
    noise_key = "noise_scale"  # which of NoiseScale.numbers it decides from

    def __init__(self, config: Config) -> None:
        self.config = config
        self.first_length = config.data.sequence_length
        self.memory = PolicyState()

    def target(self, observed: Observation) -> float | None:
        """Return the batch to grow to if nothing limited growth, in sequences of the present length; None where the
        policy follows no critical batch."""
        return None

    def bounds(self, observed: Observation) -> dict[str, float]:
        """Return the largest batch that each bound allows, by name, in sequences of the present length."""
        return {}

    def propose(self, observed: Observation) -> Proposal | None:
        """Return the batch for the next steps; None to keep the present one.

        The target is rounded in sequences of the run's first length, in which `batch.global_batch` is counted: a replay
        compares with the logs of older runs to the last bit.
        """
        target = self.target(observed)
        return None if target is None else Proposal(target * observed.length / self.first_length * self.first_length)

    def on_length_change(self) -> None:
        """Forget what was measured on examples of another length."""
        self.memory.since = self.memory.least = None

    def on_growth(self) -> None:
        """Let the next growth be confirmed anew. `least` stays: this growth rests on it."""
        self.memory.since = None

    def rate(self, shape: float, kappa: float) -> float:
        """Return the share of the peak learning rate at kappa times batch.global_batch, where the schedule's share is
        `shape`."""
        return shape
