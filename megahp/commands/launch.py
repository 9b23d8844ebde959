"""megahp launch, requeue: a run as a job of Slurm's."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from argparse import Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import megahp
from megahp import resolve
from megahp.config import Config
from megahp.errors import UserError
from megahp.exit_codes import FINISHED, NO_PROGRESS, STOPPED, USER_ERROR
from megahp.parallel.layout import fit

SCRIPTS = {"srun": "pretrain.sbatch", "torchrun": "pretrain_torchrun.sbatch"}
GROWING = "pretrain_growing.sbatch"
PATIENCE = 30  # minutes
OWNER = "megahp "  # begins the comment of a job of ours; the run directory follows


def add_to(parsers: Any) -> None:
    """Their options."""
    launch = parsers.add_parser("launch", help="check a run, and submit it to Slurm with a script of slurm/")
    _add_run_file(launch)
    launch.add_argument("--nodes", type=int, required=True, metavar="N", help="nodes of the job")
    launch.add_argument("--ranks-per-node", type=int, default=1, metavar="N", help="GPUs of a node (default 1)")
    launch.add_argument("--time", metavar="TIME", help="limit of one job, D-HH:MM:SS; it is queued again there")
    launch.add_argument("--partition", metavar="NAME", help="to submit to")
    launch.add_argument("--account", metavar="NAME", help="to charge")
    launch.add_argument("--exclude", type=Path, default="bad-nodes.txt", metavar="FILE", help="(default bad-nodes.txt)")
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
    _add_run_file(requeue)
    requeue.add_argument("--restarts", type=int, default=20, metavar="N", help="after faults (default 20)")
    requeue.add_argument("--job", default=os.environ.get("SLURM_JOB_ID", ""), metavar="ID", help="the first of a chain")
    requeue.set_defaults(command=_requeue)


def _add_run_file(parser: Any) -> None:
    parser.add_argument("run_file", type=Path, metavar="RUN.toml")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings that replace the file's")


def _launch(options: Namespace, words: Sequence[str]) -> int:
    for name in ("nodes", "ranks_per_node"):
        if getattr(options, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} {getattr(options, name)} must be at least 1")
    for name in ("patience", "speed"):
        if (value := getattr(options, name)) is not None and (options.grow is None or value <= 0):
            raise UserError(f"--{name} {value:g} goes with --grow N, and is above 0")
    settings = resolve.load(options.run_file, options.overrides).config
    nodes = first_nodes(options, settings) if options.grow is not None else options.nodes

    from megahp.train.run import prepare

    prepare(settings, fit(settings.parallel, nodes * options.ranks_per_node), ranks_here=0, resume=True)
    name = SCRIPTS[options.launcher] if options.grow is None else GROWING
    script = render(name, sbatch_options(options, settings, nodes), lines(options, settings))
    if options.dry_run:
        print(script, end="")
        return FINISHED
    (settings.directory / "slurm").mkdir(parents=True, exist_ok=True)
    print(f"job {submit(script)}; megahp status {settings.directory}")
    return FINISHED


def first_nodes(options: Namespace, settings: Config) -> int:
    """Of the first job of a chain that grows, whose plan is printed. Raises UserError."""
    from megahp.commands.grow import growth_of, outlook, present

    if options.launcher != "srun":
        raise UserError(
            f"--launcher {options.launcher} with --grow: its jobs start one task a rank; leave one of them out"
        )
    growth, now = growth_of(options, settings), present(settings)
    print(outlook(growth, options.ranks_per_node, now, options.speed), file=sys.stderr)
    return growth.wanted(now.batch)


def sbatch_options(options: Namespace, settings: Config, nodes: int) -> dict[str, str]:
    """Of the job: name without dashes -> value, empty for one that takes none. Raises UserError."""
    ranks, directory = str(options.ranks_per_node), settings.directory
    given = {
        "job-name": re.sub(r"[^\w.+-]", "-", settings.log.name),
        "comment": f'"{OWNER}{directory.resolve()}"',
        "output": f"{directory}/slurm/%j.out",
        "nodes": str(nodes),
        "ntasks-per-node": ranks if options.launcher == "srun" else "1",
        "gpus-per-node": ranks if settings.train.device != "cpu" else None,
        "time": options.time,
        "partition": options.partition,
        "account": options.account,
        "exclude": str(options.exclude.absolute()) if _names(options.exclude) else None,
    }
    more = {}
    for word in shlex.split(options.sbatch):
        if not word.startswith("--"):
            raise UserError(f"--sbatch {options.sbatch!r}: {word!r} is no long option; write --name=value")
        name, _, more[name.removeprefix("--")] = word.partition("=")
    return {name: value for name, value in given.items() if value is not None} | more


def _names(file: Path) -> bool:
    """Whether any node is excluded; sbatch takes an empty file for a mistake."""
    return file.exists() and bool(file.read_text().strip())


def lines(options: Namespace, settings: Config) -> list[str]:
    """What a script is told beside sbatch's options: variables, and its arguments."""
    words, patience = [str(options.run_file), *options.overrides], round(60 * (options.patience or PATIENCE))
    growth = [f"nodes={options.nodes} grow={options.grow} patience={patience}"] if options.grow else []
    return [
        f"export MEGAHP_SLURM={shlex.quote(str(folder()))} RANKS_PER_NODE={options.ranks_per_node}",
        f"logs={shlex.quote(f'{settings.directory}/slurm')} exclude={shlex.quote(str(options.exclude))}",
        *growth,
        f"set -- {shlex.join(words)}",
    ]


def folder() -> Path:
    """Where the scripts are: MEGAHP_SLURM, else those that came with megahp. Raises UserError."""
    found = Path(os.environ.get("MEGAHP_SLURM", Path(megahp.__file__).parent / "slurm")).resolve()
    if not (found / "environment.sh").exists():
        raise UserError(f"MEGAHP_SLURM = {found} has no environment.sh; name a copy of megahp's slurm/, or unset it")
    return found


def render(name: str, options: Mapping[str, str], lines: Sequence[str]) -> str:
    """A script of slurm/ with these sbatch options in the place of, and after, its own, and these lines below them."""
    text = (folder() / name).read_text().splitlines()
    own = {line.split()[1].removeprefix("--").partition("=")[0]: n for n, line in enumerate(text) if "#SBATCH" in line}
    for option, value in options.items():
        line = f"#SBATCH --{option}={value}" if value else f"#SBATCH --{option}"
        if option in own:
            text[own[option]] = line
        else:
            text.insert(max(own.values()) + 1, line)
            own[option] = max(own.values()) + 1
    end = max(own.values()) + 1
    return "\n".join([*text[:end], "", *lines, *text[end:], ""])


def submit(script: str) -> str:
    """Submit a script that Slurm has said it could run. Returns the job's number. Raises UserError."""
    _slurm(["sbatch", "--test-only"], script)
    return _slurm(["sbatch", "--parsable"], script).split(";")[0]


def _slurm(command: Sequence[str], text: str = "") -> str:
    """What a command of Slurm's prints. Raises UserError with what it complains of."""
    try:
        done = subprocess.run(command, input=text, capture_output=True, text=True)
    except FileNotFoundError:
        raise UserError(f"{command[0]} is not on this machine; go to one of Slurm's, or look at --dry-run") from None
    if done.returncode:
        raise UserError(f"{shlex.join(command)}: {' '.join(done.stderr.split())}; change the options it names")
    return done.stdout.strip()


def _requeue(options: Namespace, words: Sequence[str]) -> int:
    """Decide, and log it in the run's events."""
    from megahp.relaunch import checkpoints, verdict
    from megahp.train.metrics import RunLog, read_events, read_metrics

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
