"""Check a run, and submit it to Slurm with a script of slurm/."""

import math
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from megahp.cluster.job import BAD_NODES, RESERVED, Job, jobs, submit
from megahp.commands.arguments import add_run_file, check_minimum
from megahp.commands.chain import describe_plan, read_chain
from megahp.config import resolve
from megahp.errors import UserError, complain
from megahp.exit_codes import FINISHED
from megahp.parallel.layout import fit

SCRIPTS = {"srun": "pretrain.sbatch", "torchrun": "pretrain_torchrun.sbatch"}
GROWING = "pretrain_growing.sbatch"
PATIENCE = 30  # minutes
RESERVED_IN_CHAINS = (*RESERVED, "dependency", "begin", "hold", "requeue", "no-requeue")


def add_arguments(parser: ArgumentParser) -> None:
    add_run_file(parser)
    add = parser.add_argument
    add("--nodes", type=int, required=True, metavar="N", help="nodes of the job")
    add("--ranks-per-node", type=int, default=1, metavar="N", help="GPUs of a node (default 1)")
    add("--time", metavar="TIME", help="limit of one job, D-HH:MM:SS; it is queued again there")
    add("--partition", metavar="NAME", help="to submit to")
    add("--account", metavar="NAME", help="to charge")
    add("--exclude", type=Path, default=BAD_NODES, metavar="FILE", help=f"(default {BAD_NODES})")
    add("--sbatch", default="", metavar="OPTIONS", help="more, such as '--qos=high --signal=USR1@600'")
    add("--without", default="", metavar="NAMES", help="options of the script that the site refuses: mem,exclusive")
    add("--launcher", choices=SCRIPTS, default="srun", help="one task a rank, or one torchrun a node")
    add("--grow", type=int, metavar="N", help="as the batch grows, twice the nodes, up to N: docs/slurm.md")
    patience = f"how long more nodes are waited for before the run goes on on as many (default {PATIENCE})"
    add("--patience", type=float, metavar="MINUTES", help=f"with --grow: {patience}")
    speed = "with --grow: tokens a second of one node, for the plan (default: as logged)"
    add("--speed", type=float, metavar="X", help=speed)
    add("--dry-run", action="store_true", help="print the script, and submit nothing")


def run(options: Namespace, words: Sequence[str]) -> int:
    check_minimum(options, nodes=1, ranks_per_node=1)
    for name in ("patience", "speed"):
        if (value := getattr(options, name)) is not None and (options.grow is None or not value > 0):
            raise UserError(f"--{name} {value:g} goes with --grow N, and is above 0")
    config = resolve.load(options.run_file, options.overrides).config
    if config.resilience.stop_at_batch:
        early = f"resilience.stop_at_batch = {config.resilience.stop_at_batch} would end the job before the run"
        raise UserError(f"{early}; leave it out, and give --grow N for more nodes as the batch grows")
    asked = {name: getattr(options, name) for name in ("time", "partition", "account", "exclude", "sbatch")}
    tasks = options.ranks_per_node if options.launcher == "srun" else 1
    asked["without"] = [name for name in options.without.split(",") if name]
    job = Job(SCRIPTS[options.launcher], options.nodes, options.ranks_per_node, tasks, **asked)
    chain = None
    if options.grow is not None:
        chain = read_chain(options, config)
        if options.launcher != "srun":
            both = f"--launcher {options.launcher} with --grow"
            raise UserError(f"{both}: its jobs start one task a rank; leave one of them out")
        nodes = chain.growth.nodes_for(chain.plan["batch"])  # with which the run begins, or goes on
        patience = math.ceil(60 * (PATIENCE if options.patience is None else options.patience))
        grown = f"nodes={options.nodes} grow={options.grow} patience={patience} chain=${{1:-$SLURM_JOB_ID}} before=$2"
        job = replace(job, script=GROWING, nodes=nodes, reserved=RESERVED_IN_CHAINS, variables=grown)

    from megahp.train.prepare import prepare

    prepare(config, fit(config.parallel, job.nodes * job.ranks_per_node), local_ranks=0, resume=True, warn=complain)
    script = job.render(config, [str(options.run_file), *options.overrides])
    if chain:
        print(describe_plan(chain, options.speed), file=sys.stderr)
    if options.dry_run:
        print(script, end="")
        return FINISHED
    if (queued := jobs().get(str(config.directory.resolve()))) and "--dependency" not in options.sbatch:
        behind = "--sbatch=--dependency=singleton"
        raise UserError(f"{config.directory} has {queued[0]}; wait for its end, scancel it, or queue with {behind}")
    (config.directory / "slurm").mkdir(parents=True, exist_ok=True)
    print(f"job {submit(script)}; megahp status {config.directory}")
    return FINISHED
