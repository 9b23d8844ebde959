"""For slurm/: exit with 0 if a job must be queued again after its training ended with exit code CODE."""

import os
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from itertools import islice

from megahp.commands.arguments import add_run_file
from megahp.config import resolve
from megahp.exit_codes import ENDED, FINISHED, NO_PROGRESS, STOPPED, USER_ERROR


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("code", type=int, metavar="CODE", help="exit code of its training")
    add_run_file(parser)
    parser.add_argument("--restarts", type=int, default=20, metavar="N", help="after faults (default 20)")
    parser.add_argument("--job", default=os.environ.get("SLURM_JOB_ID", ""), metavar="ID", help="the first of a chain")


def run(options: Namespace, words: Sequence[str]) -> int:
    """Decide, and log a requeue in the run's events."""
    if options.code in (FINISHED, USER_ERROR, NO_PROGRESS):
        return options.code

    from megahp.faults.relaunch import checkpoints, exit_or_restart
    from megahp.log.metrics import RunLog, newest_metrics, read_events

    run = resolve.load(options.run_file, options.overrides).config.directory
    log = RunLog(run)
    fields = {"code": options.code, "job": options.job, "checkpoints": checkpoints(run)}
    last = {key: step[key] for step in islice(newest_metrics(run), 1) for key in ("step", "tokens")}
    events = read_events(run)
    ends = [event for event in events if event["event"] in ("stopped", "requeued")][-1:]
    # a stop whose save failed counts as a fault: the next job would train the same steps again
    is_lost = options.code == STOPPED and any(event.get("saved") is False for event in ends)
    is_fault = is_lost or options.code not in (STOPPED, *ENDED)
    requeued = [event for event in events if event["event"] == "requeued" and event.get("job") == options.job]
    # events of older versions have no "fault"
    faults = [event.get("checkpoints", []) for event in requeued if event.get("fault", event.get("code") != STOPPED)]
    end = exit_or_restart(options.code, [*faults, fields["checkpoints"]], options.restarts, run) if is_fault else None
    if end is None:
        log.event("requeued", f"exit code {options.code}", **fields, fault=is_fault, **last)
    log.close()
    return FINISHED if end is None else end
