"""The policy of a batch that takes over the decay of the learning rate, as far as the gradient is mostly noise."""

import math

from megahp.scaling import schedules
from megahp.scaling.batch.policies.policy import Observation, Policy


class Measured(Policy):
    """Grow as the learning rate decays, below a share of the measured noise scale.

    While noise dominates the gradient, AdamW's progress per token and its temperature both go as lr / sqrt(batch): a
    decay of the rate to a share `shape` of its peak does the same as the rate times sqrt(kappa) on kappa = 1 / shape
    times the batch (Seesaw, arXiv 2510.14717), with moments that average over as many tokens as before (the rule sde).
    Two bounds hold the batch:

    - noise: batch <= noise_share x the lower end of the whole model's noise scale, or the gradient would no longer be
      mostly noise. Unknown before the interval is.
    - stability: kappa x shape <= 1, so that lr sqrt(batch), the drift of a step, never exceeds its peak at
      batch.global_batch. Before the peak the batch stays. Where a run goes on with a larger batch than that (another
      horizon or schedule, a layout that cannot run the old batch), the rate is held down instead.
    """

    measures = True
    noise_key = "noise_scale_total_low"

    def target(self, now: Observation) -> float | None:
        bounds = self.bounds(now)
        return min(bounds.values()) if bounds else None

    def propose(self, now: Observation) -> float | None:
        aim = self.target(now) if self.is_decision_step(now.step) else None
        if aim is None or (left := self.config.train.tokens - now.tokens) <= 0:
            return None
        # Where the run ends before the next look, in whole steps of what is left: 1 / shape runs away, and a batch
        # larger than that would never be taken, its tokens left untrained.
        steps = math.ceil(left / (aim * now.length))
        return left / steps if steps <= self.config.batch.look_every + 1 else aim * now.length

    def is_calibration_step(self, step: int) -> bool:
        every = self.config.batch.calibrate_every
        return every > 0 and step % every == 0

    def rate(self, shape: float, kappa: float) -> float:
        return min(shape, 1 / kappa)

    def noise(self, now: Observation) -> float | None:
        return now.noise_scale

    def why(self, now: Observation) -> str:
        noise, stability = self.bounds(now).values()
        bound, other = ("noise", "stability") if noise < stability else ("stability", "noise")
        return f"{bound} allows {min(noise, stability):.4g}, {other} {max(noise, stability):.4g}"

    def bounds(self, now: Observation) -> dict[str, float]:
        """Return the largest batch that each bound allows; none where the noise scale is unknown."""
        if now.noise_scale is None:
            return {}
        batch, horizon = self.config.batch, self.config.train.tokens
        schedule, start = self.config.schedule, self.config.schedule.start
        shape = 1.0
        if now.tokens - start >= schedule.warmup * (horizon - start):
            shape = schedules.fraction(schedule, now.tokens, horizon)
        tuned = batch.global_batch * self.first_length / now.length
        return {"noise": batch.noise_share * now.noise_scale, "stability": tuned / shape if shape > 0 else float("inf")}
