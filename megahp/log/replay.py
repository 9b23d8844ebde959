"""Replay a run's batch decisions from its log: they depend only on progress and the logged noise scale."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megahp.config import resolve
from megahp.errors import UserError
from megahp.log.events import GONE_BACK, STARTS
from megahp.log.metrics import Record, read_events, read_metrics
from megahp.parallel.layout import Layout
from megahp.scaling.batch import BatchScheduler, Change, Progress


@dataclass(frozen=True)
class Replayed:
    """The batch changes of a replay, and where they differ from the log."""

    changes: list[tuple[int, Change]]  # (step after which it was decided, decision)
    differences: list[str]


def replay(run: Path) -> Replayed:
    """Repeat each decision on the batch, from the start and every resume. Raises UserError for a damaged log."""
    changes: list[tuple[int, Change]] = []
    after: dict[int, tuple[Progress, dict[str, Any]]] = {}  # step -> progress and scheduler state after it
    try:
        events, records = read_events(run), {record["step"]: record for record in read_metrics(run)}
        starts = [event for event in events if event["event"] in STARTS]
        if not starts:
            raise KeyError("started")
        ends = [start["step"] for start in starts[1:]] + [max(records, default=0)]
        for start, until in zip(starts, ends, strict=True):
            changes = [change for change in changes if _stands(change[0], start)]
            changes += _decide(start, until, records, after)
        return Replayed(changes, list(_differences(changes, after, events, records)))
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"the log of {run} lacks what a replay needs ({error!r}); it cannot be replayed") from None


def _decide(
    start: Record, until: int, records: Mapping[int, Record], after: dict[int, tuple[Progress, dict[str, Any]]]
) -> Iterator[tuple[int, Change]]:
    """Yield the changes from one start to the step that the next continues from; add each step's state to `after`."""
    config = resolve.from_dict(start["config"], "events.jsonl")
    scheduler = BatchScheduler(config, Layout(**start["layout"]).dp)
    progress = Progress(start["step"], start["samples"], start["tokens"])
    if start["event"] != "started":
        # Resume from the replay's own state, not the logged one, which would hide any difference before the resume.
        replayed = after.get(progress.step) if start["event"] in GONE_BACK else None
        moved = scheduler.load_state(replayed[1] if replayed else start["batch_plan"], progress)
        yield from ((progress.step, change) for change in moved)
    while progress.step < until and (plan := scheduler.step(progress)):
        progress = progress.after(plan)
        change = scheduler.update(progress, records.get(progress.step, {}).get(scheduler.noise_key))
        after[progress.step] = progress, scheduler.state()
        if change:
            yield progress.step, change


def _stands(step: int, start: Record) -> bool:
    """Return whether a change after this step is still part of the run after this start."""
    return start["event"] in GONE_BACK and step <= start["step"]


def _differences(
    changes: Sequence[tuple[int, Change]],
    after: Mapping[int, tuple[Progress, dict[str, Any]]],
    events: Sequence[Record],
    records: Mapping[int, Record],
) -> Iterator[str]:
    """Yield, as text, every decision in which log and replay differ, and the first step whose tokens do."""
    logged: dict[tuple[int, int], Record] = {}  # (step, batch before), without those that a later start undid
    for event in events:
        if event["event"] in STARTS:
            logged = {key: change for key, change in logged.items() if _stands(key[0], event)}
        elif event["event"] == "batch":
            logged[event["step"], event["before"]] = event
    decided = {(step, change.before): change for step, change in changes}
    for key in sorted(logged.keys() | decided.keys()):
        step, entry, change = key[0], logged.get(key), decided.get(key)
        if entry is None or change is None:
            yield f"step {step}: {'a' if entry else 'no'} change in the log, {'one' if change else 'none'} replayed"
        elif any(entry[name] != value for name, value in change.to_dict().items()):
            was = f"{entry['before']} -> {entry['now']}"
            yield f"step {step}: {was} in the log, {change.before} -> {change.now} in the replay"
    for step, record in records.items():
        if step in after and after[step][0].tokens != record["tokens"]:
            yield f"step {step}: {record['tokens']} tokens in the log, {after[step][0].tokens} in the replay"
            return
