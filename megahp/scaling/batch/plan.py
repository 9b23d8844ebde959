"""The batch plan: what one optimizer step does, as a function of the run's progress and of the measured noise scale.

A change of the global batch is one event at a step boundary. It never shrinks, and is always one the layout runs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from megahp.config import Config, parse_table, stage_at, stages
from megahp.scaling import power_laws, schedules
from megahp.scaling.batch.rule import Hyperparameters, follow
from megahp.scaling.batch.sizes import micro_batch, unit
from megahp.scaling.laws import PowerLaw


@dataclass(frozen=True)
class Progress:
    """How far a run is. Only samples and tokens decide what comes next."""

    step: int = 0
    samples: int = 0
    tokens: int = 0

    def after(self, plan: Plan) -> Progress:
        return Progress(self.step + 1, self.samples + plan.global_batch, self.tokens + plan.tokens)


@dataclass(frozen=True)
class Plan:
    """One optimizer step: its samples, how they are divided, and the base hyperparameters it uses."""

    step: int  # 1 for the first
    stage: int  # of the data
    first_sample: int
    length: int  # tokens of a sequence
    global_batch: int  # sequences
    micro_batch: int  # sequences of one rank's forward pass
    tokens: int  # of the whole global batch
    lr: float
    weight_decay: float
    beta1: float
    beta2: float
    eps: float

    def microbatches(self, dp: int) -> int:
        return self.global_batch // (dp * self.micro_batch)


@dataclass(frozen=True)
class Change:
    """A change of the global batch: the decision, and everything it was made from."""

    before: int
    now: int
    wanted: float  # sequences
    noise_scale: float | None  # smoothed, examples, the least over the time it was confirmed; None for other policies
    reason: str
    hyperparameters_before: Hyperparameters
    hyperparameters_now: Hyperparameters
    tau_before: float
    tau_now: float

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


class BatchPlan:
    """The batch of the next step. Everything it remembers is in `state`.

    Inside, batches are in sequences of the run's first length, so that a step keeps its tokens when the length changes;
    plans, changes and noise scales are in sequences of the present one.
    """

    def __init__(self, settings: Config, dp: int) -> None:
        self.settings = settings
        self.unit = unit(settings, dp)
        self.stages = stages(settings.data)
        self.table = parse_table(settings.batch.table)
        self.batch = settings.batch.global_batch
        self.length = settings.data.sequence_length  # of the noise scales seen
        self.since: int | None = None  # tokens since which the noise scale has asked for more, without a break
        self.least = math.inf  # the least it asked for since then, examples of noise scale
        self.began = 0  # tokens of the run at which the plan began

    def step(self, progress: Progress) -> Plan | None:
        """The next optimizer step, or None when the run is over: the horizon has no room for another batch, or
        train.steps are done. The learning rate is the schedule's at the middle of the step's tokens, so that its mean
        over a linear schedule does not depend on the batch."""
        train, tokens = self.settings.train, self._tokens(self.batch)
        if (train.steps and progress.step >= train.steps) or progress.tokens + tokens > train.tokens:
            return None
        rate = schedules.fraction(self.settings.schedule, progress.tokens + tokens / 2, train.tokens)
        values = self.hyperparameters(self.batch)
        stage = self._stage(progress)
        length = self.stages[stage].length
        return Plan(
            step=progress.step + 1,
            stage=stage,
            first_sample=progress.samples,
            length=length,
            global_batch=tokens // length,
            micro_batch=micro_batch(self.settings, length),
            tokens=tokens,
            lr=values.lr * rate,
            weight_decay=values.weight_decay,
            beta1=values.beta1,
            beta2=values.beta2,
            eps=values.eps,
        )

    def look(self, progress: Progress, noise_scale: float | None) -> Change | None:
        """Decide, after a step, whether the next ones have a larger batch. noise_scale: smoothed, in examples.

        Under `sqrt` beta2 may change only once 10 / (1 - beta2) steps are done: AdamW corrects its bias with the
        present beta2.
        """
        batch = self.settings.batch
        length = self.stages[self._stage(progress)].length
        if length != self.length:  # an example is another thing from here on
            self.length, self.since, self.least, noise_scale = length, None, math.inf, None
        if batch.rule == "sqrt" and progress.step < 10 / (1 - self.settings.optimizer.beta2):
            return None
        noise = self._confirmed(progress, noise_scale) if batch.policy == "noise-scale" else None
        wanted = self._wanted(progress, noise)
        now = self._runnable_below(wanted)
        if now <= self.batch:
            return None
        before, self.batch, self.since = self.batch, now, None
        return self._change(before, now, wanted, noise)

    def is_look(self, step: int) -> bool:
        """Whether the noise scale after this step can decide something, and so must be in the log."""
        return self.settings.batch.policy == "noise-scale" and step % self.settings.batch.look_every == 0

    def aim(self, progress: Progress, noise_scale: float | None) -> float | None:
        """The batch, in sequences, that a policy following the critical batch would have if nothing held it back."""
        batch = self.settings.batch
        if batch.policy == "law":
            scale, exponent = batch.critical_batch
            law = PowerLaw(scale, exponent, "batch.critical_batch", "given")
            return batch.target * power_laws.critical_batch_along(progress.tokens, law) / self.length
        if batch.policy == "noise-scale" and noise_scale is not None:
            return batch.target * batch.noise_to_total * noise_scale
        return None

    def hyperparameters(self, batch: int) -> Hyperparameters:
        """The optimizer's base values at this global batch."""
        chosen = self.settings.batch
        return follow(chosen.rule, self.settings.optimizer, batch / chosen.global_batch)

    def state(self) -> dict[str, Any]:
        least = None if math.isinf(self.least) else self.least
        return {
            "batch": self.batch,
            "length": self.length,
            "since": self.since,
            "least": least,
            "began": self.began,
        }

    def go_on(self, state: Mapping[str, Any], progress: Progress) -> list[Change]:
        """Become what a state says, as far as settings and layout allow: a batch that this layout cannot run becomes
        the next one that it can. Returns what that changed, and what the policy changes at once."""
        self.length, self.since, self.began = state["length"], state["since"], state["began"]
        self.least = math.inf if state["least"] is None else state["least"]
        if self.settings.batch.policy != "constant":
            above = -(-state["batch"] // self.unit) * self.unit
            self.batch = max(self.batch, above if above <= self._limit else self._runnable_below(above))
        moved = []
        if self.batch != state["batch"]:
            moved.append(self._change(state["batch"], self.batch, self.batch, None, "settings or layout have changed"))
        # what was measured decides at the looks alone, or a resume would not be exact
        looked = self.look(progress, None) if self.settings.batch.policy != "noise-scale" else None
        return [*moved, looked] if looked else moved

    def _wanted(self, progress: Progress, noise: float | None) -> float:
        """The batch the policy asks for now."""
        batch = self.settings.batch
        if batch.policy == "ramp":
            return self._ramp((progress.tokens - self.began) // self.settings.data.sequence_length)
        if batch.policy == "table":
            reached = [size for tokens, size in self.table if progress.tokens >= tokens]
            return max(reached, default=self.batch)
        aim = self.aim(progress, noise)
        if aim is None:
            return self.batch
        wanted = self._first_length(aim)
        return min(wanted, batch.growth * self.batch) if batch.policy == "noise-scale" else wanted

    def _ramp(self, samples: int) -> int:
        """Megatron-LM's linear ramp of batch by consumed samples (before its release 0.18)."""
        batch = self.settings.batch
        increments = (batch.largest - batch.global_batch) // batch.increment
        if samples > batch.ramp_samples:
            return batch.largest
        return batch.global_batch + int(samples / (batch.ramp_samples / increments)) * batch.increment

    def _confirmed(self, progress: Progress, noise_scale: float | None) -> float | None:
        """The least noise scale seen, once it has asked for enough growth during one half-life without a break.

        A spike shorter than the half-life therefore grows nothing. A value that is unknown asks for nothing.
        """
        batch, train = self.settings.batch, self.settings.train
        if not self.is_look(progress.step) or progress.tokens < batch.delay * train.tokens:
            return None
        if noise_scale is None or not math.isfinite(noise_scale):
            noise_scale = 0.0
        wanted = self._first_length(batch.target * batch.noise_to_total * noise_scale)
        if wanted < batch.hysteresis * self.batch or self._runnable_below(wanted) <= self.batch:
            self.since, self.least = None, math.inf
            return None
        if self.since is None:
            self.since, self.least = progress.tokens, math.inf
        self.least = min(self.least, noise_scale)
        return self.least if progress.tokens - self.since >= train.noise_half_life * train.tokens else None

    def _runnable_below(self, wanted: float) -> int:
        """The largest batch the layout runs that is neither above what is wanted nor above the limit."""
        return int(min(wanted, self._limit) // self.unit) * self.unit

    @property
    def _limit(self) -> float:
        return self.settings.batch.largest or math.inf

    def _change(self, before: int, now: int, wanted: float, noise: float | None, why: str = "") -> Change:
        old, new = self.hyperparameters(before), self.hyperparameters(now)
        horizon = self.settings.train.tokens
        sequences = [self._tokens(batch) // self.length for batch in (before, now)]
        asked = wanted * self.settings.data.sequence_length / self.length
        because = f"; the smoothed noise scale stayed at {noise:.4g} examples or more" if noise else ""
        why = why or f"{self.settings.batch.policy} asks for {asked:.4g}{because}"
        return Change(
            before=sequences[0],
            now=sequences[1],
            wanted=asked,
            noise_scale=noise,
            reason=f"global batch {sequences[0]} -> {sequences[1]}: {why}",
            hyperparameters_before=old,
            hyperparameters_now=new,
            tau_before=old.timescale(self._tokens(before), horizon),
            tau_now=new.timescale(self._tokens(now), horizon),
        )

    def _stage(self, progress: Progress) -> int:
        return stage_at(self.stages, progress.tokens)

    def _first_length(self, sequences: float) -> float:
        """As many tokens in sequences of the run's first length."""
        return sequences * self.length / self.settings.data.sequence_length

    def _tokens(self, batch: int) -> int:
        return batch * self.settings.data.sequence_length
