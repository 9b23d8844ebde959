"""A run that takes more nodes as its batch grows: the plan of `megahp launch --grow`, and what its jobs ask."""

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

SPEED_STEPS = 20  # of which the median is a run's speed


@dataclass(frozen=True)
class Chain:
    """A run that grows, and how far it is."""

    growth: Growth
    ranks_per_node: int
    progress: Progress
    plan: Mapping[str, Any]  # state of its batch plan
    noise: float | None  # the noise scale that its policy sees, examples


def read_chain(options: Namespace, config: Config) -> Chain:
    """From --nodes, --grow and --ranks-per-node, and the checkpoint that the run would go on from, or begin at. Raises
    UserError when it cannot grow so."""
    from megahp import checkpoint
    from megahp.train.prepare import initial_batch_state, newest

    if config.batch.policy == "constant":
        raise UserError("--grow: batch.policy = 'constant' never grows; set another policy, or leave --grow out")
    if options.grow < 2 * options.nodes:
        less = f"--grow {options.grow} is less than twice --nodes {options.nodes}"
        raise UserError(f"{less}, and nodes double; raise it, or leave it out")

    def dp(nodes: int) -> int:
        return fit(config.parallel, nodes * options.ranks_per_node).dp

    growth, plan = Growth(config, options.nodes, options.grow, dp), BatchScheduler(config, 1)
    for size in growth.sizes:
        dp(size)
    saved, origin = newest(config), config.train.start_from
    if not saved and not origin:
        return Chain(growth, options.ranks_per_node, Progress(), plan.state(), None)
    state = checkpoint.read_state(saved or checkpoint.find(checkpoint.location(origin)))
    before = resolve.from_dict(state["config"], "checkpoint")
    goes_on = state["batch_plan"] if saved else initial_batch_state(config, before, state, plan)
    averages = NoiseScale(1.0, config.batch.noise_to_total)
    averages.restore(state["noise_scale"])
    noise = averages.numbers()[plan.sees]
    return Chain(growth, options.ranks_per_node, Progress(**state["progress"]), goes_on, noise)


def describe_plan(chain: Chain, speed: float | None) -> str:
    """What remains of a run that grows, a line a segment, beside fixed numbers of nodes. speed: tokens a second of one
    node, by default as logged; where that is unknown, times are shares of the time on the first number of nodes."""
    from megahp.log.progress import human_count, human_duration

    growth, config = chain.growth, chain.growth.config
    parts, length = segments(growth, chain.progress, chain.plan, chain.noise), config.data.sequence_length
    if not parts:
        return "nothing remains to be trained"
    speed = speed or logged_speed(config.directory, chain.ranks_per_node)
    alone = growth.seconds(parts, growth.nodes, speed or 1.0)

    def row(what: str, nodes: str, times: Sequence[tuple[float, int]]) -> str:
        """times: (seconds, nodes)."""
        seconds, hours = (sum(column) for column in zip(*((each, each * n) for each, n in times), strict=True))
        if speed:
            return f"{what:<43}{nodes:>7}{human_duration(seconds):>12}{hours / 3600:>12,.1f}"
        return f"{what:<43}{nodes:>7}{seconds / alone:>12.0%}{hours / alone / growth.nodes:>12.0%}"

    times = [(growth.seconds([part], part.nodes, speed or 1.0), part.nodes) for part in parts]
    lines = [f"{'tokens':<18}{'batch':<16}{'steps':>9}{'nodes':>7}{'time':>12}{'node-hours':>12}"]
    for part, each in zip(parts, times, strict=True):
        tokens = f"{human_count(part.begin)} to {human_count(part.end)}"
        batch = f"{part.strides[0][1] // length} to {part.strides[-1][1] // length}"
        lines.append(row(f"{tokens:<18}{batch:<16}{part.steps:>9,}", str(part.nodes), [each]))
    lines.append(row("growing", f"to {parts[-1].nodes}", times))
    for nodes in dict.fromkeys((growth.nodes, parts[-1].nodes)):
        lines.append(row("throughout", str(nodes), [(growth.seconds(parts, nodes, speed or 1.0), nodes)]))
    unit = f"100%: on {growth.nodes} throughout (--speed)"
    if speed:
        unit = f"{human_count(speed)} tokens a second and node"
    return "\n".join([*lines, f"{unit}; as if nodes were as fast together as alone, and were never waited for"])


def logged_speed(run: Path, ranks_per_node: int) -> float | None:
    """Tokens a second of one node, the median of a run's last steps; None where nothing is logged."""
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
    except (TypeError, ZeroDivisionError):  # a log that others wrote
        return None
