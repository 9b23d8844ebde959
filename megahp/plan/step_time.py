"""From the work of each pipeline rank to the seconds of a step on a machine.

A kernel takes the longer of computing and of moving its bytes; a collective a latency, and its bytes over the slowest
link in its way. Gathering and reducing of weights run beside computing, and add what is longer than that and a share of
the rest; tensor and context parallelism's collectives are waited for. Pipelines are replayed, action by action.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from megahp.config import Config
from megahp.errors import UserError
from megahp.parallel.layout import AXES, Layout, fit
from megahp.parallel.stages import owner
from megahp.plan.formulas import rank_works
from megahp.plan.machine import Machine
from megahp.plan.rank import MEGAHP, Stack
from megahp.plan.schedules import Action, actions, replay, steady
from megahp.plan.work import Collective, Kernel, Work, first_step, on_gpus
from megahp.scaling.flops import training_flops

# Tiles of a product that libraries choose from, and their speed relative to the first's. (Assumed, after CUTLASS)
TILES = ((128, 256, 1.0), (256, 128, 1.0), (128, 128, 0.96), (128, 64, 0.8), (64, 64, 0.6))
# How many times longer a product takes whose dimensions are multiples of so many numbers, not of 64. Below 8 the matrix
# units cannot load 16 bytes at once, and float32's units compute it. (NVIDIA's matrix multiplication guide; assumed)
ALIGNED = {8: 1.2, 16: 1.1, 32: 1.05}
ATTENTION_RAMP = 8 / 3  # keys that filling a block of queries costs, in the machine's ramps (assumed)
ATTENTION_BACKWARD = 1.15  # how many times longer an operation takes than in the forward pass (FlashAttention 2)
GAP = 2e-6  # seconds between two kernels on the device (assumed)


@dataclass(frozen=True)
class Estimate:
    """What a step takes."""

    seconds: float
    # seconds of the busiest rank: products, attention, memory, launches, bubble, optimizer, exposed <axes>
    split: dict[str, float]
    peak: dict[str, int]  # bytes of the fullest rank by kind
    tokens_per_second: float
    mfu: float  # 6 operations a weight without the input embedding, and half of attention, over the peak
    hfu: float  # all operations that run, and half of attention, over the peak

    @property
    def bytes(self) -> int:
        """Bytes of the fullest rank."""
        return sum(self.peak.values())


def estimate(config: Config, ranks: int, machine: Machine, stack: Stack | None = None) -> Estimate:
    """Return the estimate of the first step by formulas alone, by default of megahp's own: of thousands of layouts in
    seconds, without torch.

    config: resolved, with its vocabulary. Raises UserError for a layout that these ranks cannot run.
    """
    return step_time(rank_works(config, ranks, stack), config, ranks, machine, stack or MEGAHP)


def step_time(works: Sequence[Work], config: Config, ranks: int, machine: Machine, stack: Stack = MEGAHP) -> Estimate:
    """Return the estimate of the first step from the work, traced or counted, of a rank of each pipeline position."""
    layout = fit(config.parallel, ranks)
    plan = first_step(config, layout.dp)
    distinct = {id(work): _Times(work, layout, machine, stack) for work in works}  # ranks alike share theirs
    times = [distinct[id(work)] for work in works]
    busiest = max(times, key=lambda each: each.busy("forward") + each.busy("backward"))
    split: defaultdict[str, float] = defaultdict(float)
    for phase in ("forward", "backward"):
        for name, seconds in busiest.kinds[phase].items():
            split[name] += seconds
        for axes, seconds in busiest.exposed[phase].items():
            split[f"exposed {axes}"] += seconds
    if layout.pp == 1:
        split["exposed dp"] = sum(beside(busiest.hidden[each], busiest.busy(each), machine) for each in busiest.hidden)
    else:
        count = plan.num_microbatches(layout.dp)
        last_pass = busiest.busy("backward") / count
        split["exposed dp"] = beside(sum(busiest.hidden.values()), last_pass, machine)
        passes = busiest.busy("forward") + busiest.busy("backward")
        split["bubble"] = pipeline_seconds(times, config, count) - passes
    last = max(times, key=lambda each: each.busy("update"))
    split["optimizer"] = sum(last.kinds["update"].values())
    for axes, seconds in last.exposed["update"].items():
        split[f"exposed {axes}"] += seconds
    total = sum(split.values())
    done = sum(work.flops("product") + causal_flops(work) for work in works) * ranks / len(works)
    peak_rate = ranks * peak_of(machine, on_gpus(config).train.dtype) * total
    return Estimate(
        total,
        {name: seconds for name, seconds in split.items() if seconds},
        dict(max(works, key=lambda work: work.bytes).peak),
        plan.tokens / total,
        plan.tokens * training_flops(config.model, plan.length) / peak_rate,
        done / peak_rate,
    )


def causal_flops(work: Work) -> float:
    """Return the operations of attention on keys that are no later than the query, which are the last of the keys."""
    found = 0.0
    for kernel, count in work.kernels.items():
        if kernel.kind == "attention":
            _, _, queries, keys, _ = kernel.shape
            found += count * kernel.flops * (1 - queries / (2 * keys))
    return found


class _Times:
    """The seconds of one rank's kernels and collectives in a step, by phase.

    kinds: of kernels; exposed: of collectives that are waited for, by axes; hidden: of those that run beside kernels;
    transfer: of one stream between two stages.
    """

    def __init__(self, work: Work, layout: Layout, machine: Machine, stack: Stack) -> None:
        phases = ("forward", "backward", "update")
        self.kinds: dict[str, defaultdict[str, float]] = {phase: defaultdict(float) for phase in phases}
        self.exposed: dict[str, defaultdict[str, float]] = {phase: defaultdict(float) for phase in phases}
        self.hidden = dict.fromkeys(phases, 0.0)
        self.transfer = 0.0
        launched = dict.fromkeys(phases, 0.0)
        for kernel, times in work.kernels.items():
            name = {"product": "products"}.get(kernel.kind, kernel.kind)
            self.kinds[kernel.phase][name] += times * kernel_seconds(kernel, machine, stack.attention)
            launched[kernel.phase] += times * machine.launch
        for each, times in work.collectives.items():
            seconds = collective_seconds(each, layout, machine)
            of_weights = each.axes.startswith(("dp_", "ep")) and each.name != "all-to-all"
            if each.axes == "pp":
                self.transfer = seconds
            elif layout.is_sharded and each.phase != "update" and of_weights:
                # FSDP gathers and reduces while kernels run; replicas without shards sum after the last backward pass
                self.hidden[each.phase] += times * seconds
            else:
                beside_products = stack.hidden_tp if each.axes == "tp" else 0.0
                self.exposed[each.phase][each.axes] += times * seconds * (1 - beside_products)
        for phase, kinds in self.kinds.items():
            # the host launches kernels ahead of the device, unless they are too short
            kinds["launches"] = max(0.0, launched[phase] - sum(kinds.values()))

    def busy(self, phase: str) -> float:
        """Return the seconds of computing, and of communication that is waited for."""
        return sum(self.kinds[phase].values()) + sum(self.exposed[phase].values())


def beside(hidden: float, busy: float, machine: Machine) -> float:
    """Return the seconds that communication adds to what it runs beside: all that is longer, and a share of the rest,
    since it takes multiprocessors and memory bandwidth from it."""
    return max(0.0, hidden - busy) + machine.efficiency.contention * min(hidden, busy)


def pipeline_seconds(times: Sequence[_Times], config: Config, count: int) -> float:
    """Return the seconds of all forward and backward passes of `count` microbatches, by replaying the schedule."""
    parallel = config.parallel
    passes = count * parallel.local_stages
    forward, backward = ([each.busy(phase) / passes for each in times] for phase in ("forward", "backward"))

    def seconds(action: Action) -> float:
        rank = owner(action.stage, parallel)
        if action.kind == "F":
            return forward[rank]
        return backward[rank] if action.kind == "B" else backward[rank] / 2  # inputs' and weights' gradients alike

    def transfer(source: int, target: int) -> float:
        return 0.0 if source == target else times[source].transfer

    few, more = steady(parallel, count)
    total = replay(actions(parallel, few), seconds, transfer)
    if more > few:
        total += (replay(actions(parallel, more), seconds, transfer) - total) / (more - few) * (count - few)
    return total


def peak_of(machine: Machine, dtype: str) -> float:
    """Return the operations a second of products in a dtype. Raises UserError where a machine does not compute it."""
    peak = getattr(machine.peak, dtype, machine.peak.float32 / 2)  # float64
    if not peak:
        raise UserError(f"machine {machine.name} has no {dtype}; set compute.fp8=none, or name another machine")
    return peak


def kernel_seconds(kernel: Kernel, machine: Machine, attention: float = 1.0) -> float:
    """Return the seconds of one call on the device. attention: speed of fused attention, relative to the machine's."""
    best, efficiency = machine.best, machine.efficiency
    moving = kernel.bytes / (machine.memory_bandwidth * efficiency.memory)
    if kernel.kind == "memory":
        return moving + GAP
    peak = peak_of(machine, kernel.dtype)
    if kernel.kind == "attention":
        rate = peak * best.attention * efficiency.attention * attention
        return max(moving, _attention_operations(kernel, machine.ramp) / rate) + GAP
    multiple = math.gcd(*kernel.shape[1:], 64)
    if multiple < min(ALIGNED):
        peak = machine.peak.float32
    rate = peak * best.products * efficiency.products
    computing = _tiled_operations(kernel.shape, machine.units, machine.ramp) / rate
    return max(moving, ALIGNED.get(multiple, 1.0) * computing) + GAP


def _tiled_operations(shape: tuple[int, ...], units: int, ramp: int) -> float:
    """Return a product's operations with those that its tiles waste: outside the matrix, and in a last wave that leaves
    multiprocessors without one."""
    batch, m, n, k = shape
    best = math.inf
    for rows, columns, speed in TILES:
        waves = math.ceil(batch * math.ceil(m / rows) * math.ceil(n / columns) / units)
        best = min(best, waves * units * rows * columns / speed)
    return 2 * best * (k + ramp)


def _attention_operations(kernel: Kernel, ramp: int) -> float:
    """Return the operations of fused attention, as long as those of large heads and long sequences: blocks above the
    diagonal are left out, but not those on it; exponentials take a larger share where heads are small."""
    _, _, queries, keys, size = kernel.shape
    causal = 1 - max(0, queries - 128) / (2 * keys)  # the queries are the last of the keys
    small = 1 + 0.1 * (128 / size - 1) if size < 128 else 1.0
    short = 1 + ATTENTION_RAMP * ramp / queries
    return kernel.flops * causal * small * short * (ATTENTION_BACKWARD if kernel.name.endswith("backward") else 1.0)


@lru_cache(maxsize=10_000)
def placement(axes: str, layout: Layout, gpus_per_node: int) -> tuple[int, int]:
    """Return over how many nodes a group of ranks along these axes lies, and how many of its ranks are on each."""
    sizes = dict(zip(AXES, layout.shape, strict=True))
    named = {"world": AXES, "ends": ("pp",)}.get(axes, [axis for axis in AXES if f"_{axis}_" in f"_{axes}_"])
    ranks = [0]
    for axis in named:
        stride = math.prod(sizes[inner] for inner in AXES[AXES.index(axis) + 1 :])
        ranks = [rank + stride * step for rank in ranks for step in range(sizes[axis])]
    nodes = Counter(rank // gpus_per_node for rank in ranks)
    return len(nodes), max(nodes.values())


def collective_seconds(each: Collective, layout: Layout, machine: Machine) -> float:
    """Return the seconds of one call, as rings: inside nodes over their links, between nodes over the adapters of all
    the group's ranks there. (NCCL's; bandwidths as in its tests, docs/PERFORMANCE.md)"""
    links, efficiency = machine.links, machine.efficiency
    nodes, local = placement(each.axes, layout, machine.gpus_per_node)
    inside, across = links.node_bandwidth * efficiency.node, links.network_bandwidth * efficiency.network
    if each.name in ("send", "receive"):
        bandwidth, latency = (across, links.network_latency) if nodes > 1 else (inside, links.node_latency)
        return each.bytes / bandwidth + latency
    bandwidth = inside if nodes == 1 else across if local == 1 else min(inside, local * across)
    rounds = 2 if each.name == "all-reduce" else 1  # which is a reduce-scatter and an all-gather
    latency = (nodes - 1) * links.network_latency + (local - 1) * links.node_latency
    return rounds * (each.bytes * (each.size - 1) / each.size / bandwidth + latency)
