"""The noise scale that a run is expected to have, for plans of a batch that follows it."""

from collections.abc import Callable

from megahp.config import Config, phase_at, phases_of
from megahp.scaling.batch.policies.law import critical_batch_along
from megahp.scaling.batch.scheduler import Progress


def noise_forecast(config: Config, progress: Progress, noise: float | None) -> Callable[[int], float | None]:
    """Return the noise scale that the policy `measured` will see after so many tokens, in sequences of the length at
    that moment: the critical batch by Power Lines' law, spread along the run, and as high as the noise scale is now,
    where that is known. Other policies see none."""
    batch, along = config.batch, phases_of(config.data)
    if batch.policy != "measured":
        return lambda tokens: None

    def by_law(tokens: int) -> float:
        length = along[phase_at(along, tokens)].length
        return critical_batch_along(batch, tokens) / length

    measured = noise / by_law(progress.tokens) if noise and progress.tokens else 1.0
    return lambda tokens: measured * by_law(tokens)
