"""Show the state of runs: jobs, progress, ETA, last events, logs.

Without a RUN: the runs of your jobs, and in a table, as `megahp runs` prints it, the others in the folder runs.
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

EVENTS = 3  # of a run, the newest
ROOT = Path("runs")


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("runs", type=Path, nargs="*", metavar="RUN", help="run directory")


def run(options: Namespace, words: Sequence[str]) -> int:
    if absent := [run for run in options.runs if not run.is_dir()]:
        raise UserError(f"{absent[0]} is not a run directory; name one, such as runs/mine")
    others = [] if options.runs else list(runs_below(ROOT))
    queued = jobs_of([*options.runs, *others])
    runs = options.runs or [Path(run) for run in queued]
    others = [run for run in others if str(run.resolve()) not in queued]
    if not runs and not others:
        raise UserError(f"{ROOT} holds no runs, and you have no job of megahp launch; name a run directory")
    for run in runs:
        print("\n  ".join([str(run), *details(run, queued.get(str(run.resolve()), ()))]))
    if others:
        print(table([read_status(run) for run in others]))
    return 0


def jobs_of(runs: Sequence[Path]) -> dict[str, list[Queued]]:
    """Return your jobs by run directory; none without Slurm, with a message if squeue exists or a run used Slurm."""
    try:
        return jobs()
    except UserError as error:
        if shutil.which("squeue") or any((run / "slurm").is_dir() for run in runs):
            complain(f"Slurm does not answer, so jobs are not shown: {error}")
        return {}


def details(run: Path, queued: Sequence[Queued]) -> list[str]:
    """Return lines on a run: jobs, progress, last events, newest log."""
    now = read_status(run, queued)
    progress = f"step {now.step}, loss {now.loss}, {now.tokens} tokens {now.share}, {now.speed} tok/s, "
    lines = [*map(str, queued), f"{now.state}: {progress if now.step else ''}{now.outlook}".rstrip(" :,")]
    if now.state != "unreadable" and (run / "events.jsonl").exists():
        for event in reversed(list(itertools.islice(newest_events(run), EVENTS))):
            when = time.strftime("%Y-%m-%d %H:%M", time.localtime(event["time"]))
            lines.append(f"{when}  step {event['step']:,} {event['event']}: {event['reason']}")
    if not (run / "events.jsonl").exists() and (below := [inner for inner in runs_below(run) if inner != run]):
        states = Counter(read_status(inner).state for inner in below)  # it is a folder of runs, such as a sweep's
        lines.append(f"{len(below)} runs in it: {', '.join(f'{count} {state}' for state, count in states.items())}")
    if now.log:
        lines.append(f"log: {now.log}")
    return list(map(printable, lines))
