"""The noise scale that a run is expected to have, for planning a batch that follows it."""

from collections.abc import Callable

from megahp.config import Config, phase_at, phases_of
from megahp.scaling.batch.policies.law import critical_batch_of_settings
from megahp.scaling.batch.scheduler import Progress


def noise_forecast(config: Config, progress: Progress, noise: float | None) -> Callable[[int], float | None]:
    """Return a function of tokens: the noise scale that the policy `measured` will see, in sequences of that moment's
    length.

    It is Power Lines' critical batch, spread along the run, times what the present noise scale is of it, where that is
    known. Other policies get None.
    """
    batch, phases = config.batch, phases_of(config.data)
    if batch.policy != "measured":
        return lambda tokens: None

    def by_law(tokens: int) -> float:
        return critical_batch_of_settings(batch, tokens) / phases[phase_at(phases, tokens)].length

    factor = noise / by_law(progress.tokens) if noise and progress.tokens else 1.0
    return lambda tokens: factor * by_law(tokens)
