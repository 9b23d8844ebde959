"""A run's batch decisions, made again from its log: they depend on progress and the logged noise scale alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megahp import resolve
from megahp.errors import UserError
from megahp.parallel.layout import Layout
from megahp.scaling.batch_size import BatchPlan, Change, Progress
from megahp.train.metrics import Record, read_events, read_metrics

STARTS = ("started", "branched", "resumed")  # events after which a batch plan goes on


@dataclass(frozen=True)
class Replayed:
    """What a replay found: the changes it made, and where they are not what the log says."""

    changes: list[tuple[int, Change]]  # step it was decided after, decision
    differences: list[str]


def replay(run: Path) -> Replayed:
    """Decide again, from the start and every resume, each change of the batch. Raises UserError for a damaged log."""
    events, records = read_events(run), {record["step"]: record for record in read_metrics(run)}
    starts = [event for event in events if event["event"] in STARTS]
    if not starts or "config" not in starts[0]:
        raise UserError(f"{run}/events.jsonl does not tell how the run started; it cannot be replayed")
    changes: list[tuple[int, Change]] = []
    after: dict[int, tuple[Progress, dict[str, Any]]] = {}
    ends = [start["step"] for start in starts[1:]] + [max(records, default=0)]
    for start, until in zip(starts, ends, strict=True):
        changes = [change for change in changes if change[0] <= start["step"]]
        changes += _decide(start, until, records, after)
    return Replayed(changes, list(_differences(changes, after, events, records)))


def _decide(
    start: Record, until: int, records: Mapping[int, Record], after: dict[int, tuple[Progress, dict[str, Any]]]
) -> Iterator[tuple[int, Change]]:
    """The changes between one start and the step the next one went on from; `after` gathers the state of each step."""
    settings = resolve.from_dict(start["config"], "events.jsonl")
    plan = BatchPlan(settings, Layout(**start["layout"]).dp)
    progress = Progress(start["step"], start["samples"], start["tokens"])
    if start["event"] == "branched":
        plan.restore(start["batch_plan"])
    if start["event"] == "resumed":
        plan.restore(after[progress.step][1] if progress.step else plan.state())
    while progress.step < until and (step := plan.step(progress)):
        progress = progress.after(step)
        noise = records.get(progress.step, {}).get("noise_scale")
        change = plan.look(progress, noise)
        after[progress.step] = progress, plan.state()
        if change:
            yield progress.step, change


def _standing(events: Sequence[Record]) -> dict[int, Record]:
    """The logged changes by step, without those that a resume from before them undid."""
    standing: dict[int, Record] = {}
    for event in events:
        if event["event"] == "resumed":
            standing = {step: change for step, change in standing.items() if step <= event["step"]}
        elif event["event"] == "batch":
            standing[event["step"]] = event
    return standing


def _differences(
    changes: Sequence[tuple[int, Change]],
    after: Mapping[int, tuple[Progress, dict[str, Any]]],
    events: Sequence[Record],
    records: Mapping[int, Record],
) -> Iterator[str]:
    logged = _standing(events)
    decided = dict(changes)
    for step in sorted(logged.keys() | decided.keys()):
        told, made = logged.get(step), decided.get(step)
        if made is None or told is None:
            yield f"step {step}: the log has {'a' if told else 'no'} change and the replay {'one' if made else 'none'}"
        elif any(told[key] != value for key, value in made.to_dict().items()):
            yield f"step {step}: the log has {told['before']} -> {told['now']}, the replay {made.before} -> {made.now}"
    for step, record in records.items():
        if step in after and after[step][0].tokens != record["tokens"]:
            yield f"step {step}: the log has {record['tokens']} tokens, the replay {after[step][0].tokens}"
            return
