"""Does the best learning rate stay where it is while the model grows? A grid of rates over sizes and parameterizations.

    megahp transfer-sweep run.toml train.tokens=2e5 --grid optimizer.lr=0.001,0.002,0.004,0.008 \\
        --family model.layers=2,4,8,16 --seeds 1,2,3 --out runs/depth \\
        --variants "SP: parameterization.name=sp" "CompleteP: parameterization.name=completep" --plot depth.svg

--grid is any one setting of the run file, --family what makes a model of each size: the first setting is the size, and
more may go with it, as in `--family model.width=64,128,256 model.heads=1,2,4`. A variant is `LABEL: settings`; one that
gives the grid's setting has values of its own. Every combination is a cell: an ordinary run, with the run file's
settings but for train.seed, [log] and the number of kept checkpoints, in FOLDER/variant/size/value/seed.

Workers (--jobs here, or --slurm in a job array, one thread each here) train cell after cell in one process, the
costliest first; each takes the next that no other has claimed. A claim ends with its worker. After an interruption the
same command goes on: a cell that has ended is not trained again. With --show it trains nothing, and prints what there
is. A cell that diverges is a result: an infinite loss. Its checkpoints go when it has ended. All cells are checked
before the first is trained.

Losses are those of the last validation, or with --last SHARE the mean training loss of the last share of the steps. The
optimum, a seed at a time, is the least point of the parabola in log2 value through the best point and its neighbours.
Its drift over the family is given as slope (of log2 optimum in log2 size) times span, and as largest less smallest, in
octaves, with 95 % bootstrap intervals over seeds. Exit code 2 means a mistake in what was given.
"""

import argparse
import contextlib
import fcntl
import gc
import itertools
import math
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from megahp import launch
from megahp.cluster.job import OWNER, folder, jobs
from megahp.commands.arguments import add_outputs, folder_name, key_of, parse_integers, parse_positive, split_label
from megahp.commands.output import write_json
from megahp.config import Config, LogConfig, resolve, setting_names
from megahp.diagnose import child_runs
from megahp.diagnose.child_runs import check_same_config, has_diverged, is_done
from megahp.diagnose.curves import plot, show, tables
from megahp.diagnose.transfer import Curve, drift
from megahp.errors import Fault, UserError, complain
from megahp.exit_codes import INTERRUPTED, STOPPED, USER_ERROR
from megahp.files import open_unlinked
from megahp.log.metrics import newest_metrics, read_metrics
from megahp.log.progress import human_duration
from megahp.parallel.device import uses_cuda
from megahp.parallel.layout import fit
from megahp.scaling.flops import training_flops
from megahp.train.loop import train
from megahp.train.prepare import prepare

OWN = ("train.seed", "log.root", "log.name", "log.every", "log.tensorboard", "log.baselines", "log.wandb")
NO_NUMBER = "no positive number, as each value of --grid and each size of --family must be"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("run", type=Path, metavar="RUN.toml")
    add("overrides", nargs="*", metavar="section.key=value", help="settings of every cell, before the file's")
    add("--grid", required=True, metavar="KEY=V,V,...", help="the setting whose optimum is sought")
    add("--family", required=True, nargs="+", metavar="KEY=V,V,...", help="the sizes, and what goes with each")
    add("--variants", nargs="+", default=[""], metavar="SETTINGS", help="'LABEL: section.key=value ...' each")
    add("--seeds", type=parse_integers, default=[1, 2, 3], metavar="N,N,...", help="(default 1,2,3)")
    add("--out", type=Path, required=True, metavar="FOLDER", help="holds the runs")
    add("--last", type=float, metavar="SHARE", help="compare training losses, of the last share of the steps")
    add("--jobs", type=int, default=os.cpu_count(), metavar="N", help="workers here (default: one a core)")
    add("--ranks", type=int, default=1, metavar="N", help="of each run, by `megahp train --ranks` (default 1)")
    add("--slurm", type=int, metavar="N", help="submit a job array of N workers instead")
    add("--sbatch", default="", metavar="OPTIONS", help="for the job array, such as '--time=2:00:00 --gpus=1'")
    add("--dry-run", action="store_true", help="only check, and say what would be trained or submitted")
    add("--show", action="store_true", help="train nothing: show the losses there are, and once all are, what they say")
    add_outputs(parser, "it")
    add("--worker", action="store_true", help=argparse.SUPPRESS)


class Told(UserError):
    """A worker was told to leave before its cell had ended."""


@dataclass(frozen=True)
class Cell:
    """One run."""

    variant: str
    size: float
    value: float
    seed: int
    config: Config

    @property
    def directory(self) -> Path:
        return self.config.directory

    @property
    def operations(self) -> float:
        """It takes about so many: by them the work that is done, and left, is known."""
        config = self.config
        return config.train.tokens * training_flops(config.model, config.data.sequence_length)

    def __str__(self) -> str:
        return f"{self.variant}, size {self.size:g}, {self.value:g}, seed {self.seed}"


def run(arguments: argparse.Namespace, words: Sequence[str]) -> int:
    """Check, train what is not there yet, analyse. Returns the exit code of a worker that failed, else 0."""
    cells = sorted(read_cells(arguments), key=lambda cell: -cell.operations)
    if arguments.worker:
        return work(cells, arguments.ranks, arguments.last)
    cells = cells if arguments.show else checked(cells, arguments)
    ahead = [cell for cell in cells if not is_done(cell.directory)]
    print(f"{len(cells)} cells, {len(cells) - len(ahead)} of them there already", flush=True)
    if arguments.show and ahead:
        print("\n".join(so_far(cells, arguments.last)))
        return 0
    own = [word for word in words if word != "--dry-run"]
    if arguments.slurm and not arguments.show:
        return submit(own[1:], arguments)
    if arguments.dry_run:
        print("\n".join(map(str, ahead)))
        return 0
    command = [sys.executable, "-m", "megahp", *own, "--worker"]
    if ahead and (code := start_workers(command, min(arguments.jobs, len(ahead)))):
        return code
    if others := [cell for cell in ahead if not is_done(cell.directory)]:
        which = f"{others[0]} and {len(others) - 1} more"
        raise UserError(f"{which} are with other workers; come back when these have ended")
    families = families_of(cells, arguments.last)
    drifts = {variant: drift(family) for variant, family in families.items()}
    show(families, drifts)
    last = arguments.last
    found = {
        "run": str(arguments.run),
        "grid": key_of(arguments.grid),
        "family": key_of(arguments.family[0]),
        "seeds": arguments.seeds,
        "loss": "of the last validation" if last is None else f"mean of training over the last {last:g} of the steps",
        "torch": torch.__version__,
        "curves": tables(families),
        "drifts": {variant: asdict(drift) for variant, drift in drifts.items()},
    }
    write_json(arguments.json, found)
    if arguments.plot:
        plot(arguments.plot, families, key_of(arguments.grid), key_of(arguments.family[0]))
    return 0


def so_far(cells: Sequence[Cell], last: float | None) -> list[str]:
    """A line a variant and size: at each value the mean loss of the seeds that have ended, and how many have."""
    groups: dict[str, dict[float, list[Cell]]] = {}
    for cell in sorted(cells, key=lambda cell: (cell.size, cell.value)):
        groups.setdefault(f"{cell.variant}, size {cell.size:g}", {}).setdefault(cell.value, []).append(cell)
    lines = []
    for name, values in groups.items():
        parts = []
        for value, seeds in values.items():
            losses = [loss_of(cell.directory, last) for cell in seeds if is_done(cell.directory)]
            mean = f"{np.mean(losses):.4f} " if losses else ""
            if lost := sum(map(math.isinf, losses)):
                mean = f"{lost} diverged "
            parts.append(f"{value:g}: {mean}({len(losses)}/{len(seeds)})")
        lines.append(f"{name}   {'   '.join(parts)}")
    return lines


def read_cells(arguments: argparse.Namespace) -> list[Cell]:
    """Every combination, resolved. Raises UserError, telling all that is wrong with any of them."""
    key, values = listed(arguments.grid)
    columns = dict(map(listed, arguments.family))
    variants = dict(map(split_label, arguments.variants))
    mistakes = []
    counts = {name: len(values) for name, values in columns.items()}
    if len(set(counts.values())) > 1 or min(counts.values()) < 2:
        given = ", ".join(f"{count} of {name}" for name, count in counts.items())
        mistakes.append(f"--family gives {given}; give one value for each size, and two sizes or more")
    if len(set(map(folder_name, variants))) < len(arguments.variants):
        mistakes.append("--variants: two have the same label; give each its own")
    words = [*arguments.overrides, *itertools.chain(*variants.values())]
    if len(values) < 2:
        mistakes.append(f"--grid {arguments.grid} has one value, and nothing to compare it with; give three or more")
    for name in {key, *columns, *map(key_of, words)} & set(OWN):
        mistakes.append(f"{name} is the sweep's own to set; leave it out (--seeds and --out set seeds and folder)")
    for name in {*columns} & {key, *map(key_of, words)} | {key} & set(map(key_of, arguments.overrides)):
        mistakes.append(f"{name} is given twice, once by --family or --grid; leave one out")
    for option in ("jobs", "ranks", "slurm"):
        if getattr(arguments, option) is not None and getattr(arguments, option) < 1:
            mistakes.append(f"--{option} {getattr(arguments, option)} must be at least 1")
    if arguments.last is not None and not 0 < arguments.last <= 1:
        mistakes.append(f"--last {arguments.last:g} must be a share of the steps, above 0 and at most 1")
    if arguments.sbatch and not arguments.slurm:
        mistakes.append(f"--sbatch {arguments.sbatch!r} is for a job array; add --slurm N")
    if len(set(arguments.seeds)) < len(arguments.seeds):
        mistakes.append(f"--seeds {arguments.seeds}: each is trained once; name it once")
    if mistakes:
        raise UserError("\n".join(mistakes))
    cells, problems = [], dict[str, str]()
    for label, words in variants.items():
        own = [listed(word)[1] for word in words if key_of(word) == key]
        others = [word for word in words if key_of(word) != key]
        members = zip(*columns.values(), strict=True)  # the settings of each member of the family
        for member, value, seed in itertools.product(members, *own or [values], arguments.seeds):
            row = [f"{name}={text}" for name, text in zip(columns, member, strict=True)]
            name = "/".join(map(folder_name, (label, member[0], value, str(seed))))
            try:
                words = [*arguments.overrides, *others, *row, f"{key}={value}", f"train.seed={seed}"]
                config = resolve.load(arguments.run, words).config
                baselines = not config.train.validation_samples  # the setting means nothing without any
                log = LogConfig(name=name, root=str(arguments.out), tensorboard=False, baselines=baselines)
                config = replace(config, checkpoint=replace(config.checkpoint, keep=1), log=log)
                size, at = (
                    parse_positive(text, NO_NUMBER) for text in (member[0], value)
                )  # which alone have a logarithm
                cells.append(Cell(label, size, at, seed, config))
            except UserError as error:
                problems.setdefault(str(error), f"{label}, size {member[0]}, {value}, seed {seed}")
    refuse(problems)
    return cells


def listed(word: str) -> tuple[str, list[str]]:
    """A setting and the values it is to take, as written: section.key=1,2,3. Raises UserError."""
    key, _, text = word.partition("=")
    values = text.split(",")
    if key not in setting_names() or "" in values:
        raise UserError(f"{word!r} is no setting with values; write section.key=1,2,3, such as model.layers=2,4,8")
    if len(set(values)) < len(values):
        raise UserError(f"{word}: each value is trained once; name it once")
    return key, values


def refuse(problems: Mapping[str, str]) -> None:
    """Raise UserError for problems and the first cell that has each."""
    if problems:
        raise UserError("\n".join(f"{problem} ({cell})" for problem, cell in problems.items()))


def checked(cells: Sequence[Cell], arguments: argparse.Namespace) -> list[Cell]:
    """The cells as `megahp train` would resolve them, after all it checks before it trains. Raises UserError."""
    ready, problems = [], dict[str, str]()
    for cell in cells:
        try:
            if arguments.last is None and not cell.config.train.validation_samples:
                raise UserError("train.validation_samples = 0 leaves no loss to compare; raise it, or give --last 0.1")
            layout = fit(cell.config.parallel, arguments.ranks)
            config = prepare(cell.config, layout, arguments.ranks, resume=True)
            check_same_config(config)
            ready.append(replace(cell, config=config))
        except UserError as error:
            problems.setdefault(str(error), str(cell))
    refuse(problems)
    return ready


def start_workers(command: Sequence[str], jobs: int) -> int:
    """So many workers on this machine, one thread and, where there are several, one GPU each. Returns the exit code of
    one that failed, else 0."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(torch.cuda.device_count())))).split(",")
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # so that the workers are ended too
    workers = []
    try:
        for job in range(jobs):
            own = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": visible[job % len(visible)]}
            workers.append(subprocess.Popen(command, env=os.environ | own))
        codes = [worker.wait() for worker in workers]
    finally:
        for worker in workers:
            worker.terminate()
            worker.wait()
    failed = next((code for code in codes if code), 0)
    return 128 - failed if failed < 0 else failed


def submit(words: Sequence[str], arguments: argparse.Namespace) -> int:
    """A job array of as many workers, by slurm/sweep.sbatch, in whose comment jobs() finds the sweep. Returns sbatch's
    exit code. Raises UserError while the sweep has one."""
    log, script = arguments.out / "worker-%a.log", folder() / "sweep.sbatch"
    options = [f"--array=1-{arguments.slurm}", f"--output={log}", f"--comment={OWNER}{arguments.out.resolve()}"]
    options += shlex.split(arguments.sbatch)
    command = ["sbatch", *options, str(script), *words]
    if arguments.dry_run:
        print(shlex.join(command))
        return 0
    if queued := jobs().get(str(arguments.out.resolve())):
        raise UserError(f"{arguments.out} has {queued[0]}; wait for its end, or scancel it; --show shows what there is")
    arguments.out.mkdir(parents=True, exist_ok=True)
    code = subprocess.call(command, env=os.environ | {"MEGAHP_SLURM": str(script.parent)})
    print(f"megahp status {arguments.out}; the same command with --show shows what there is, and trains nothing")
    return code


def work(cells: Sequence[Cell], ranks: int, last: float | None) -> int:
    """Train whatever nobody else does until nothing is left, and end this process."""
    began, before, code = time.monotonic(), [cell for cell in cells if is_done(cell.directory)], 0
    store = launch.join(launch.World(), uses_cuda(cells[0].config)) if ranks == 1 else None
    try:
        for cell in cells:
            with claimed(cell) as mine:
                if not mine or is_done(cell.directory):
                    continue
                seconds = train_cell(cell, ranks, store)
            over = [cell for cell in cells if is_done(cell.directory)]
            share = (work_of(over) - work_of(before)) / (work_of(cells) - work_of(before))
            eta = human_duration((time.monotonic() - began) * (1 / share - 1))
            loss = loss_of(cell.directory, last)
            print(f"[{len(over)}/{len(cells)}] {cell}: loss {loss:.4f}, {seconds:.1f} s; ETA {eta}", flush=True)
    except UserError as error:
        complain(error)
        code = STOPPED if isinstance(error, Told) else USER_ERROR
    except KeyboardInterrupt:
        code = INTERRUPTED
    launch.leave(code)
    return code


def work_of(cells: Sequence[Cell]) -> float:
    return sum(cell.operations for cell in cells)


@contextlib.contextmanager
def claimed(cell: Cell) -> Iterator[bool]:
    """Whether this worker alone has the cell, for as long as it lives."""
    cell.directory.mkdir(parents=True, exist_ok=True)
    with open_unlinked(cell.directory / ".claim", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            yield False
        else:
            yield True


def train_cell(cell: Cell, ranks: int, store: dist.Store | None) -> float:
    """Begin one run, or go on with it: in this process if it has a store, what it says going into a file, else on ranks
    of its own. Returns the seconds it took. Raises UserError where it did not end."""
    began = time.monotonic()
    if store is not None:
        layout = fit(cell.config.parallel, 1)
        with open_unlinked(cell.directory / "train.log", "w") as said, contextlib.redirect_stdout(said):
            try:
                config = prepare(cell.config, layout, 1, resume=True)
                finished = train(config, launch.World(), store, layout, resume=True)
            except (UserError, Fault):
                if not has_diverged(cell.directory):
                    raise
                finished = True
        if not finished:
            raise Told(f"{cell} was told to leave; the same command goes on")
    elif (code := child_runs.train(cell.config, ranks)) and not has_diverged(cell.directory):
        raise UserError(f"{cell} ended with exit code {code}; the same command goes on")
    shutil.rmtree(cell.directory / "checkpoints", ignore_errors=True)
    gc.collect()  # a model is a circle of references, and the next one needs the room
    return time.monotonic() - began


def families_of(cells: Sequence[Cell], last: float | None) -> dict[str, dict[float, Curve]]:
    """What is read from the runs: variant -> size, small ones first -> curve. Raises UserError where all of a seed's
    runs diverged."""
    groups: dict[tuple[str, float], list[Cell]] = {}
    for cell in sorted(cells, key=lambda cell: cell.size):
        groups.setdefault((cell.variant, cell.size), []).append(cell)
    families: dict[str, dict[float, Curve]] = {}
    for (variant, size), group in groups.items():
        values, seeds = sorted({cell.value for cell in group}), sorted({cell.seed for cell in group})
        losses = np.empty((len(values), len(seeds)))
        for cell in group:
            losses[values.index(cell.value), seeds.index(cell.seed)] = loss_of(cell.directory, last)
        if lost := [seed for column, seed in enumerate(seeds) if np.isinf(losses[:, column]).all()]:
            every = (
                f"all {len(values)} runs of seed {lost[0]} diverged ({np.isinf(losses).sum()} of {losses.size} in all)"
            )
            raise UserError(f"{variant}, size {size:g}: {every}; give --grid values below {values[0]:g}")
        families.setdefault(variant, {})[size] = Curve(values, losses)
    return families


def loss_of(directory: Path, last: float | None) -> float:
    """The loss of a run that has ended, in nats per token; infinite where it diverged."""
    if last is None:
        losses = [step.get("validation_loss") for step in itertools.islice(newest_metrics(directory), 1)]
    else:
        steps = read_metrics(directory)
        losses = [step.get("loss") for step in steps[-math.ceil(last * len(steps)) :]]
    known = [loss for loss in losses if loss is not None]
    return math.inf if has_diverged(directory) or len(known) < max(1, len(losses)) else float(np.mean(known))
