"""From the work of each pipeline rank to the seconds of a step on a machine.

A kernel takes the longer of computing and moving its bytes; a collective a latency and its bytes over the slowest link
in its way; what the engine overlaps counts as far as it is longer than what it is hidden behind.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache

from megahp.config import Config
from megahp.parallel.layout import AXES, Layout, fit
from megahp.parallel.stages import stages_of
from megahp.plan.machine import Machine
from megahp.plan.rank import MEGAHP, Stack
from megahp.plan.schedules import Action, actions, replay, steady
from megahp.plan.work import Collective, Kernel, Work, first_step
from megahp.scaling.flops import training_flops

# Tiles of a product that libraries choose from, and their speed relative to the first's.
TILES = ((128, 256, 1.0), (256, 128, 1.0), (128, 128, 0.96), (128, 64, 0.8), (64, 64, 0.6))
RAMP = 192  # of a product's inner dimension: what filling and draining a tile costs
UNALIGNED = 2.5  # how many times longer a product takes whose rows are not of 16 bytes
HIDDEN_AXES = ("dp_shard", "dp_shard_cp", "dp_shard_ep", "dp_shard_ep_cp", "dp_replicate")
GAP = 2e-6  # seconds between two kernels on the device


@dataclass(frozen=True)
class Estimate:
    """What a step takes: times in seconds, of the rank that computes longest; memory in bytes, of the fullest."""

    seconds: float
    split: dict[str, float]  # products, attention, memory, launches, exposed <axis>..., bubble, optimizer
    peak: dict[str, int]
    tokens_per_second: float
    mfu: float  # 6 operations a weight without the input embedding, and half of attention, over the peak
    hfu: float  # with what is computed again
    bytes: int = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "bytes", sum(self.peak.values()))


def step_time(works: Sequence[Work], config: Config, ranks: int, machine: Machine, stack: Stack = MEGAHP) -> Estimate:
    """Return the estimate of a step from the work of one rank of each pipeline position."""
    layout = fit(config.parallel, ranks)
    plan = first_step(config, layout.dp)
    count = plan.num_microbatches(layout.dp)
    by_work = {id(work): _RankTimes(work, layout, machine, stack) for work in works}
    times = [by_work[id(work)] for work in works]
    split: Counter[str] = Counter()
    if layout.pp == 1:
        total = sum(_alone(times[0], machine, split).values())
    else:
        total = _in_pipeline(times, config, count, layout, machine, split)
    busiest = max(times, key=lambda each: each.compute("forward", "backward"))
    for phase in ("forward", "backward"):
        split.update(busiest.kinds[phase])
    update = max(each.update for each in times)
    split["optimizer"] = update
    seconds = total + update
    tokens = plan.tokens
    peak = max((dict(work.peak) for work in works), key=lambda kinds: sum(kinds.values()))
    device = ranks * getattr(machine.peak, config.train.dtype) * seconds
    outer = config.model
    recomputed = outer.layers if config.compute.recompute == "full" else 0
    mfu = tokens * training_flops(outer, plan.length) / device
    hfu = tokens * training_flops(outer, plan.length, True, recomputed) / device
    return Estimate(seconds, dict(split), peak, tokens / seconds, mfu, hfu)


class _RankTimes:
    """The seconds of one rank's kernels and collectives in a step, by phase."""

    def __init__(self, work: Work, layout: Layout, machine: Machine, stack: Stack) -> None:
        self.kinds: dict[str, Counter[str]] = {phase: Counter() for phase in ("forward", "backward", "update")}
        self.exposed: dict[str, Counter[str]] = {phase: Counter() for phase in self.kinds}
        self.hidden: dict[str, float] = dict.fromkeys(self.kinds, 0.0)
        launches: Counter[str] = Counter()
        self.stream: list[float] = []
        for kernel, times in work.kernels.items():
            kind = {"product": "products", "attention": "attention"}.get(kernel.kind, "memory")
            self.kinds[kernel.phase][kind] += times * kernel_seconds(kernel, machine, stack.attention)
            launches[kernel.phase] += times
        for each, times in work.collectives.items():
            seconds = times * collective_seconds(each, layout, machine)
            if each.axes == "pp":
                self.stream = [seconds / times]
                continue
            if each.axes in HIDDEN_AXES and each.phase != "update" and each.name != "all-to-all":
                self.hidden[each.phase] += seconds
                continue
            if each.axes == "tp" and each.bytes > 1e6:
                seconds *= 1 - stack.hidden_tp
            self.exposed[each.phase][each.axes] += seconds
        for phase, kinds in self.kinds.items():
            waiting = launches[phase] * machine.launch - sum(kinds.values())
            if waiting > 0:
                kinds["launches"] = waiting

    def compute(self, *phases: str) -> float:
        return sum(sum(self.kinds[phase].values()) for phase in phases)

    def busy(self, phase: str) -> float:
        """Seconds of computing and of communication that nothing hides."""
        return self.compute(phase) + sum(self.exposed[phase].values())

    @property
    def update(self) -> float:
        return self.busy("update")


def _alone(times: _RankTimes, machine: Machine, split: Counter[str]) -> dict[str, float]:
    """Return the seconds of forward and backward passes without a pipeline, gathers and reductions behind them."""
    found = {}
    for phase in ("forward", "backward"):
        busy = times.busy(phase)
        exposed = beside(times.hidden[phase], busy, machine)
        found[phase] = busy + exposed
        split["exposed dp"] += exposed
        for axes, seconds in times.exposed[phase].items():
            split[f"exposed {axes}"] += seconds
    return found


def beside(hidden: float, busy: float, machine: Machine) -> float:
    """Return the seconds that communication adds to what it runs beside: all that is longer, and a share of the rest,
    since it takes multiprocessors and memory bandwidth."""
    return max(0.0, hidden - busy) + machine.efficiency.contention * min(hidden, busy)


def _in_pipeline(
    times: Sequence[_RankTimes], config: Config, count: int, layout: Layout, machine: Machine, split: Counter[str]
) -> float:
    """Return the seconds of forward and backward passes by replaying the schedule."""
    parallel = config.parallel
    parts = count * parallel.local_stages
    forward = [each.busy("forward") / parts for each in times]
    backward = [each.busy("backward") / parts for each in times]

    stream = [each for each in times[0].stream]

    def transfer(source: int, target: int) -> float:
        return 0.0 if source == target else (stream[0] if stream else 0.0)

    def seconds(action: Action) -> float:
        rank = rank_of[action.stage]
        return forward[rank] if action.kind == "F" else backward[rank] / (1 if action.kind == "B" else 2)

    few, more = steady(parallel, count)
    rank_of = {stage: rank for rank in range(parallel.pp) for stage in stages_of(rank, parallel)}
    last = replay(actions(parallel, few), seconds, transfer)
    if more > few:
        last += (replay(actions(parallel, more), seconds, transfer) - last) / (more - few) * (count - few)
    busy = [count * parallel.local_stages * (ahead + back) for ahead, back in zip(forward, backward, strict=True)]
    exposed = max(beside(sum(each.hidden.values()), back, machine) for each, back in zip(times, backward, strict=True))
    split["exposed dp"] = exposed
    split["bubble"] = last - max(busy)
    busiest = max(times, key=lambda each: each.busy("forward") + each.busy("backward"))
    for phase in ("forward", "backward"):
        for axes, value in busiest.exposed[phase].items():
            split[f"exposed {axes}"] += value
    return last + exposed


def kernel_seconds(kernel: Kernel, machine: Machine, attention: float = 1.0) -> float:
    """Return the seconds of one call on the device."""
    efficiency = machine.efficiency
    moved = kernel.bytes / (machine.memory_bandwidth * efficiency.memory)
    if kernel.kind == "memory":
        return moved + GAP
    peak = getattr(
        machine.peak, kernel.dtype if kernel.dtype in ("float32", "float16", "bfloat16", "float8") else "float32"
    )
    if kernel.kind == "attention":
        return (
            max(moved, _attention_seconds(kernel, peak * machine.best.attention * efficiency.attention * attention))
            + GAP
        )
    aligned = math.gcd(*kernel.shape[1:], 64)
    if aligned < 8:  # rows are not of 16 bytes, which the matrix units need
        peak = machine.peak.float32
    slow = {8: 1.2, 16: 1.1, 32: 1.05}.get(aligned, 1.0)
    return (
        max(moved, slow * _tiled(kernel.shape, machine.units) / (peak * machine.best.products * efficiency.products))
        + GAP
    )


def _tiled(shape: tuple[int, ...], units: int) -> float:
    """Return the operations of a product with those that its tiles waste: parts of tiles outside the matrix, and
    multiprocessors that have none in the last wave."""
    batch, m, n, k = shape
    best = math.inf
    for rows, columns, speed in TILES:
        waves = batch * math.ceil(m / rows) * math.ceil(n / columns) / units
        best = min(best, math.ceil(waves) * units * rows * columns / speed)
    return 2 * best * (k + RAMP)


def _attention_seconds(kernel: Kernel, rate: float) -> float:
    """Return the seconds of a fused kernel, which leaves out the blocks above the diagonal."""
    batch, heads, queries, keys, size = kernel.shape
    causal = 0.5 * (1 + 128 / keys)
    # small heads: the exponentials, which are as many, take a larger share; short sequences: blocks on the diagonal
    slow = (1 + 0.1 * (128 / size - 1)) if size < 128 else 1.0
    backward = 1.15 if kernel.name.endswith("backward") else 1.0
    return kernel.flops * causal * slow * backward * (1 + 512 / queries) / rate


@lru_cache(maxsize=10_000)
def placement(axes: str, layout: Layout, gpus_per_node: int) -> tuple[int, int]:
    """Return over how many nodes a group lies, and how many of its ranks are on each."""
    sizes = dict(zip(AXES, layout.shape, strict=True))
    named = [axis for axis in AXES if axis in split_axes(axes)]
    if axes == "world":
        named = list(AXES)
    if axes == "ends":
        named = ["pp"]
    offsets = [0]
    for axis in named:
        stride = math.prod(sizes[other] for other in AXES[AXES.index(axis) + 1 :])
        offsets = [offset + stride * step for offset in offsets for step in range(sizes[axis])]
    nodes = Counter(offset // gpus_per_node for offset in offsets)
    return len(nodes), max(nodes.values())


def split_axes(axes: str) -> list[str]:
    """Return the axes of a joined name: dp_shard_cp -> dp_shard, cp. FSDP2's dp_shard includes ep."""
    found = [axis for axis in AXES if f"_{axis}_" in f"_{axes}_"]
    return [*found, "ep"] if "dp_shard" in found else found


def collective_seconds(each: Collective, layout: Layout, machine: Machine) -> float:
    """Return the seconds of one call: rings through the links inside the nodes, and all adapters of the group's ranks
    between them."""
    links, efficiency = machine.links, machine.efficiency
    nodes, local = placement(each.axes, layout, machine.gpus_per_node)
    inside = links.node_bandwidth * efficiency.node
    if nodes > 1:
        across = local * links.network_bandwidth * efficiency.network
        bandwidth = min(inside, across) if local > 1 else across
    else:
        bandwidth = inside
    if each.name in ("send", "receive"):
        return each.bytes / bandwidth
    n = nodes * local
    share = (n - 1) / n * (2 if each.name == "all-reduce" else 1)
    latency = (nodes - 1) * links.network_latency + (n - nodes) / max(nodes, 1) * links.node_latency
    return each.bytes * share / bandwidth + latency * (2 if each.name == "all-reduce" else 1)
