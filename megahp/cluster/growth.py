"""Growth: the batch plan turned into segments of a run on more and more nodes, so that each node's load stays."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megahp.config import Config, with_values
from megahp.scaling.batch import BatchScheduler, Progress, least_batch, noise_forecast

STRIDES = 2000  # the steps left are foretold in so many strides at least


@dataclass(frozen=True)
class Growth:
    """The nodes of a run: so many at batch.global_batch, twice as many whenever the batch has doubled."""

    config: Config
    nodes: int
    largest: int  # number of nodes
    dp: Callable[[int], int]  # number of nodes -> data-parallel ranks

    @property
    def sizes(self) -> list[int]:
        """Numbers of nodes, ascending."""
        sizes = [self.nodes]
        while 2 * sizes[-1] <= self.largest:
            sizes.append(2 * sizes[-1])
        return sizes

    def nodes_for(self, batch: int, at_most: int | None = None) -> int:
        """The most nodes, not above at_most, that a batch keeps as busy as batch.global_batch the first ones. Batches
        are in sequences of the run's first length."""
        busy = self.nodes * batch / self.config.batch.global_batch
        limit = busy if at_most is None else min(busy, at_most)
        return max((size for size in self.sizes if size <= limit), default=self.nodes)

    def stop_at(self, batch: int) -> int:
        """The next batch to want more nodes than this one does; 0 = none will."""
        more = 2 * self.nodes_for(batch)
        return self.config.batch.global_batch * more // self.nodes if more <= self.largest else 0

    def seconds(self, parts: Sequence[Segment], nodes: int, speed: float) -> float:
        """Of these segments, all on one number of nodes, each of which takes speed tokens a second however many there
        are. A step takes no less than that of the smallest batch that the nodes can share."""
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
        return sum(steps for steps, _ in self.strides)

    @property
    def end(self) -> int:
        """Tokens."""
        return self.begin + sum(steps * tokens for steps, tokens in self.strides)


def segments(growth: Growth, progress: Progress, state: Mapping[str, Any], noise: float | None) -> list[Segment]:
    """What remains of a run. state: of its batch plan; noise: the noise scale that its policy sees, examples, None
    where it is not known."""
    config, found = forecast_segments(growth.config, progress, noise), list[Segment]()
    train, forecast = config.train, noise_forecast(config, progress, noise)
    every = config.batch.look_every if config.batch.policy == "measured" else 1
    while True:
        nodes, begin = growth.nodes_for(state["batch"]), progress.tokens
        plan = BatchScheduler(config, growth.dp(nodes))
        plan.load_state(state, progress)
        stop_at, strides = growth.stop_at(state["batch"]), list[tuple[int, int]]()
        while (step := plan.step(progress)) and not (strides and 0 < stop_at <= plan.batch):
            left = (train.tokens - progress.tokens) // step.tokens
            left = min(left, train.steps - progress.step) if train.steps else left
            steps = max(1, left // STRIDES)
            steps = min(left, steps - (progress.step + steps) % -every)  # on to the next look
            strides.append((steps, step.tokens))
            # samples are nothing that a policy looks at
            progress = Progress(progress.step + steps, 0, progress.tokens + steps * step.tokens)
            plan.look(progress, forecast(progress.tokens))
        if not strides:  # the run is over
            return found
        found.append(Segment(nodes, begin, strides))
        state = plan.state()


def forecast_segments(config: Config, progress: Progress, noise: float | None) -> Config:
    """Settings whose batch depends on tokens and, for `measured`, on the forecast noise scale alone: for the policy
    noise-scale those of the law, as high as the noise scale is now."""
    if config.batch.policy != "noise-scale":
        return config
    law = with_values(config, {"batch.policy": "law"})
    measured, expected = BatchScheduler(config, 1).aim(progress, noise), BatchScheduler(law, 1).aim(progress, None)
    if not (measured and expected):
        return law
    scale, exponent = config.batch.critical_batch
    return with_values(law, {"batch.critical_batch": (scale * measured / expected, exponent)})
