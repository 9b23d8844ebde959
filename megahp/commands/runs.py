"""List all runs in a folder: state, step, tokens, loss, job, ETA or how it ended, newest log file."""

from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from pathlib import Path

from megahp.commands.status import jobs_of
from megahp.errors import UserError
from megahp.log.status import read_status, runs_below, table


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, nargs="?", default=Path("runs"), metavar="FOLDER", help="(default runs)")


def run(options: Namespace, words: Sequence[str]) -> int:
    if not options.folder.is_dir():
        raise UserError(f"{options.folder} is not a folder; name the one that holds your runs (log.root)")
    runs, folder = list(runs_below(options.folder)), options.folder.resolve()
    jobs, known = jobs_of(runs), {run.resolve() for run in runs}
    # A queued job has no run directory yet.
    runs += [Path(run) for run in jobs if Path(run).is_relative_to(folder) and Path(run) not in known]
    if not runs:
        raise UserError(f"{options.folder} holds no runs; name a folder that does (log.root)")
    print(table([read_status(run, jobs.get(str(run.resolve()), ())) for run in runs]))
    return 0
