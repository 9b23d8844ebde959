"""For slurm/: exit 0 where a job is to be queued again after CODE."""

import os
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence

from megahp.commands.arguments import add_run_file
from megahp.config import resolve
from megahp.exit_codes import ENDED, FINISHED, NO_PROGRESS, STOPPED, USER_ERROR


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("code", type=int, metavar="CODE", help="exit code of its training")
    add_run_file(parser)
    parser.add_argument("--restarts", type=int, default=20, metavar="N", help="after faults (default 20)")
    parser.add_argument("--job", default=os.environ.get("SLURM_JOB_ID", ""), metavar="ID", help="the first of a chain")


def run(options: Namespace, words: Sequence[str]) -> int:
    """Decide, and log it in the run's events."""
    if options.code in (FINISHED, USER_ERROR, NO_PROGRESS):
        return options.code

    from megahp.faults.relaunch import checkpoints, verdict
    from megahp.log.metrics import RunLog, read_events, read_metrics

    run = resolve.load(options.run_file, options.overrides).config.directory
    log = RunLog(run)
    told = {"code": options.code, "job": options.job, "checkpoints": checkpoints(run)}
    last = {key: step[key] for step in read_metrics(run)[-1:] for key in ("step", "tokens")}
    before = [event for event in read_events(run) if event["event"] == "requeued" and event["job"] == options.job]
    found = [event["checkpoints"] for event in before if event["code"] not in (STOPPED, *ENDED)]
    is_notice = options.code in (STOPPED, *ENDED)
    end = None if is_notice else verdict(options.code, [*found, told["checkpoints"]], options.restarts, run)
    if end is None:
        log.event("requeued", f"exit code {options.code}", **told, **last)
    log.close()
    return FINISHED if end is None else end
