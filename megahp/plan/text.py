"""Searches and simulated runs as tables."""

import datetime

from megahp.config.schema import toml_value
from megahp.log.progress import human_count, human_duration
from megahp.plan.machine import Machine
from megahp.plan.search import Candidate, Found, distinct, why_slower
from megahp.plan.simulate import Forecast

SHOWN = 6  # layouts
GIB = 2**30
HOUR = 3600.0


def layouts(found: Found, gpus: int, machine: Machine) -> str:
    """Return the best layouts as a table: of the first where its time and memory go, of others why they are slower."""
    best, *others = distinct(found.fitting)[:SHOWN]
    tried = f"{len(found.fitting) + len(found.too_large):,} layouts by formulas, the first's memory by its trace"
    lines = [f"{gpus:,} x {machine.name}, {machine.usable / GIB:,.1f} GiB of each usable; {tried}"]
    lines.append(f"{'step':>10}{'MFU':>8}{'HFU':>8}{'tokens/s a GPU':>16}{'memory':>12}")
    for each in (best, *others):
        estimate = each.estimate
        speed, memory = f"{estimate.tokens_per_second / gpus:,.0f}", f"{estimate.bytes / GIB:,.1f} GiB"
        shares = f"{estimate.mfu:>8.1%}{estimate.hfu:>8.1%}{speed:>16}{memory:>12}"
        why = "" if each is best else f": {why_slower(each, best)}"
        lines.append(f"{estimate.seconds:>8.3g} s{shares}  {each}{why}")
    split = sorted(best.estimate.split.items(), key=lambda item: -item[1])
    lines.append("the first, s:   " + ", ".join(f"{kind} {seconds:.3g}" for kind, seconds in split))
    peak = sorted(best.estimate.peak.items(), key=lambda item: -item[1])
    lines.append("the first, GiB: " + ", ".join(f"{kind} {size / GIB:.2f}" for kind, size in peak if size))
    if found.too_large and found.too_large[0].estimate.seconds < best.estimate.seconds:
        fastest = found.too_large[0].estimate
        lines.append(f"too large: {fastest.seconds:.3g} s, {fastest.bytes / GIB:,.1f} GiB, {found.too_large[0]}")
    return "\n".join(lines)


def sections(candidate: Candidate) -> str:
    """Return the sections of a run file that make this layout."""
    lines: list[str] = []
    for key, value in sorted(candidate.settings.items(), key=lambda item: item[0].partition(".")[0] != "parallel"):
        section, _, name = key.partition(".")
        if f"[{section}]" not in lines:
            lines.append(f"[{section}]")
        lines.append(f"{name} = {toml_value(value)}")
    return "\n".join(lines)


def forecast(found: Forecast, length: int, begin: datetime.date, price: float | None, every: int) -> str:
    """Return a simulated run as a table, a row per number of GPUs, and what the whole run comes to.

    length: tokens of a sequence; price: of a GPU for an hour; every: steps between checkpoints.
    """
    lines = [f"{'tokens':<18}{'batch':<16}{'steps':>10}{'GPUs':>8}{'a step':>10}{'time':>14}{'failures':>10}"]
    for part in found.parts:
        timeline, strides = part.timeline, part.timeline.segment.strides
        tokens = f"{human_count(timeline.segment.begin)} to {human_count(timeline.segment.end)}"
        batch = f"{strides[0][1] // length} to {strides[-1][1] // length}"
        steps, passed = timeline.segment.steps, human_duration(float(part.elapsed.mean()))
        numbers = f"{timeline.gpus:>8,}{timeline.seconds / steps:>8.3g} s{passed:>14}{part.failures.mean():>10.1f}"
        lines.append(f"{tokens:<18}{batch:<16}{steps:>10,}{numbers}")
    mean, late = float(found.elapsed.mean()), found.late
    end = begin + datetime.timedelta(seconds=mean)
    shares = ", ".join(f"{kind} {share:.1%}" for kind, share in found.shares.items())
    lines.append(f"ends        after {human_duration(mean)}, {end}; nine of ten runs within {human_duration(late)}")
    lines.append(f"time        {shares}")
    hours = found.gpu_seconds / HOUR
    cost = f", {hours * price:,.0f} at {price:g} an hour" if price else ""
    lines.append(f"GPU-hours   {hours:,.0f}, node-hours {found.node_seconds / HOUR:,.0f}{cost}")
    last = found.parts[-1].timeline
    step = last.seconds / last.segment.steps
    interval = f"{human_duration(every * step)} apart ({every:,} steps)" if every else "only at the end of a job"
    optimal = max(1, round(found.optimal_interval / step))
    least = f"least is lost with {human_duration(optimal * step)} ({optimal:,})"
    size = f"{found.checkpoint_bytes / 1e9:,.0f} GB, a wait of {found.stall:.2g} s"
    lines.append(f"checkpoints {size}; {interval}, {least}, by Young's formula")
    return "\n".join(lines)
