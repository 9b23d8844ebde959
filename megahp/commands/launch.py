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
from megahp.config import Config, resolve
from megahp.errors import UserError, complain
from megahp.exit_codes import FINISHED
from megahp.parallel.layout import fit

SCRIPTS = {"srun": "pretrain.sbatch", "torchrun": "pretrain_torchrun.sbatch"}
GROWING = "pretrain_growing.sbatch"
PATIENCE = 30  # minutes, the default of --patience
RESERVED_IN_CHAINS = (*RESERVED, "dependency", "begin", "hold", "requeue", "no-requeue")


def add_arguments(parser: ArgumentParser) -> None:
    add_run_file(parser)
    add = parser.add_argument
    add("--nodes", type=int, required=True, metavar="N", help="nodes of the job")
    add("--ranks-per-node", type=int, default=1, metavar="N", help="ranks of a node, one a GPU (default 1)")
    add("--time", metavar="TIME", help="time limit of one job, D-HH:MM:SS; at its end the job is queued again")
    add("--partition", metavar="NAME", help="Slurm partition")
    add("--account", metavar="NAME", help="Slurm account")
    add("--exclude", type=Path, default=BAD_NODES, metavar="FILE", help=f"nodes to avoid (default {BAD_NODES})")
    add("--sbatch", default="", metavar="OPTIONS", help="for sbatch, such as '--qos=high --signal=USR1@600'")
    add("--without", default="", metavar="NAMES", help="script options that the site refuses: mem,exclusive")
    add("--launcher", choices=SCRIPTS, default="srun", help="one srun task per rank, or one torchrun per node")
    add("--grow", type=int, metavar="N", help="double the nodes as the batch grows, up to N: docs/slurm.md")
    patience = f"minutes to wait for more nodes before continuing on the current number (default {PATIENCE})"
    add("--patience", type=float, metavar="MINUTES", help=f"with --grow: {patience}")
    speed = "with --grow: tokens per second of one node, for the forecast (default: as logged)"
    add("--speed", type=float, metavar="X", help=speed)
    add("--cluster", metavar="NAME", help="its GPUs, to compare memory with: h100, or a .toml file (docs/plan.md)")
    add("--ignore-memory", action="store_true", help="submit though the predicted peak exceeds the GPUs' memory")
    add("--dry-run", action="store_true", help="print the script, do not submit it")


def run(options: Namespace, words: Sequence[str]) -> int:
    check_minimum(options, nodes=1, ranks_per_node=1)
    for name in ("patience", "speed"):
        if (value := getattr(options, name)) is not None and (options.grow is None or not value > 0):
            raise UserError(f"--{name} {value:g} must be above 0, and needs --grow N")
    config = resolve.load(options.run_file, options.overrides).config
    if config.resilience.stop_at_batch:
        early = f"resilience.stop_at_batch = {config.resilience.stop_at_batch} would end the job before the run"
        raise UserError(f"{early}; remove it, and give --grow N for more nodes as the batch grows")
    job_options = {name: getattr(options, name) for name in ("time", "partition", "account", "exclude", "sbatch")}
    tasks = options.ranks_per_node if options.launcher == "srun" else 1
    job_options["without"] = [name for name in options.without.split(",") if name]
    job = Job(SCRIPTS[options.launcher], options.nodes, options.ranks_per_node, tasks, **job_options)
    chain = None
    if options.grow is not None:
        chain = read_chain(options, config)
        if options.launcher != "srun":
            both = f"--launcher {options.launcher} with --grow"
            raise UserError(f"{both}: growing jobs start one task per rank; remove one of the two")
        nodes = chain.growth.nodes_for(chain.plan["batch"])  # of the batch the run starts or resumes with
        patience = math.ceil(60 * (PATIENCE if options.patience is None else options.patience))
        # The script submits its own successor: $1 is the chain's first job, $2 the job before.
        grown = f"nodes={options.nodes} grow={options.grow} patience={patience}"
        grown += " chain=${1:-$SLURM_JOB_ID} before=$2"
        job = replace(job, script=GROWING, nodes=nodes, reserved=RESERVED_IN_CHAINS, variables=grown)

    from megahp.train.prepare import prepare

    ranks = job.nodes * job.ranks_per_node
    config = prepare(config, fit(config.parallel, ranks), local_ranks=0, resume=True, warn=complain)
    if config.train.device != "cpu" and config.parallel.engine == "megahp":  # other engines are not planned
        say_memory(config, ranks, options)
    script = job.render(config, [str(options.run_file), *options.overrides])
    if chain:
        print(describe_plan(chain, options.speed), file=sys.stderr)
    if options.dry_run:
        print(script, end="")
        return FINISHED
    if (queued := jobs().get(str(config.directory.resolve()))) and "--dependency" not in options.sbatch:
        remedy = "wait for its end, scancel it, or queue behind it with --sbatch=--dependency=singleton"
        raise UserError(f"{config.directory} has {queued[0]}; {remedy}")
    (config.directory / "slurm").mkdir(parents=True, exist_ok=True)
    print(f"job {submit(script)}; megahp status {config.directory}")
    return FINISHED


def say_memory(config: Config, ranks: int, options: Namespace) -> None:
    """Print the predicted peak beside the memory of --cluster's GPUs. Raises UserError where a step cannot fit."""
    from megahp.plan.guard import GIB, check_fits, predicted_peak
    from megahp.plan.machine import load_machine

    machine = load_machine(options.cluster) if options.cluster else None
    if machine and not options.ignore_memory:
        line = check_fits(config, ranks, machine)
    else:
        line = f"memory: a step takes about {predicted_peak(config, ranks) / GIB:,.1f} GiB of a GPU"
    print(line, file=sys.stderr)
