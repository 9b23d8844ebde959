"""A run's batch decisions, made again from its log: they depend on progress and the logged noise scale alone."""

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
    """What a replay found: the changes it made, and where they are not what the log says."""

    changes: list[tuple[int, Change]]  # step it was decided after, decision
    differences: list[str]


def replay(run: Path) -> Replayed:
    """Decide again, from the start and every resume, each change of the batch. Raises UserError for a damaged log."""
    changes: list[tuple[int, Change]] = []
    after: dict[int, tuple[Progress, dict[str, Any]]] = {}
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
    """The changes between one start and the step the next one went on from; `after` gathers the state of each step."""
    config = resolve.from_dict(start["config"], "events.jsonl")
    plan = BatchScheduler(config, Layout(**start["layout"]).dp)
    progress = Progress(start["step"], start["samples"], start["tokens"])
    if start["event"] != "started":
        own = after.get(progress.step) if start["event"] in GONE_BACK else None
        moved = plan.load_state(own[1] if own else start["batch_plan"], progress)
        yield from ((progress.step, change) for change in moved)
    while progress.step < until and (step := plan.step(progress)):
        progress = progress.after(step)
        change = plan.update(progress, records.get(progress.step, {}).get(plan.noise_key))
        after[progress.step] = progress, plan.state()
        if change:
            yield progress.step, change


def _stands(step: int, start: Record) -> bool:
    """Whether a change after this step is part of the run that goes on with this start."""
    return start["event"] in GONE_BACK and step <= start["step"]


def _differences(
    changes: Sequence[tuple[int, Change]],
    after: Mapping[int, tuple[Progress, dict[str, Any]]],
    events: Sequence[Record],
    records: Mapping[int, Record],
) -> Iterator[str]:
    logged: dict[tuple[int, int], Record] = {}  # by step and batch before, without those that a later start undid
    for event in events:
        if event["event"] in STARTS:
            logged = {key: change for key, change in logged.items() if _stands(key[0], event)}
        elif event["event"] == "batch":
            logged[event["step"], event["before"]] = event
    decided = {(step, change.before): change for step, change in changes}
    for key in sorted(logged.keys() | decided.keys()):
        step, told, made = key[0], logged.get(key), decided.get(key)
        if made is None or told is None:
            yield f"step {step}: the log has {'a' if told else 'no'} change and the replay {'one' if made else 'none'}"
        elif any(told[key] != value for key, value in made.to_dict().items()):
            yield f"step {step}: the log has {told['before']} -> {told['now']}, the replay {made.before} -> {made.now}"
    for step, record in records.items():
        if step in after and after[step][0].tokens != record["tokens"]:
            yield f"step {step}: the log has {record['tokens']} tokens, the replay {after[step][0].tokens}"
            return
