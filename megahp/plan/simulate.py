"""Simulate a whole run on a cluster: steps as the batch and the nodes grow, checkpoints, failures and restarts.

Failures come at random, at a rate in proportion to the GPUs. What a failure costs is the way back: the steps since the
newest complete checkpoint, and a restart. All trials of a run are simulated at once.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np

from megahp.cluster.growth import Growth, Segment, segments
from megahp.config import Config, with_values
from megahp.errors import UserError
from megahp.parallel.layout import fit
from megahp.plan.machine import Machine
from megahp.plan.step_time import estimate
from megahp.plan.work import first_step
from megahp.scaling.batch import BatchScheduler, Progress
from megahp.scaling.memory import checkpoint_bytes

TRIALS = 200
HOPELESS = 1000.0  # attempts that a run would need, on average, to get from one checkpoint to the next
StepSeconds = Callable[[int, int], float]  # (GPUs, tokens of a step) -> seconds


@dataclass(frozen=True)
class Conditions:
    """What befalls a run besides its steps; times in seconds.

    Defaults. mtbf: Llama 3's 54 days on 16,384 GPUs had 419 unexpected interruptions, one in 50,700 GPU-hours (arXiv
    2407.21783, 3.3.4). restart: ByteRobust requeues in 454 to 768 s (arXiv 2509.16293). storage: BLOOM wrote 2.3 TB
    in 40 s. pause: PyTorch's asynchronous checkpoints stop Llama 3 8B on 512 H100 for less (a secondary source).
    copying: assumed, of a pinned copy over PCIe 4.
    """

    mtbf: float = 5e4 * 3600  # between failures of one GPU, or of what it depends on
    restart: float = 600.0  # from a failure, or a job's end, to the next step: detection, queue, loading
    storage: float = 57e9  # bytes a second that all ranks together write
    pause: float = 0.5  # while training waits for a save, besides copying
    copying: float = 20e9  # bytes a second from a GPU to its host, while training waits


@dataclass(frozen=True)
class Timeline:
    """A segment as it would pass without failures, in seconds from its beginning."""

    segment: Segment
    gpus: int
    seconds: float  # of its steps alone
    saves: np.ndarray  # when training goes on after each save, the beginning first
    complete: np.ndarray  # when what was saved is a checkpoint
    end: float


@dataclass(frozen=True)
class Part:
    """What became of a segment: seconds and failures of every trial, [trials]."""

    timeline: Timeline
    elapsed: np.ndarray
    restarting: np.ndarray
    failures: np.ndarray


@dataclass(frozen=True)
class Forecast:
    """A simulated run, its shares weighted by GPUs."""

    parts: Sequence[Part]
    checkpoint_bytes: float
    stall: float  # seconds that training waits for a checkpoint, in the last segment
    optimal_interval: float  # seconds of training between checkpoints, of the last segment

    @property
    def elapsed(self) -> np.ndarray:
        """Seconds of the run in every trial."""
        return np.sum([part.elapsed for part in self.parts], axis=0)

    @property
    def late(self) -> float:
        """Seconds that nine of ten runs take at most."""
        return float(np.quantile(self.elapsed, 0.9))

    @property
    def gpu_seconds(self) -> float:
        return sum(float(part.elapsed.mean()) * part.timeline.gpus for part in self.parts)

    @property
    def node_seconds(self) -> float:
        return sum(float(part.elapsed.mean()) * part.timeline.segment.nodes for part in self.parts)

    @property
    def shares(self) -> dict[str, float]:
        """Shares of the GPUs' time: steps that count (goodput), saving, restarts, and steps that were lost."""
        total = self.gpu_seconds
        steps = sum(part.timeline.seconds * part.timeline.gpus for part in self.parts) / total
        saving = sum((part.timeline.end - part.timeline.seconds) * part.timeline.gpus for part in self.parts) / total
        restarts = sum(float(part.restarting.mean()) * part.timeline.gpus for part in self.parts) / total
        return {"goodput": steps, "saving": saving, "restarts": restarts, "lost steps": 1 - steps - saving - restarts}


def simulate(
    config: Config, gpus: int, largest: int, machine: Machine, conditions: Conditions, trials: int = TRIALS
) -> Forecast:
    """Return the forecast of a run on `gpus` GPUs, twice as many whenever its batch has doubled, up to `largest`.

    Raises UserError for a layout or a batch that these GPUs cannot run, and for failures that no checkpoint outruns.
    """
    per_node = min(gpus, machine.gpus_per_node)
    if gpus % per_node:
        raise UserError(f"--gpus {gpus} is not a whole number of nodes of {per_node}; make it a multiple")
    if largest != gpus and (largest < 2 * gpus or not config.batch.grows):
        grown = f"--grow {largest} from --gpus {gpus} with batch.policy = {config.batch.policy!r}"
        raise UserError(f"{grown}: nodes double as the batch does, and a constant one never does; raise it, or omit it")
    growth = Growth(
        config, gpus // per_node, largest // per_node, lambda nodes: fit(config.parallel, nodes * per_node).dp
    )
    plan = segments(growth, Progress(), BatchScheduler(config, 1).state(), None)
    if not plan:
        raise UserError(f"train.tokens = {config.train.tokens} leaves no step to simulate; raise it")
    seconds = step_seconds(config, machine)
    size = checkpoint_bytes(config)
    random, parts, steps = np.random.default_rng(config.train.seed), list[Part](), 0
    for segment in plan:
        on = segment.nodes * per_node
        stall = conditions.pause + size / on / conditions.copying
        timeline = timeline_of(segment, on, seconds, config.checkpoint.every, steps, stall, size / conditions.storage)
        parts.append(lives(timeline, conditions, random, trials))
        steps += segment.steps
    # Young's interval; Daly's corrections are small as long as a failure is rare in one (doi.org/10.1145/361147.361115)
    optimal = math.sqrt(2 * stall * conditions.mtbf / on)
    return Forecast(parts, size, stall, optimal)


def step_seconds(config: Config, machine: Machine) -> StepSeconds:
    """Return the seconds of a step as a function of GPUs and tokens: in the microbatches, a straight line through two
    estimates."""

    @cache
    def line(gpus: int) -> tuple[float, float, float]:
        dp, parallel = fit(config.parallel, gpus).dp, config.parallel
        few = 2 * dp * first_step(config, dp).micro_batch * parallel.pp
        first, second = (
            estimate(with_values(config, {"batch.global_batch": batch, "train.tokens": 10**18}), gpus, machine).seconds
            for batch in (few, 2 * few)
        )
        return few * config.data.sequence_length, first, second

    def seconds(gpus: int, tokens: int) -> float:
        few, first, second = line(gpus)
        return first + (second - first) * (tokens / few - 1)

    return seconds


def timeline_of(
    segment: Segment, gpus: int, seconds: StepSeconds, every: int, before: int, stall: float, write: float
) -> Timeline:
    """Return a segment's timeline. every: steps between checkpoints, 0 = at the end only; before: steps of the run
    before this segment; stall: seconds that training waits for a save; write: until it is complete."""
    counts = np.array([steps for steps, _ in segment.strides])
    passed = np.concatenate(([0], np.cumsum(counts)))
    clock = np.concatenate(([0.0], np.cumsum(counts * [seconds(gpus, tokens) for _, tokens in segment.strides])))
    multiples = range(before // every + 1, (before + int(passed[-1])) // every + 1) if every else range(0)
    due = [multiple * every - before for multiple in multiples]
    at = np.union1d([0], [*due, passed[-1]])  # a job saves at its end too
    gaps = np.diff(np.interp(at, passed, clock))
    gaps[1:] = np.maximum(gaps[1:], write)  # a save waits until the one before is complete
    saves = np.concatenate(([0.0], np.cumsum(gaps + stall)))
    complete = np.concatenate(([0.0], saves[1:] + write))
    return Timeline(segment, gpus, float(clock[-1]), saves, complete, float(complete[-1]))


def lives(timeline: Timeline, conditions: Conditions, random: np.random.Generator, trials: int) -> Part:
    """Return what becomes of a segment: lives that each begin with a restart at the newest complete checkpoint, and end
    with a failure or the segment. Raises UserError where the checkpoints are too far apart for failures this often."""
    rate, end = timeline.gpus / conditions.mtbf, timeline.end
    gap = float(np.diff(timeline.complete).max()) + conditions.restart
    if rate * gap > math.log(HOPELESS):
        raise UserError(
            f"on {timeline.gpus:,} GPUs something fails every {1 / rate / 60:,.3g} minutes, and from one checkpoint to "
            f"the next it takes {gap / 60:,.3g}, a restart included: the run never ends; lower checkpoint.every"
        )
    elapsed, restarting, failures, begin = (np.zeros(trials) for _ in range(4))
    alive = np.arange(trials)
    while alive.size:
        until = random.exponential(1 / rate, alive.size)
        left = conditions.restart + end - begin[alive]
        failed = until < left
        elapsed[alive] += np.minimum(until, left)
        restarting[alive] += np.minimum(until, conditions.restart)
        failures[alive] += failed
        alive, until = alive[failed], until[failed]
        reached = begin[alive] + np.maximum(until - conditions.restart, 0)
        newest = np.searchsorted(timeline.complete, reached, "right") - 1
        begin[alive] = np.maximum(begin[alive], timeline.saves[newest])
    return Part(timeline, elapsed, restarting, failures)
