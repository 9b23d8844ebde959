"""A run whose jobs use more nodes as its batch grows: the plan of `megahp launch --grow`, which its jobs query."""

import itertools
import math
import statistics
from argparse import Namespace
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megahp.cluster.growth import Growth, segments
from megahp.config import Config, resolve
from megahp.errors import UserError
from megahp.parallel.layout import Layout, fit
from megahp.scaling.batch import BatchScheduler, Progress
from megahp.scaling.noise_scale import NoiseScale

SPEED_STEPS = 20  # whose median is a run's speed


@dataclass(frozen=True)
class Chain:
    """A growing run and its progress."""

    growth: Growth
    ranks_per_node: int
    progress: Progress
    plan: Mapping[str, Any]  # state of its batch scheduler
    noise: float | None  # the noise scale that its policy reads, examples


def read_chain(options: Namespace, config: Config) -> Chain:
    """Return the chain of --nodes, --grow and --ranks-per-node, at the checkpoint that the run would resume or start
    from. Raises UserError when it cannot grow like this."""
    from megahp import checkpoint
    from megahp.train.prepare import initial_batch_state, newest

    if not config.batch.grows:
        raise UserError("--grow: batch.policy = 'constant' never grows; set another policy, or omit --grow")
    if options.grow < 2 * options.nodes:
        few = f"--grow {options.grow} is less than twice --nodes {options.nodes}"
        raise UserError(f"{few}, and nodes double; raise it, or omit it")

    def dp(nodes: int) -> int:
        return fit(config.parallel, nodes * options.ranks_per_node).dp

    growth, scheduler = Growth(config, options.nodes, options.grow, dp), BatchScheduler(config, 1)
    for size in growth.sizes:  # raises where the layout does not fit
        dp(size)
    resumed, origin = newest(config), config.train.start_from
    if not resumed and not origin:
        return Chain(growth, options.ranks_per_node, Progress(), scheduler.state(), None)
    state = checkpoint.read_state(resumed or checkpoint.find(checkpoint.location(origin)))
    before = resolve.from_dict(state["config"], "checkpoint")
    plan = state["batch_plan"] if resumed else initial_batch_state(config, before, state, scheduler)
    averages = NoiseScale(1.0, config.batch.noise_to_total)
    averages.load_state(state["noise_scale"])
    noise = averages.numbers()[scheduler.noise_key]
    return Chain(growth, options.ranks_per_node, Progress(**state["progress"]), plan, noise)


def describe_plan(chain: Chain, speed: float | None) -> str:
    """Return a table of what remains of a growing run, a row per segment, beside fixed numbers of nodes.

    speed: tokens per second of one node (default: as logged); where it is unknown, times are shares of the time on the
    first number of nodes.
    """
    from megahp.log.progress import human_count, human_duration

    growth, config = chain.growth, chain.growth.config
    parts, length = segments(growth, chain.progress, chain.plan, chain.noise), config.data.sequence_length
    if not parts:
        return "nothing remains to be trained"
    speed = speed or logged_speed(config.directory, chain.ranks_per_node)
    fixed = growth.seconds(parts, growth.nodes, speed or 1.0)

    def row(label: str, nodes: str, times: Sequence[tuple[float, int]]) -> str:
        """times: (seconds, nodes)."""
        seconds = sum(seconds for seconds, _ in times)
        node_seconds = sum(seconds * count for seconds, count in times)
        if speed:
            return f"{label:<43}{nodes:>7}{human_duration(seconds):>12}{node_seconds / 3600:>12,.1f}"
        return f"{label:<43}{nodes:>7}{seconds / fixed:>12.0%}{node_seconds / fixed / growth.nodes:>12.0%}"

    times = [(growth.seconds([part], part.nodes, speed or 1.0), part.nodes) for part in parts]
    lines = [f"{'tokens':<18}{'batch':<16}{'steps':>9}{'nodes':>7}{'time':>12}{'node-hours':>12}"]
    for part, time in zip(parts, times, strict=True):
        tokens = f"{human_count(part.begin)} to {human_count(part.end)}"
        batch = f"{part.strides[0][1] // length} to {part.strides[-1][1] // length}"
        lines.append(row(f"{tokens:<18}{batch:<16}{part.steps:>9,}", str(part.nodes), [time]))
    lines.append(row("growing", f"to {parts[-1].nodes}", times))
    for nodes in dict.fromkeys((growth.nodes, parts[-1].nodes)):
        lines.append(row("throughout", str(nodes), [(growth.seconds(parts, nodes, speed or 1.0), nodes)]))
    unit = f"100%: on {growth.nodes} throughout (--speed)"
    if speed:
        unit = f"{human_count(speed)} tokens a second and node"
    return "\n".join([*lines, f"{unit}; assumes that speed scales with nodes, and no waiting for nodes"])


def logged_speed(run: Path, ranks_per_node: int) -> float | None:
    """Return tokens per second of one node, the median of a run's last steps; None where nothing is logged."""
    from megahp.log.events import STARTS
    from megahp.log.metrics import newest_events, newest_metrics

    if not (run / "metrics.jsonl").exists():
        return None
    layout = next((event.get("layout") for event in newest_events(run) if event["event"] in STARTS), None)
    steps = itertools.islice(newest_metrics(run), SPEED_STEPS)
    speeds = [speed for step in steps if (speed := step.get("tokens_per_second"))]
    if not isinstance(layout, dict) or not speeds:
        return None
    try:
        return statistics.median(speeds) * ranks_per_node / math.prod(Layout(**layout).shape)
    except (TypeError, ZeroDivisionError):  # the log may be of another version, or edited
        return None
