"""How runs stand, or how they ended: jobs, progress, ETA, last events, logs.

Without a RUN: those of your jobs, and below them, as `megahp runs` shows them, those in the folder runs.
"""

import itertools
import shutil
import time
from argparse import ArgumentParser, Namespace
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from megahp.cluster.job import Queued, jobs
from megahp.errors import UserError, complain
from megahp.log.metrics import newest_events
from megahp.log.status import printable, read_status, runs_below, table

SHOWN = 3  # events
HERE = Path("runs")


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("runs", type=Path, nargs="*", metavar="RUN", help="run directory")


def run(options: Namespace, words: Sequence[str]) -> int:
    if absent := [run for run in options.runs if not run.is_dir()]:
        raise UserError(f"{absent[0]} is no run directory; name one, such as runs/mine")
    ended = [] if options.runs else list(runs_below(HERE))
    queued = jobs_of([*options.runs, *ended])
    runs = options.runs or [Path(run) for run in queued]
    ended = [run for run in ended if str(run.resolve()) not in queued]
    if not runs and not ended:
        raise UserError(f"{HERE} holds no runs, and no job of yours is one of megahp launch; name a run directory")
    for run in runs:
        print("\n  ".join([str(run), *details(run, queued.get(str(run.resolve()), ()))]))
    if ended:
        print(table([read_status(run) for run in ended]))
    return 0


def jobs_of(runs: Sequence[Path]) -> dict[str, list[Queued]]:
    """Your jobs by run directory. Where Slurm cannot be asked there are none, which is said if runs came from Slurm."""
    try:
        return jobs()
    except UserError as error:
        if shutil.which("squeue") or any((run / "slurm").is_dir() for run in runs):
            complain(f"Slurm cannot be asked, so jobs are left out: {error}")
        return {}


def details(run: Path, queued: Sequence[Queued]) -> list[str]:
    """A run in words, a line each: jobs, progress, last events, newest log."""
    found = read_status(run, queued)
    progress = f"step {found.step}, loss {found.loss}, {found.tokens} tokens {found.share}, {found.speed} tok/s, "
    lines = [*map(str, queued), f"{found.state}: {progress if found.step else ''}{found.outlook}".rstrip(" :,")]
    if found.state != "unreadable" and (run / "events.jsonl").exists():
        for event in reversed(list(itertools.islice(newest_events(run), SHOWN))):
            when = time.strftime("%Y-%m-%d %H:%M", time.localtime(event["time"]))
            lines.append(f"{when}  step {event['step']:,} {event['event']}: {event['reason']}")
    if not (run / "events.jsonl").exists() and (
        below := [read_status(each) for each in runs_below(run) if each != run]
    ):
        states = Counter(each.state for each in below)  # of a sweep's runs, say
        lines.append(f"{len(below)} runs in it: {', '.join(f'{count} {state}' for state, count in states.items())}")
    if found.log:
        lines.append(f"log: {found.log}")
    return list(map(printable, lines))
