"""Check that the best learning rate stays the same as the model grows: a grid of rates over sizes and variants.

    megahp transfer-sweep run.toml train.tokens=2e5 --grid optimizer.lr=0.001,0.002,0.004,0.008 \\
        --family model.layers=2,4,8,16 --seeds 1,2,3 --out runs/depth \\
        --variants "SP: parameterization.name=sp" "CompleteP: parameterization.name=completep" --plot depth.svg

--grid is one setting of the run file. --family makes a model of each size: its first setting is the size, and others
may change with it, as in `--family model.width=64,128,256 model.heads=1,2,4`. A variant is `LABEL: settings`; one that
sets the grid's setting replaces its values. Every combination is a cell: an ordinary run with the run file's settings,
except train.seed, [log] and the number of kept checkpoints, in FOLDER/variant/size/value/seed.

Workers (--jobs on this machine with one thread each, or --slurm in a job array) train cell after cell in one process,
the costliest first; each claims the next unclaimed cell, and a claim ends with its worker. After an interruption the
same command resumes: a finished cell is not trained again. --show trains nothing, and prints the losses so far. A cell
that diverges is a result, an infinite loss. The checkpoints of a finished cell are deleted. All cells are checked
before the first is trained.

Losses are those of the last validation, or with --last SHARE the mean training loss of the last share of the steps. The
optimum of a seed is the minimum of the parabola in log2 value through the best point and its neighbours. Its drift over
the family is given as slope (of log2 optimum in log2 size) times span, and as largest less smallest, in octaves, with
95 % bootstrap intervals over seeds. Exit code 2 means a mistake in the options.
"""

import argparse
import contextlib
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
from collections.abc import Mapping, Sequence
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
from megahp.diagnose.child_runs import check_same_config, claimed, has_diverged, is_done
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

RESERVED = ("train.seed", "log.root", "log.name", "log.every", "log.tensorboard", "log.baselines", "log.wandb")
NO_NUMBER = "not a positive number, as each value of --grid and each size of --family must be"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("run", type=Path, metavar="RUN.toml")
    add("overrides", nargs="*", metavar="section.key=value", help="override the file's settings, in every cell")
    add("--grid", required=True, metavar="KEY=V,V,...", help="the setting whose optimum is sought")
    add("--family", required=True, nargs="+", metavar="KEY=V,V,...", help="the sizes, and settings that go with each")
    add("--variants", nargs="+", default=[""], metavar="SETTINGS", help="each 'LABEL: section.key=value ...'")
    add("--seeds", type=parse_integers, default=[1, 2, 3], metavar="N,N,...", help="(default 1,2,3)")
    add("--out", type=Path, required=True, metavar="FOLDER", help="folder of the runs")
    add("--last", type=float, metavar="SHARE", help="compare training losses, over the last share of the steps")
    add("--jobs", type=int, default=os.cpu_count(), metavar="N", help="workers on this machine (default: one per core)")
    add("--ranks", type=int, default=1, metavar="N", help="ranks of each run (default 1)")
    add("--slurm", type=int, metavar="N", help="submit a job array of N workers instead")
    add("--sbatch", default="", metavar="OPTIONS", help="for the job array, such as '--time=2:00:00 --gpus=1'")
    add("--dry-run", action="store_true", help="check, and print what would be trained or submitted")
    add("--show", action="store_true", help="train nothing: print losses, and the analysis if complete")
    add_outputs(parser, "loss against the grid's value")
    add("--worker", action="store_true", help=argparse.SUPPRESS)


class StopRequested(UserError):
    """A worker received a stop signal while training a cell."""


@dataclass(frozen=True)
class Cell:
    """One run of the sweep."""

    variant: str
    size: float
    value: float
    seed: int
    config: Config

    @property
    def directory(self) -> Path:
        return self.config.directory

    @property
    def claim(self) -> Path:
        """The file that the worker which trains it has locked."""
        return self.directory / ".claim"

    @property
    def operations(self) -> float:
        """Training FLOPs of the cell, for the ETA and to start the costliest first."""
        config = self.config
        return config.train.tokens * training_flops(config.model, config.data.sequence_length)

    def __str__(self) -> str:
        return f"{self.variant}, size {self.size:g}, {self.value:g}, seed {self.seed}"


def run(options: argparse.Namespace, words: Sequence[str]) -> int:
    """Check all cells, train the missing ones, analyse. Returns the exit code of a worker that failed, else 0."""
    cells = sorted(read_cells(options), key=lambda cell: -cell.operations)
    if options.worker:
        return work(cells, options.ranks, options.last)
    cells = cells if options.show else prepare_cells(cells, options)
    missing = [cell for cell in cells if not is_done(cell.directory)]
    print(f"{len(cells)} cells, {len(cells) - len(missing)} of them there already", flush=True)
    if options.show and missing:
        print("\n".join(progress_lines(cells, options.last)))
        return 0
    words = [word for word in words if word != "--dry-run"]
    if options.slurm and not options.show:
        return submit(words[1:], options)
    if options.dry_run:
        print("\n".join(map(str, missing)))
        return 0
    command = [sys.executable, "-m", "megahp", *words, "--worker"]
    if missing and (code := start_workers(command, min(options.jobs, len(missing)))):
        return code
    if others := [cell for cell in missing if not is_done(cell.directory)]:
        which = f"{others[0]} and {len(others) - 1} more"
        raise UserError(f"{which} are being trained by other workers; run the command again when they have ended")
    families = read_curves(cells, options.last)
    drifts = {variant: drift(family) for variant, family in families.items()}
    show(families, drifts)
    last = options.last
    report = {
        "run": str(options.run),
        "grid": key_of(options.grid),
        "family": key_of(options.family[0]),
        "seeds": options.seeds,
        "loss": "of the last validation" if last is None else f"mean of training over the last {last:g} of the steps",
        "torch": torch.__version__,
        "curves": tables(families),
        "drifts": {variant: asdict(drift) for variant, drift in drifts.items()},
    }
    write_json(options.json, report)
    if options.plot:
        plot(options.plot, families, key_of(options.grid), key_of(options.family[0]))
    return 0


def progress_lines(cells: Sequence[Cell], last: float | None) -> list[str]:
    """Return a line per variant and size: at each value the mean loss and the number of the seeds that have ended."""
    groups: dict[str, dict[float, list[Cell]]] = {}
    for cell in sorted(cells, key=lambda cell: (cell.size, cell.value)):
        groups.setdefault(f"{cell.variant}, size {cell.size:g}", {}).setdefault(cell.value, []).append(cell)
    lines = []
    for name, values in groups.items():
        parts = []
        for value, seeds in values.items():
            losses = [final_loss(cell.directory, last) for cell in seeds if is_done(cell.directory)]
            mean = f"{np.mean(losses):.4f} " if losses else ""
            if failed := sum(map(math.isinf, losses)):
                mean = f"{failed} diverged "
            parts.append(f"{value:g}: {mean}({len(losses)}/{len(seeds)})")
        lines.append(f"{name}   {'   '.join(parts)}")
    return lines


def read_cells(options: argparse.Namespace) -> list[Cell]:
    """Resolve the settings of every combination. Raises UserError that lists every mistake found."""
    key, values = read_values(options.grid)
    columns = dict(map(read_values, options.family))
    variants = dict(map(split_label, options.variants))
    mistakes = []
    counts = {name: len(values) for name, values in columns.items()}
    if len(set(counts.values())) > 1 or min(counts.values()) < 2:
        given = ", ".join(f"{count} of {name}" for name, count in counts.items())
        mistakes.append(f"--family gives {given}; give one value for each size, and at least two sizes")
    if len(set(map(folder_name, variants))) < len(options.variants):
        mistakes.append("--variants: two have the same label; give each another")
    words = [*options.overrides, *itertools.chain(*variants.values())]
    if len(values) < 2:
        mistakes.append(f"--grid {options.grid} has one value, and nothing to compare it with; give at least three")
    for name in {key, *columns, *map(key_of, words)} & set(RESERVED):
        mistakes.append(f"{name} is set by the sweep; remove it (--seeds and --out set seeds and folder)")
    for name in {*columns} & {key, *map(key_of, words)} | {key} & set(map(key_of, options.overrides)):
        mistakes.append(f"{name} is given twice, once by --family or --grid; remove one")
    for option in ("jobs", "ranks", "slurm"):
        if getattr(options, option) is not None and getattr(options, option) < 1:
            mistakes.append(f"--{option} {getattr(options, option)} must be at least 1")
    if options.last is not None and not 0 < options.last <= 1:
        mistakes.append(f"--last {options.last:g} must be a share of the steps, above 0 and at most 1")
    if options.sbatch and not options.slurm:
        mistakes.append(f"--sbatch {options.sbatch!r} is for a job array; add --slurm N")
    if len(set(options.seeds)) < len(options.seeds):
        mistakes.append(f"--seeds {options.seeds} has a seed twice; name it once")
    if mistakes:
        raise UserError("\n".join(mistakes))
    cells, problems = [], dict[str, str]()
    for label, words in variants.items():
        override = [read_values(word)[1] for word in words if key_of(word) == key]
        others = [word for word in words if key_of(word) != key]
        members = zip(*columns.values(), strict=True)
        for member, value, seed in itertools.product(members, *override or [values], options.seeds):
            row = [f"{name}={text}" for name, text in zip(columns, member, strict=True)]
            name = "/".join(map(folder_name, (label, member[0], value, str(seed))))
            try:
                words = [*options.overrides, *others, *row, f"{key}={value}", f"train.seed={seed}"]
                config = resolve.load(options.run, words).config
                baselines = not config.train.validation_samples  # without validation the setting is an error
                log = LogConfig(name=name, root=str(options.out), tensorboard=False, baselines=baselines)
                config = replace(config, checkpoint=replace(config.checkpoint, keep=1), log=log)
                # the analysis takes logarithms
                size, at = (parse_positive(text, NO_NUMBER) for text in (member[0], value))
                cells.append(Cell(label, size, at, seed, config))
            except UserError as error:
                problems.setdefault(str(error), f"{label}, size {member[0]}, {value}, seed {seed}")
    raise_problems(problems)
    return cells


def read_values(word: str) -> tuple[str, list[str]]:
    """Parse section.key=1,2,3; the values stay text, since folders are named by them. Raises UserError."""
    key, _, text = word.partition("=")
    values = text.split(",")
    if key not in setting_names() or "" in values:
        raise UserError(f"{word!r} is not a setting with values; write section.key=1,2,3, such as model.layers=2,4,8")
    if len(set(values)) < len(values):
        raise UserError(f"{word} has a value twice; name it once")
    return key, values


def raise_problems(problems: Mapping[str, str]) -> None:
    """Raise UserError that lists problems, each with the first cell that has it, if there are any."""
    if problems:
        raise UserError("\n".join(f"{problem} ({cell})" for problem, cell in problems.items()))


def prepare_cells(cells: Sequence[Cell], options: argparse.Namespace) -> list[Cell]:
    """Run the checks of `megahp train` on every cell; return the cells as it resolves them. Raises UserError."""
    ready, problems = [], dict[str, str]()
    for cell in cells:
        try:
            if options.last is None and not cell.config.train.validation_samples:
                raise UserError("train.validation_samples = 0 gives no loss to compare; raise it, or add --last 0.1")
            layout = fit(cell.config.parallel, options.ranks)
            config = prepare(cell.config, layout, options.ranks, resume=True)
            check_same_config(config)
            ready.append(replace(cell, config=config))
        except UserError as error:
            problems.setdefault(str(error), str(cell))
    raise_problems(problems)
    return ready


def start_workers(command: Sequence[str], jobs: int) -> int:
    """Start workers with one thread and one GPU each. Returns the exit code of one that failed, else 0."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(torch.cuda.device_count())))).split(",")
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # runs `finally`, which ends the workers
    workers = []
    try:
        for job in range(jobs):
            settings = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": visible[job % len(visible)]}
            workers.append(subprocess.Popen(command, env=os.environ | settings))
        codes = [worker.wait() for worker in workers]
    finally:
        for worker in workers:
            worker.terminate()
            worker.wait()
    failed = next((code for code in codes if code), 0)
    return 128 - failed if failed < 0 else failed


def submit(words: Sequence[str], options: argparse.Namespace) -> int:
    """Submit a job array of workers, slurm/sweep.sbatch; jobs() finds the sweep by its comment.

    Returns sbatch's exit code. Raises UserError if the sweep has a job array already.
    """
    log, script = options.out / "worker-%a.log", folder() / "sweep.sbatch"
    flags = [f"--array=1-{options.slurm}", f"--output={log}", f"--comment={OWNER}{options.out.resolve()}"]
    flags += shlex.split(options.sbatch)
    command = ["sbatch", *flags, str(script), *words]
    if options.dry_run:
        print(shlex.join(command))
        return 0
    if queued := jobs().get(str(options.out.resolve())):
        raise UserError(
            f"{options.out} has {queued[0]}; wait for its end, or scancel it; --show prints the losses so far"
        )
    options.out.mkdir(parents=True, exist_ok=True)
    code = subprocess.call(command, env=os.environ | {"MEGAHP_SLURM": str(script.parent)})
    print(f"megahp status {options.out}; the same command with --show prints the losses so far")
    return code


def work(cells: Sequence[Cell], ranks: int, last: float | None) -> int:
    """Train cells that no other worker has claimed until none is left, and end this process."""
    started, code = time.monotonic(), 0
    total = sum(cell.operations for cell in cells if not is_done(cell.directory))
    store = launch.join(launch.World(), uses_cuda(cells[0].config)) if ranks == 1 else None
    try:
        for cell in cells:
            with claimed(cell.claim) as is_claimed:
                if not is_claimed or is_done(cell.directory):
                    continue
                seconds = train_cell(cell, ranks, store)
            missing = [cell for cell in cells if not is_done(cell.directory)]
            share = 1 - sum(cell.operations for cell in missing) / total  # of other workers' cells too
            eta = human_duration((time.monotonic() - started) * (1 / share - 1))
            loss, done = final_loss(cell.directory, last), len(cells) - len(missing)
            print(f"[{done}/{len(cells)}] {cell}: loss {loss:.4f}, {seconds:.1f} s; ETA {eta}", flush=True)
    except UserError as error:
        complain(error)
        code = STOPPED if isinstance(error, StopRequested) else USER_ERROR
    except KeyboardInterrupt:
        code = INTERRUPTED
    launch.leave(code)
    return code


def train_cell(cell: Cell, ranks: int, store: dist.Store | None) -> float:
    """Start or resume one run: in this process, given a store, its output in train.log; else on ranks of its own.

    Returns its seconds. Raises UserError if it did not end.
    """
    started = time.monotonic()
    if store is not None:
        layout = fit(cell.config.parallel, 1)
        with open_unlinked(cell.directory / "train.log", "w") as log, contextlib.redirect_stdout(log):
            try:
                config = prepare(cell.config, layout, 1, resume=True)
                finished = train(config, launch.World(), store, layout, resume=True)
            except (UserError, Fault):
                if not has_diverged(cell.directory):
                    raise
                finished = True
        if not finished:
            raise StopRequested(f"{cell} was stopped; the same command resumes it")
    elif (code := child_runs.train(cell.config, ranks)) and not has_diverged(cell.directory):
        raise UserError(f"{cell} ended with exit code {code}; the same command resumes it")
    shutil.rmtree(cell.directory / "checkpoints", ignore_errors=True)
    gc.collect()  # a model is in reference cycles, and the next one needs its memory
    return time.monotonic() - started


def read_curves(cells: Sequence[Cell], last: float | None) -> dict[str, dict[float, Curve]]:
    """Read the losses: variant -> size, ascending -> curve. Raises UserError if all runs of a seed diverged."""
    groups: dict[tuple[str, float], list[Cell]] = {}
    for cell in sorted(cells, key=lambda cell: cell.size):
        groups.setdefault((cell.variant, cell.size), []).append(cell)
    families: dict[str, dict[float, Curve]] = {}
    for (variant, size), group in groups.items():
        values, seeds = sorted({cell.value for cell in group}), sorted({cell.seed for cell in group})
        losses = np.empty((len(values), len(seeds)))
        for cell in group:
            losses[values.index(cell.value), seeds.index(cell.seed)] = final_loss(cell.directory, last)
        if failed := [seed for column, seed in enumerate(seeds) if np.isinf(losses[:, column]).all()]:
            count = f"{np.isinf(losses).sum()} of {losses.size} in all"
            problem = f"all {len(values)} runs of seed {failed[0]} diverged ({count})"
            raise UserError(f"{variant}, size {size:g}: {problem}; give --grid values below {values[0]:g}")
        families.setdefault(variant, {})[size] = Curve(values, losses)
    return families


def final_loss(directory: Path, last: float | None) -> float:
    """Return the loss of a run that has ended, in nats per token; infinite if it diverged."""
    if last is None:
        losses = [step.get("validation_loss") for step in itertools.islice(newest_metrics(directory), 1)]
    else:
        steps = read_metrics(directory)
        losses = [step.get("loss") for step in steps[-math.ceil(last * len(steps)) :]]
    known = [loss for loss in losses if loss is not None]
    return math.inf if has_diverged(directory) or len(known) < max(1, len(losses)) else float(np.mean(known))
