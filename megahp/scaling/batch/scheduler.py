"""The plan of the batch: what one optimizer step does, from the run's progress and the measured noise scale.

The global batch changes at a step boundary, in one event. It is always one that the layout can run, and never shrinks
within one start: a resume may lower it, to `batch.largest` or to that of another policy.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from megahp.config import Config, phase_at, phases_of
from megahp.scaling import schedules
from megahp.scaling.batch.policies import POLICIES
from megahp.scaling.batch.policies.policy import Observation, Policy, PolicyState, Proposal
from megahp.scaling.batch.rule import Hyperparameters, follow, rule_of
from megahp.scaling.batch.sizes import batch_multiple, micro_batch


@dataclass(frozen=True)
class Progress:
    """How far a run is. Schedules and data follow samples and tokens; train.steps and decision steps follow `step`."""

    step: int = 0
    samples: int = 0
    tokens: int = 0

    def after(self, plan: StepPlan) -> Progress:
        return Progress(self.step + 1, self.samples + plan.global_batch, self.tokens + plan.tokens)


@dataclass(frozen=True)
class StepPlan:
    """One optimizer step: its samples, how they are divided, and its hyperparameters before the table's multipliers."""

    step: int  # 1 for the first
    phase: int  # of the data
    first_sample: int
    length: int  # tokens of a sequence
    global_batch: int  # sequences
    micro_batch: int  # sequences of one rank's forward pass, the largest where they are not equal
    tokens: int  # of the whole global batch
    lr: float
    weight_decay: float
    beta1: float
    beta2: float
    eps: float

    def num_microbatches(self, dp: int) -> int:
        """Return the microbatches of one of `dp` data-parallel ranks."""
        return -(-self.global_batch // (dp * self.micro_batch))


@dataclass(frozen=True)
class Change:
    """A change of the global batch: the decision, and everything it was made from. Batches are in sequences of the
    length at the time."""

    before: int
    now: int
    wanted: float
    noise_scale: float | None  # examples, the one the policy used; None for policies that measure nothing
    reason: str
    hyperparameters_before: Hyperparameters
    hyperparameters_now: Hyperparameters
    tau_before: float
    tau_now: float

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


class BatchScheduler:
    """Decide the batch of the next step. Everything it remembers is in `state`.

    Inside, batches are in tokens, so that a step keeps its tokens when the length changes. Settings and `state` have
    them in sequences of the run's first length; plans, changes and noise scales in sequences of the present one.
    """

    def __init__(self, config: Config, dp: int) -> None:
        self.config, self.dp = config, dp
        self.first_length = self.length = config.data.sequence_length  # length: of the noise scales seen
        self.multiple = batch_multiple(config, dp) * self.first_length
        self.limit = config.batch.largest * self.first_length or math.inf
        self.phases = phases_of(config.data)
        self.policy: Policy = POLICIES[config.batch.policy](config)
        self.rule = rule_of(config.batch)
        self.tokens = config.batch.global_batch * self.first_length

    @property
    def batch(self) -> int:
        """Return the batch in sequences of the run's first length."""
        return self.tokens // self.first_length

    @property
    def noise_key(self) -> str:
        """Return which of NoiseScale.numbers `update`, `target` and `bounds` take."""
        return self.policy.noise_key

    def is_decision_step(self, step: int) -> bool:
        """Return whether the noise scale after this step can decide something, and so must be in the log."""
        return self.policy.measures and step % self.config.batch.look_every == 0

    def steps_to_decision(self, step: int) -> int:
        """Return how many steps after this one the batch may change next: a forecast can take as many at once."""
        every = self.config.batch.look_every if self.policy.measures else 1
        return every - step % every if self.config.batch.grows else sys.maxsize

    def is_calibration_step(self, step: int) -> bool:
        """Return whether to measure the whole model's gradient of one example after this step."""
        every = self.config.batch.calibrate_every
        return self.policy.calibrates and every > 0 and step % every == 0

    def step(self, progress: Progress) -> StepPlan | None:
        """Return the next optimizer step; None when the run is over, because the horizon has no room for another batch
        or train.steps are done."""
        train, tokens = self.config.train, self.tokens
        if (train.steps and progress.step >= train.steps) or progress.tokens + tokens > train.tokens:
            return None
        # at the middle of the step's tokens, so that the mean rate of a linear schedule does not depend on the batch
        shape = schedules.fraction(self.config.schedule, progress.tokens + tokens / 2, train.tokens)
        peak = self.hyperparameters(tokens)
        phase = phase_at(self.phases, progress.tokens)
        length = self.phases[phase].length
        return StepPlan(
            step=progress.step + 1,
            phase=phase,
            first_sample=progress.samples,
            length=length,
            global_batch=tokens // length,
            micro_batch=micro_batch(self.config, length, max(1, tokens // length // self.dp)),
            tokens=tokens,
            **asdict(replace(peak, lr=peak.lr * self.policy.rate(shape, self._kappa(tokens)))),
        )

    def update(self, progress: Progress, noise_scale: float | None) -> Change | None:
        """Decide, after a step, whether the next ones have a larger batch. noise_scale: the one of NoiseScale.numbers
        under `noise_key`, in examples; None where it is unknown or no decision is due."""
        length = self.phases[phase_at(self.phases, progress.tokens)].length
        if length != self.length:  # what was measured on examples of another length no longer counts
            self.length, noise_scale = length, None
            self.policy.on_length_change()
        # These rules change the betas, and AdamW corrects its bias by the present ones, as if all steps before had had
        # them. After 10 / (1 - beta2) steps that no longer matters: the correction, 1 - beta2^steps, is 1 to 5e-5.
        if self.rule in ("sqrt", "sde") and progress.step < 10 / (1 - self.config.optimizer.beta2):
            return None
        if self.policy.measures and not self.is_decision_step(progress.step):
            return None
        proposal = self.policy.propose(self._observe(progress, noise_scale))
        if proposal is None or (tokens := self._runnable_below(proposal.tokens)) <= self.tokens:
            return None
        before, self.tokens = self.tokens, tokens
        self.policy.on_growth()
        return self._change(before, proposal)

    def target(self, progress: Progress, noise_scale: float | None) -> float | None:
        """Return the batch, in sequences, that a policy which follows the critical batch would have if nothing limited
        its growth."""
        return self.policy.target(self._observe(progress, noise_scale))

    def bounds(self, progress: Progress, noise_scale: float | None) -> dict[str, float]:
        """Return the bounds of a policy that has some, name -> sequences."""
        return self.policy.bounds(self._observe(progress, noise_scale))

    def hyperparameters(self, tokens: int) -> Hyperparameters:
        """Return the optimizer's base values at a global batch of this many tokens."""
        return follow(self.rule, self.config.optimizer, self._kappa(tokens))

    def state(self) -> dict[str, Any]:
        return {"batch": self.batch, "length": self.length, **asdict(self.policy.memory)}

    def load_state(self, state: Mapping[str, Any], progress: Progress) -> list[Change]:
        """Load a state as far as settings and layout allow: a batch that this layout cannot run becomes the next larger
        one, or the next smaller where that is above the limit. Return the change this made, and the one the policy
        makes at once."""
        self.length = state["length"]
        self.policy.memory = PolicyState(*(state[field.name] for field in fields(PolicyState)))
        before = state["batch"] * self.first_length
        if self.config.batch.grows:
            above = -(-before // self.multiple) * self.multiple
            self.tokens = max(self.tokens, above if above <= self.limit else self._runnable_below(above))
        changes = []
        if self.tokens != before:
            changes.append(self._change(before, Proposal(self.tokens, reason="settings or layout have changed")))
        # policies that measure decide at decision steps alone: a resume must not add one
        if not self.policy.measures and (change := self.update(progress, None)):
            changes.append(change)
        return changes

    def _kappa(self, tokens: int) -> float:
        """Return the ratio of a global batch of this many tokens to the one the optimizer's settings are for."""
        return tokens / (self.config.batch.global_batch * self.first_length)

    def _runnable_below(self, tokens: float) -> int:
        """Return the largest batch the layout can run that is above neither these tokens nor the limit."""
        return int(min(tokens, self.limit) // self.multiple) * self.multiple

    def _observe(self, progress: Progress, noise_scale: float | None) -> Observation:
        larger = self._runnable_below(self.tokens + self.multiple)
        return Observation(progress.step, progress.tokens, self.tokens, larger, self.length, noise_scale)

    def _change(self, before: int, proposal: Proposal) -> Change:
        """Return the change from a batch to the present one, which followed from the proposal."""
        old, new = self.hyperparameters(before), self.hyperparameters(self.tokens)
        horizon, noise, why = self.config.train.tokens, proposal.noise_scale, proposal.reason
        sequences, asked = (before // self.length, self.tokens // self.length), proposal.tokens / self.length
        if not why:  # these words stand in events.jsonl, and a replay compares them
            because = f"; the smoothed noise scale stayed at {noise:.4g} examples or more" if noise else ""
            why = f"{self.config.batch.policy} asks for {asked:.4g}{because}"
        reason = f"global batch {sequences[0]} -> {sequences[1]}: {why}"
        taus = old.timescale(before, horizon), new.timescale(self.tokens, horizon)
        return Change(*sequences, asked, noise, reason, old, new, *taus)
