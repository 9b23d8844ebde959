"""Measure weak and strong scaling of real training over numbers of nodes and layouts.

    megahp benchmark scaling RUN.toml [section.key=value ...] --out FOLDER --nodes 1 2 4 8 --ranks-per-node 8
        [--layouts "FSDP:" "tensor: parallel.tp=8" ...] [--modes weak strong] [--steps 20] [--warm-up 5]
        [--slurm [--sbatch OPTIONS]] [--dry-run] [--json FILE] [--plot FILE]

The run file's batch.global_batch is that of the smallest number of nodes. In weak scaling it grows with the nodes, in
strong scaling it stays. A point is a layout on a number of nodes at a batch: a `megahp train` of --steps steps in
FOLDER/LAYOUT, on the run file's data and with its settings, except for those that end, log, save and validate it, and
with a constant batch. Points that both modes have are trained once. The checkpoint at the end of each is removed at
once, but needs disk space.

With --slurm the points of each number of nodes are a job array (slurm/scaling.sbatch, without the nodes in
bad-nodes.txt). Otherwise they run here, one after another, with one thread per rank; the nodes are then emulated by
processes on this machine. In either case repeat the command to continue: it shows the finished points, and trains, or
submits, those that are neither finished nor queued. An interrupted point restarts from the beginning. All points are
checked before the first one starts.

You see a row per point. Seconds are those of a step, from its batch to its update: the median of the steps after the
warm-up [quartiles]. Speed-up is tokens per second over those at the smallest number of nodes, parallel efficiency the
same per node; 100 % is ideal, in weak and in strong scaling. Exit code 2: invalid input.
"""

import argparse
import itertools
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from megahp.cluster.job import Job, jobs, submit
from megahp.commands.arguments import add_outputs, folder_name, split_label
from megahp.commands.output import provenance, write_json
from megahp.config import (
    BatchConfig,
    CheckpointConfig,
    Config,
    LogConfig,
    config_to_dict,
    get_setting,
    resolve,
    with_values,
)
from megahp.diagnose.child_runs import check_same_config, is_finished, train, write_run_file
from megahp.errors import UserError, complain
from megahp.files import open_unlinked
from megahp.log.metrics import read_metrics
from megahp.parallel.layout import fit
from megahp.train.prepare import prepare

MODES = ("weak", "strong")
SCALED = ("batch.global_batch", "train.tokens")  # the user may set them; a point's own values are derived from them
COLUMNS = ("mode", "layout", "nodes", "ranks", "batch", "ms a step", "quartiles", "tokens/s", "speed-up", "efficiency")
LINE = "{:<8}{:<16}{:>6}{:>7}{:>8}{:>12}{:>22}{:>14}{:>10}{:>12}"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("run", type=Path, metavar="RUN.toml")
    add("overrides", nargs="*", metavar="section.key=value", help="settings of every point, which override the file's")
    add("--out", type=Path, required=True, metavar="FOLDER", help="of the points' runs")
    add("--nodes", type=int, nargs="+", required=True, metavar="N", help="numbers of nodes")
    add("--ranks-per-node", type=int, default=1, metavar="N", help="GPUs per node (default 1)")
    add("--layouts", nargs="+", default=["as given:"], metavar="SETTINGS", help="'LABEL: section.key=value ...' each")
    add("--modes", nargs="+", choices=MODES, default=list(MODES))
    add("--steps", type=int, default=20, metavar="N", help="per point, warm-up included (default 20)")
    add("--warm-up", type=int, default=5, metavar="N", help="steps that are not timed (default 5)")
    add("--slurm", action="store_true", help="submit job arrays; repeated, show their results")
    add("--sbatch", default="", metavar="OPTIONS", help="for the arrays, such as '--time=30 --partition=gpu'")
    add("--dry-run", action="store_true", help="only check, and print what would be trained or submitted")
    add_outputs(parser, "it")


@dataclass(frozen=True)
class Point:
    """One training run."""

    layout: str
    nodes: int
    ranks: int
    config: Config

    @property
    def directory(self) -> Path:
        return self.config.directory

    def __str__(self) -> str:
        return f"{self.layout}, {self.nodes} nodes, {self.ranks} ranks, batch {self.config.batch.global_batch:,}"


Curves = dict[tuple[str, str], list[Point]]  # mode and layout -> its points, the smallest number of nodes first


def run(arguments: argparse.Namespace, words: Sequence[str]) -> int:
    """Check, train or submit missing points, show finished ones. Returns the exit code of a run that failed, or 0."""
    curves = read_curves(arguments)
    points = list(dict.fromkeys(itertools.chain(*curves.values())))
    missing = [point for point in points if not is_finished(point.directory)]
    print(f"{len(points)} points, {len(points) - len(missing)} of them already finished", flush=True)
    if arguments.slurm:
        submit_all(missing, arguments)
    elif code := train_all(missing, arguments.dry_run):
        return code
    if arguments.dry_run:
        return 0
    rows = [row for (mode, _), curve in curves.items() for row in make_rows(mode, curve, arguments.warm_up)]
    if not rows:
        unwritten = [f"{file} is not written" for file in (arguments.json, arguments.plot) if file]
        print("; ".join(["nothing is finished yet", *unwritten]))
        return 0
    show(rows, emulated=not arguments.slurm)
    write_json(arguments.json, {**provenance(words), "emulated": not arguments.slurm, "rows": rows})
    if arguments.plot:
        plot(arguments.plot, rows, emulated=not arguments.slurm)
    return 0


def read_curves(arguments: argparse.Namespace) -> Curves:
    """Return all points, with the config that `megahp train` would resolve, after all of its checks. Raises
    UserError."""
    nodes, labels = arguments.nodes, [label for label, _ in map(split_label, arguments.layouts)]
    if min(*nodes, arguments.ranks_per_node) < 1:
        raise UserError(f"--nodes {nodes} and --ranks-per-node {arguments.ranks_per_node} must be at least 1")
    if len(set(nodes)) < len(nodes):
        raise UserError(f"--nodes {nodes}: each is measured once; name it once")
    if len(set(map(folder_name, labels))) < len(labels):
        raise UserError(f"--layouts: two of {', '.join(labels)} are the same; give each a label of its own")
    if not 0 <= arguments.warm_up < arguments.steps:
        raise UserError(f"--warm-up {arguments.warm_up} must be at least 0, and less than --steps {arguments.steps}")
    if arguments.sbatch and not arguments.slurm:
        raise UserError(f"--sbatch {arguments.sbatch!r} is for a job array; add --slurm")

    curves: Curves = {}
    for mode, text in itertools.product(arguments.modes, arguments.layouts):
        label, words = split_label(text)
        curves[mode, label] = []
        for number in sorted(nodes):
            try:
                curves[mode, label].append(make_point(arguments, mode, label, words, number))
            except UserError as error:
                raise UserError(f"{mode} scaling, layout {label}, {number} nodes: {error}") from None
    return curves


def make_point(arguments: argparse.Namespace, mode: str, label: str, words: Sequence[str], nodes: int) -> Point:
    """Return one point, checked. Raises UserError."""
    ranks = nodes * arguments.ranks_per_node
    resolved = resolve.load(arguments.run, [*arguments.overrides, *words])
    given, batch = resolved.config, resolved.config.batch.global_batch
    if mode == "weak":  # a whole number: the first point's batch is a multiple of its ranks, which grow with the nodes
        batch = batch * nodes // min(arguments.nodes)
    name = f"{'' if arguments.slurm else 'emulated-'}{nodes}x{arguments.ranks_per_node}-batch-{batch}"
    config = replace(
        given,
        batch=BatchConfig(global_batch=batch, micro_batch=given.batch.micro_batch),
        checkpoint=CheckpointConfig(every=0, keep=1),
        log=LogConfig(root=str(arguments.out), name=f"{folder_name(label)}/{name}", tensorboard=False),
    )
    own = {  # exactly --steps steps, from the beginning
        "schedule.start": 0,
        "train.start_from": "",
        "train.steps": arguments.steps,
        "train.tokens": max(given.train.tokens, arguments.steps * batch * given.data.sequence_length),
        "train.validate_every": 0,
        "train.validation_samples": 0,
        "resilience.stop_after": 0.0,
    }
    config = with_values(config, own)
    for key in [key for key, origin in resolved.origins.items() if origin == "command line" and key not in SCALED]:
        if get_setting(config, key) != get_setting(given, key):
            raise UserError(f"{key} = {get_setting(given, key)!r} is set by the benchmark; omit it")
    config = resolve.from_dict(config_to_dict(config), "point")
    config = prepare(config, fit(config.parallel, ranks), 0 if arguments.slurm else ranks, resume=True)
    check_same_config(config)
    return Point(label, nodes, ranks, config)


def train_all(points: Sequence[Point], dry_run: bool) -> int:
    """Train the points here, one after another. Returns the exit code of one that failed, else 0."""
    for number, point in enumerate(points, start=1):
        print(f"[{number}/{len(points)}] {point}", flush=True)
        if dry_run:
            continue
        point.directory.mkdir(parents=True, exist_ok=True)
        checkpoints = point.directory / "checkpoints"
        shutil.rmtree(checkpoints, ignore_errors=True)  # of an interrupted point, whose second start would be timed
        with open_unlinked(point.directory / "train.log", "w") as log:
            # one thread per rank: emulated nodes share this machine's cores
            code = train(point.config, point.ranks, log, OMP_NUM_THREADS="1")
        shutil.rmtree(checkpoints, ignore_errors=True)
        if code:
            complain(f"{point} ended with exit code {code}; repeat the command to continue")
            return code
    return 0


def submit_all(points: Sequence[Point], arguments: argparse.Namespace) -> None:
    """Submit a job array per number of nodes, the largest first, so that Slurm refuses what it could not run before
    anything else is submitted; nothing while any point is queued. Raises UserError."""
    folder = arguments.out.resolve()  # "." has no name
    log = LogConfig(root=str(folder.parent), name=folder.name)
    if not arguments.dry_run and (queued := jobs().get(str(folder))):
        print("\n".join(map(str, queued)))
        return
    ranks = arguments.ranks_per_node
    for nodes in sorted({point.nodes for point in points}, reverse=True):
        array = [point for point in points if point.nodes == nodes]
        job = Job("scaling.sbatch", nodes, ranks, ranks, sbatch=arguments.sbatch)
        runs = [str(point.directory) for point in array]
        script = job.render(replace(array[0].config, log=log), runs, array=f"1-{len(array)}")
        if arguments.dry_run:
            print(script)
            continue
        (arguments.out / "slurm").mkdir(parents=True, exist_ok=True)
        for point in array:
            write_run_file(point.config)
        print(f"job {submit(script)}: {len(array)} points on {nodes} nodes; logs in {arguments.out}/slurm", flush=True)


def make_rows(mode: str, points: Sequence[Point], warm_up: int) -> list[dict[str, Any]]:
    """Return a row per finished point of a curve; speed-up and efficiency are None while the first is missing. Raises
    UserError for a point without a timed step."""
    rows: list[dict[str, Any]] = []
    for point in points:
        if not is_finished(point.directory):
            continue
        steps = read_metrics(point.directory)[warm_up:]
        seconds = [value for step in steps if not step.get("skipped") and (value := step.get("step_seconds"))]
        if not seconds:
            raise UserError(f"{point.directory}: all steps after the warm-up were skipped; lower optimizer.lr")
        low, median, high = np.quantile(seconds, (0.25, 0.5, 0.75)).tolist()
        tokens = point.config.step_tokens
        row = {
            "mode": mode,
            "layout": point.layout,
            "nodes": point.nodes,
            "ranks": point.ranks,
            "global_batch": point.config.batch.global_batch,
            "tokens_per_step": tokens,
            "steps": len(seconds),
            "seconds": median,
            "quartiles": [low, high],
            "tokens_per_second": tokens / median,
            "run": str(point.directory),
        }
        rows.append(row)
    base = rows[0] if rows and rows[0]["nodes"] == points[0].nodes else None
    for row in rows:
        row["speed_up"] = row["tokens_per_second"] / base["tokens_per_second"] if base else None
        row["efficiency"] = row["speed_up"] / (row["nodes"] / base["nodes"]) if base else None
    return rows


def show(rows: Sequence[dict[str, Any]], emulated: bool) -> None:
    if emulated:
        print("the nodes are emulated: all ranks share this machine")
    print(LINE.format(*COLUMNS))
    for row in rows:
        low, high, median = (f"{1e3 * value:,.1f}" for value in (*row["quartiles"], row["seconds"]))
        speed_up = "-" if row["speed_up"] is None else f"{row['speed_up']:.2f}"
        efficiency = "-" if row["efficiency"] is None else f"{row['efficiency']:.1%}"
        point = (row[key] for key in ("mode", "layout", "nodes", "ranks", "global_batch"))
        speed = f"{row['tokens_per_second']:,.0f}"
        print(LINE.format(*point, median, f"[{low}, {high}]", speed, speed_up, efficiency))


def plot(file: Path, rows: Sequence[dict[str, Any]], emulated: bool) -> None:
    """Draw tokens per second and parallel efficiency over nodes, a colour per layout, a dash per mode. Raises
    UserError."""
    from megahp.report.figures import PALETTE, colour, logarithmic, logarithmic_x, plot_in

    layouts, nodes = list(dict.fromkeys(row["layout"] for row in rows)), sorted({row["nodes"] for row in rows})
    ideal = {"color": PALETTE["muted"], "lw": 0.8, "ls": (0, (1, 2))}
    with plot_in(file, 8.5, 3.2) as figure:
        speeds, efficiencies = figure.subplots(1, 2)
        for (mode, layout), group in itertools.groupby(rows, lambda row: (row["mode"], row["layout"])):
            curve = list(group)
            style = {
                "color": PALETTE[colour(layouts.index(layout))],
                "ls": "-" if mode == "weak" else (0, (3, 1.3)),
                "marker": "o" if mode == "weak" else "s",
                "ms": 4,
                "label": f"{layout}, {mode}",
            }
            at, base = [row["nodes"] for row in curve], curve[0]
            speeds.plot(at, [row["tokens_per_second"] for row in curve], **style)
            speeds.plot(nodes, [base["tokens_per_second"] * number / base["nodes"] for number in nodes], **ideal)
            if base["efficiency"]:
                efficiencies.plot(at, [100 * row["efficiency"] for row in curve], **style)
        efficiencies.axhline(100, **ideal)
        efficiencies.set_ylim(bottom=0)
        logarithmic(speeds, 10)
        speeds.set_ylabel("tokens per second")
        efficiencies.set_ylabel("parallel efficiency, %")
        for axes in (speeds, efficiencies):
            axes.set_xlabel("emulated nodes" if emulated else "nodes")
            logarithmic_x(axes, nodes, [str(number) for number in nodes])
        efficiencies.legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
