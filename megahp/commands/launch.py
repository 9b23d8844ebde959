"""megahp launch, requeue: a run as a job of Slurm's."""

from __future__ import annotations

import math
import os
import sys
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from megahp.cluster.job import BAD_NODES, OWN, Job, submit
from megahp.commands.arguments import add_run_file
from megahp.commands.grow import Chain, chain_of, outlook
from megahp.config import resolve
from megahp.errors import UserError
from megahp.exit_codes import FINISHED, NO_PROGRESS, STOPPED, USER_ERROR
from megahp.parallel.layout import fit

SCRIPTS = {"srun": "pretrain.sbatch", "torchrun": "pretrain_torchrun.sbatch"}
GROWING = "pretrain_growing.sbatch"
PATIENCE = 30  # minutes
OWN_IN_CHAINS = (*OWN, "dependency", "begin", "hold", "requeue", "no-requeue")


def add_to(parsers: Any) -> None:
    """Their options."""
    launch = parsers.add_parser("launch", help="check a run, and submit it to Slurm with a script of slurm/")
    add_run_file(launch)
    launch.add_argument("--nodes", type=int, required=True, metavar="N", help="nodes of the job")
    launch.add_argument("--ranks-per-node", type=int, default=1, metavar="N", help="GPUs of a node (default 1)")
    launch.add_argument("--time", metavar="TIME", help="limit of one job, D-HH:MM:SS; it is queued again there")
    launch.add_argument("--partition", metavar="NAME", help="to submit to")
    launch.add_argument("--account", metavar="NAME", help="to charge")
    launch.add_argument("--exclude", type=Path, default=BAD_NODES, metavar="FILE", help=f"(default {BAD_NODES})")
    launch.add_argument("--sbatch", default="", metavar="OPTIONS", help="more, such as '--qos=high --signal=USR1@600'")
    launch.add_argument("--launcher", choices=SCRIPTS, default="srun", help="one task a rank, or one torchrun a node")
    launch.add_argument(
        "--grow", type=int, metavar="N", help="as the batch grows, twice the nodes, up to N: docs/slurm.md"
    )
    launch.add_argument(
        "--patience",
        type=float,
        metavar="MINUTES",
        help=f"with --grow: how long more nodes are waited for before the run goes on on as many (default {PATIENCE})",
    )
    launch.add_argument(
        "--speed",
        type=float,
        metavar="X",
        help="with --grow: tokens a second of one node, for the plan (default: as logged)",
    )
    launch.add_argument("--dry-run", action="store_true", help="print the script, and submit nothing")
    launch.set_defaults(command=_launch)

    requeue = parsers.add_parser("requeue", help="for slurm/: exit 0 where a job is to be queued again after CODE")
    requeue.add_argument("code", type=int, metavar="CODE", help="exit code of its training")
    add_run_file(requeue)
    requeue.add_argument("--restarts", type=int, default=20, metavar="N", help="after faults (default 20)")
    requeue.add_argument("--job", default=os.environ.get("SLURM_JOB_ID", ""), metavar="ID", help="the first of a chain")
    requeue.set_defaults(command=_requeue)


def _launch(options: Namespace, words: Sequence[str]) -> int:
    for name in ("nodes", "ranks_per_node"):
        if getattr(options, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} {getattr(options, name)} must be at least 1")
    for name in ("patience", "speed"):
        if (value := getattr(options, name)) is not None and (options.grow is None or not value > 0):
            raise UserError(f"--{name} {value:g} goes with --grow N, and is above 0")
    settings = resolve.load(options.run_file, options.overrides).config
    if settings.resilience.stop_at_batch:
        raise UserError(
            f"resilience.stop_at_batch = {settings.resilience.stop_at_batch} would end the job before the run; leave "
            "it out, and give --grow N for more nodes as the batch grows"
        )
    chain = None if options.grow is None else chain_of(options, settings)
    job = first_of_chain(options, chain) if chain else job_of(options)

    from megahp.train.prepare import prepare

    prepare(settings, fit(settings.parallel, job.nodes * job.ranks_per_node), ranks_here=0, resume=True)
    script = job.render(settings, [str(options.run_file), *options.overrides])
    if chain:
        print(outlook(chain, options.speed), file=sys.stderr)
    if options.dry_run:
        print(script, end="")
        return FINISHED
    (settings.directory / "slurm").mkdir(parents=True, exist_ok=True)
    print(f"job {submit(script)}; megahp status {settings.directory}")
    return FINISHED


def job_of(options: Namespace) -> Job:
    """What the options ask for."""
    asked = {name: getattr(options, name) for name in ("time", "partition", "account", "exclude", "sbatch")}
    tasks = options.ranks_per_node if options.launcher == "srun" else 1
    return Job(SCRIPTS[options.launcher], options.nodes, options.ranks_per_node, tasks, **asked)


def first_of_chain(options: Namespace, chain: Chain) -> Job:
    """The job with which a run that grows begins, or goes on. Raises UserError."""
    if options.launcher != "srun":
        raise UserError(
            f"--launcher {options.launcher} with --grow: its jobs start one task a rank; leave one of them out"
        )
    nodes = chain.growth.wanted(chain.batch)
    patience = math.ceil(60 * (PATIENCE if options.patience is None else options.patience))
    variables = f"nodes={options.nodes} grow={options.grow} patience={patience} chain=${{1:-$SLURM_JOB_ID}} before=$2"
    return replace(job_of(options), script=GROWING, nodes=nodes, own=OWN_IN_CHAINS, variables=variables)


def _requeue(options: Namespace, words: Sequence[str]) -> int:
    """Decide, and log it in the run's events."""
    from megahp.faults.relaunch import checkpoints, verdict
    from megahp.log.metrics import RunLog, read_events, read_metrics

    if options.code in (FINISHED, USER_ERROR, NO_PROGRESS):
        return options.code
    run = resolve.load(options.run_file, options.overrides).config.directory
    log = RunLog(run)
    told = {"code": options.code, "job": options.job, "checkpoints": checkpoints(run)}
    last = {key: step[key] for step in read_metrics(run)[-1:] for key in ("step", "tokens")}
    before = [event for event in read_events(run) if event["event"] == "requeued" and event["job"] == options.job]
    found = [event["checkpoints"] for event in before if event["code"] != STOPPED]
    end = None if options.code == STOPPED else verdict(options.code, [*found, checkpoints(run)], options.restarts, run)
    if end is None:
        log.event("requeued", f"exit code {options.code}", **told, **last)
    log.close()
    return FINISHED if end is None else end
