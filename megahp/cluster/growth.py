"""Growth: divide a run into segments on more and more nodes, so that the load of a node stays as the batch grows."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megahp.config import Config, with_values
from megahp.scaling.batch import BatchScheduler, Progress, least_batch, noise_forecast

STRIDES = 2000  # the remaining steps are simulated in at least this many strides of equal steps: a run has millions


@dataclass(frozen=True)
class Growth:
    """The nodes of a run: `nodes` at batch.global_batch, and twice as many whenever the batch has doubled."""

    config: Config
    nodes: int
    largest: int  # most nodes
    dp: Callable[[int], int]  # number of nodes -> data-parallel ranks

    @property
    def sizes(self) -> list[int]:
        """The numbers of nodes, ascending."""
        sizes = [self.nodes]
        while 2 * sizes[-1] <= self.largest:
            sizes.append(2 * sizes[-1])
        return sizes

    def nodes_for(self, batch: int, at_most: int | None = None) -> int:
        """Return the most nodes, up to at_most, that a batch loads as much as batch.global_batch loads `nodes`.

        Batches are in sequences of the run's first length.
        """
        busy = self.nodes * batch / self.config.batch.global_batch
        limit = busy if at_most is None else min(busy, at_most)
        return max((size for size in self.sizes if size <= limit), default=self.nodes)

    def stop_at(self, batch: int) -> int:
        """Return the next batch that needs more nodes than this one; 0 = none."""
        more = 2 * self.nodes_for(batch)
        return self.config.batch.global_batch * more // self.nodes if more <= self.largest else 0

    def seconds(self, parts: Sequence[Segment], nodes: int, speed: float) -> float:
        """Return the duration of these segments, all on this number of nodes, each at `speed` tokens per second.

        A step takes at least as long as one of the smallest batch that the nodes can share.
        """
        least = least_batch(self.config, self.dp(nodes)) * self.config.data.sequence_length
        return sum(steps * max(tokens, least) for part in parts for steps, tokens in part.strides) / (speed * nodes)


@dataclass(frozen=True)
class Segment:
    """A part of a run on one number of nodes."""

    nodes: int
    begin: int  # tokens
    strides: Sequence[tuple[int, int]]  # (steps, tokens of each), in order

    @property
    def steps(self) -> int:
        """Optimizer steps."""
        return sum(steps for steps, _ in self.strides)

    @property
    def end(self) -> int:
        """Tokens of the run at its end."""
        return self.begin + sum(steps * tokens for steps, tokens in self.strides)


def segments(growth: Growth, progress: Progress, state: Mapping[str, Any], noise: float | None) -> list[Segment]:
    """Return the remaining segments of a run, by simulating its batch scheduler.

    state: of the batch scheduler. noise: the noise scale that its policy sees, examples; None if unknown.
    """
    config, result = forecast_segments(growth.config, progress, noise), list[Segment]()
    train, forecast = config.train, noise_forecast(config, progress, noise)
    while True:
        nodes, begin = growth.nodes_for(state["batch"]), progress.tokens
        scheduler = BatchScheduler(config, growth.dp(nodes))
        scheduler.load_state(state, progress)
        stop_at, strides = growth.stop_at(state["batch"]), list[tuple[int, int]]()
        while (step := scheduler.step(progress)) and not (strides and 0 < stop_at <= scheduler.batch):
            left = (train.tokens - progress.tokens) // step.tokens
            left = min(left, train.steps - progress.step) if train.steps else left
            ahead = max(1, left // STRIDES) - 1  # a stride's steps before those up to the next decision
            steps = min(left, ahead + scheduler.steps_to_decision(progress.step + ahead))
            strides.append((steps, step.tokens))
            # Samples stay 0: no policy depends on them.
            progress = Progress(progress.step + steps, 0, progress.tokens + steps * step.tokens)
            scheduler.update(progress, forecast(progress.tokens))
        if not strides:  # the run is over
            return result
        result.append(Segment(nodes, begin, strides))
        state = scheduler.state()


def forecast_segments(config: Config, progress: Progress, noise: float | None) -> Config:
    """Return settings whose batch can be forecast: from tokens and, for `measured`, the forecast noise scale alone.

    The policy noise-scale is replaced by the law, scaled to the noise scale of now.
    """
    if config.batch.policy != "noise-scale":
        return config
    law = with_values(config, {"batch.policy": "law"})
    measured = BatchScheduler(config, 1).target(progress, noise)
    expected = BatchScheduler(law, 1).target(progress, None)
    if not (measured and expected):
        return law
    scale, exponent = config.batch.critical_batch
    return with_values(law, {"batch.critical_batch": (scale * measured / expected, exponent)})
