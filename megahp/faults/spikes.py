"""Spikes: steps whose loss or gradient norm stands out from those before."""

import math
from collections import deque
from collections.abc import Mapping, Sequence

from megahp.config.schema import ResilienceConfig


class Spikes:
    """Compares each step's loss and gradient norm with the last `spike_window` steps'.

    A value is a spike when it is more than `spike_sigmas` standard deviations above their mean (the skip-step
    optimizer of OLMo-core, optim/skip_step_optimizer.py: 128 steps, 6 sigmas). It enters the window as that limit, so
    that one spike does not hide the next, and a lasting change is in time no spike any more.
    """

    def __init__(self, config: ResilienceConfig) -> None:
        self.sigmas, self.size = config.spike_sigmas, config.spike_window
        self.load_state({"loss": [], "gradient norm": []})

    def update(self, loss: float, grad_norm: float) -> str:
        """Add a step. Returns what stands out, for a log; empty where nothing does or the window is not yet full."""
        spikes = []
        for name, value in (("loss", loss), ("gradient norm", grad_norm)):
            window, limit = self.windows[name], math.inf
            if len(window) == self.size:
                mean = math.fsum(window) / self.size
                limit = mean + self.sigmas * math.sqrt(math.fsum((x - mean) ** 2 for x in window) / self.size)
            window.append(min(value, limit))
            if value > limit:
                spikes.append(f"{name} {value:.4g} is above {limit:.4g}")
        return ", ".join(spikes)

    def state(self) -> dict[str, list[float]]:
        return {name: list(window) for name, window in self.windows.items()}

    def load_state(self, state: Mapping[str, Sequence[float]]) -> None:
        self.windows = {name: deque(values, self.size) for name, values in state.items()}
