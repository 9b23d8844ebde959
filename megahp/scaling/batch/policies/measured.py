"""The policy of a batch that takes over the decay of the learning rate, as far as the gradient is mostly noise."""

import math

from megahp.scaling import schedules
from megahp.scaling.batch.policies.policy import Observation, Policy, Proposal


class Measured(Policy):
    """Grow as the learning rate decays, below a share of the measured noise scale.

    While noise dominates the gradient, AdamW's progress per token and its temperature both go as lr / sqrt(batch): a
    decay of the rate to a share `shape` of its peak does the same as the rate times sqrt(kappa) on kappa = 1 / shape
    times the batch (Seesaw, arXiv 2510.14717), with moments that average over as many tokens as before (the rule sde).
    Two bounds limit the batch:

    - noise: batch <= noise_share x the lower end of the whole model's noise scale, or the gradient would no longer be
      mostly noise. Unknown before the interval is.
    - stability: kappa x shape <= 1, so that lr sqrt(batch), the drift of a step, never exceeds its peak at
      batch.global_batch. Before the peak the batch stays. Where a run continues with a larger batch than that (another
      horizon or schedule, a layout that cannot run the old batch), the rate is limited instead.
    """

    rule = "sde"
    measures = calibrates = True
    noise_key = "noise_scale_total_low"

    def bounds(self, observed: Observation) -> dict[str, float]:
        """Return the largest batch that each bound allows; none where the noise scale is unknown."""
        if observed.noise_scale is None:
            return {}
        batch, horizon = self.config.batch, self.config.train.tokens
        schedule, start = self.config.schedule, self.config.schedule.start
        shape = 1.0  # during the warm-up too, whose rise is no decay to take over
        if observed.tokens - start >= schedule.warmup * (horizon - start):
            shape = schedules.fraction(schedule, observed.tokens, horizon)
        tuned = batch.global_batch * self.first_length / observed.length
        stability = tuned / shape if shape > 0 else math.inf
        return {"noise": batch.noise_share * observed.noise_scale, "stability": stability}

    def target(self, observed: Observation) -> float | None:
        return min(self.bounds(observed).values(), default=None)

    def propose(self, observed: Observation) -> Proposal | None:
        bounds, left = self.bounds(observed), self.config.train.tokens - observed.tokens
        if not bounds or left <= 0:
            return None
        target = min(bounds.values()) * observed.length  # tokens
        # Where the run ends before the next decision, divide the rest into whole steps: 1 / shape runs away, and with a
        # batch larger than the rest, the rest would not be trained on.
        steps = math.ceil(left / target)
        tokens = left / steps if steps <= self.config.batch.look_every + 1 else target
        limit, other = ("noise", "stability") if bounds["noise"] < bounds["stability"] else ("stability", "noise")
        reason = f"{limit} allows {bounds[limit]:.4g}, {other} {bounds[other]:.4g}"
        return Proposal(tokens, observed.noise_scale, reason)

    def rate(self, shape: float, kappa: float) -> float:
        return min(shape, 1 / kappa)
