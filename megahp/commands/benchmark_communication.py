"""Measure the bandwidth of collective operations over message sizes, in a cluster's groups of ranks and a run's own.

    megahp benchmark communication --ranks 4           # or under srun, torchrun or mpirun, without --ranks
        [--run RUN.toml [--settings section.key=value ...]] [--groups world node ...] [--operations all-reduce ...]
        [--sizes 1K 64K 4M ...] [--repeats 7] [--backend gloo|nccl|mpi] [--json FILE] [--plot FILE]
        [--cluster-file FILE.toml]       # sets the links in it, as megahp plan reads them

Groups: `world`; `node`, the ranks of one; `between nodes`, the n-th ranks of each; with --run also every axis of its
mesh that has more than one rank. All groups of a kind communicate at the same time, as in training. Operations:
all-reduce (in place), all-gather, reduce-scatter, all-to-all, send-receive (around a ring). You see a row per size.

The size is that of the larger buffer of a rank. busbw is the bus bandwidth of doc/PERFORMANCE.md of NVIDIA/nccl-tests:
size / seconds x 2(n-1)/n for all-reduce, (n-1)/n for the next three, 1 for send-receive, in 10^9 bytes per second.
Seconds are those of one call on the slowest rank, the median of the repeats, [between their quartiles]; a repeat is as
many calls as take 0.05 s, 1 to 100. Values are whole numbers in float32 whose sums are exact, so every result is
compared with arithmetic to the last bit, at every size, before and after the timed calls.

Backends: NCCL where there are CUDA devices, else gloo; mpi is mpi4py from the CPU's memory, under mpirun, or srun with
the MPI plug-in. Exit code 1: wrong results; 2: invalid input.
"""

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megahp import launch
from megahp.benchmark import communication
from megahp.commands.arguments import add_outputs, check_minimum, must_spawn
from megahp.commands.output import provenance, write_json
from megahp.config import resolve
from megahp.config.edit import edited
from megahp.errors import UserError, complain
from megahp.files import read_text, replace_text
from megahp.parallel.layout import fit
from megahp.parallel.messages import all_gather_json
from megahp.plan.machine import load_machine
from megahp.plan.measured import measured_links, reached

SIZES = ["1K", "8K", "64K", "512K", "4M", "32M"]
NAME_BYTES = 256  # of a node's name, at most
UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30}
COLUMNS = ("size", "us", "quartiles", "algbw", "busbw", "wrong")
LINE = "{0:>8}{1:>12}{2:>27}{3:>9}{4:>9}{5:>7}"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--ranks", type=int, metavar="N", help="start N ranks on this machine")
    add("--run", type=Path, metavar="RUN.toml", help="also measure along the axes of its mesh")
    add("--settings", nargs="+", default=[], metavar="section.key=value", help="override the file's")
    add("--groups", nargs="+", metavar="KIND", help="kinds of groups to measure (default: all)")
    add("--operations", nargs="+", choices=communication.OPERATIONS, default=communication.OPERATIONS)
    add("--sizes", nargs="+", metavar="BYTES", default=SIZES, help=f"(default {' '.join(SIZES)})")
    add("--repeats", type=int, default=7, help="whose median counts (default 7)")
    add("--backend", choices=["auto", "gloo", "nccl", "mpi"], default="auto")
    add("--cluster-file", type=Path, metavar="FILE.toml", help="set the links of this file of check-cluster")
    add_outputs(parser, "bus bandwidth over size")


@dataclass(frozen=True)
class Ranks:
    """All ranks, and the library they communicate over."""

    rank: int
    nodes: list[str]  # of every rank
    backend: str
    version: str  # of MPI or NCCL
    group: Callable[[communication.Groups], communication.Group]


def run(arguments: argparse.Namespace, words: Sequence[str]) -> int:
    sizes = [parse_bytes(size) for size in arguments.sizes]
    check_minimum(arguments, repeats=1)
    if arguments.settings and not arguments.run:
        raise UserError(f"{' '.join(arguments.settings)}: --settings need --run RUN.toml")
    if arguments.cluster_file:
        load_machine(str(arguments.cluster_file))  # or what was measured would be lost to a bad file
        if "all-reduce" not in arguments.operations:
            raise UserError("--cluster-file reads the all-reduce; add it to --operations")
    world = launch.world()
    if must_spawn(arguments.ranks, world.size):
        if arguments.backend == "mpi":
            raise UserError("--ranks starts ranks without MPI; for --backend mpi start them by mpirun")
        return launch.spawn(words, arguments.ranks)
    if world.size == 1:
        raise UserError("there is one rank; start several by --ranks N, srun, torchrun or mpirun")
    ranks = join_mpi(world) if arguments.backend == "mpi" else join_torch(world, arguments.backend)
    rows = measure(ranks, select_groups(arguments, ranks.nodes), sizes, arguments)
    if ranks.rank == 0:
        results = {
            **provenance(words, *["mpi4py"] * (ranks.backend == "mpi")),
            "backend": ranks.backend,
            "library": ranks.version,
            "nodes": ranks.nodes,
            "rows": rows,
        }
        write_json(arguments.json, results)
        if arguments.cluster_file:
            set_links(arguments.cluster_file, rows)
        if arguments.plot:
            plot(arguments.plot, rows)
    if ranks.backend == "mpi":
        from mpi4py import MPI

        MPI.Finalize()
    wrong = sorted({f"{row['operation']} in {row['group']}" for row in rows if row["wrong"]})
    if wrong and ranks.rank == 0:
        complain(f"wrong results: {', '.join(wrong)}")
    return 1 if wrong else 0


def parse_bytes(size: str) -> int:
    """Parse 64K, 4M or 1G. Raises UserError."""
    number, unit = (size[:-1], size[-1].upper()) if size[-1:].isalpha() else (size, "")
    if not number.isdigit() or unit not in UNITS or not int(number):
        raise UserError(f"--sizes {size} is no size in bytes, such as 512, 64K, 4M or 1G")
    return int(number) * UNITS[unit]


def join_torch(world: launch.World, backend: str) -> Ranks:
    """Connect the ranks over gloo or NCCL. Raises UserError."""
    device = communication.device_of_rank({"auto": "auto", "gloo": "cpu", "nccl": "cuda"}[backend], world)
    launch.join(world, device.type == "cuda")
    communication.warm_up(device)
    nodes = all_gather_json(launch.node_name())
    name = "nccl" if device.type == "cuda" else "gloo"
    version = ".".join(map(str, torch.cuda.nccl.version())) if name == "nccl" else ""
    make_group = partial(communication.TorchGroup, device=device, timeout=launch.TIMEOUT)
    return Ranks(world.rank, nodes, name, version, make_group)


def join_mpi(world: launch.World) -> Ranks:
    """Connect the ranks over mpi4py. Raises UserError."""
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        raise UserError(f"--backend mpi needs mpi4py and its MPI ({error}); pip install mpi4py") from None
    if MPI.COMM_WORLD.size != world.size:
        mismatch = f"mpi4py has {MPI.COMM_WORLD.size} ranks of {world.size}"
        raise UserError(f"{mismatch}: it is built for another MPI than the launcher's; build it for that one")
    version = MPI.Get_library_version().split(",")[0].strip("\0\n ")
    names = bytearray(world.size * NAME_BYTES)  # a buffer: mpi4py pickles other objects
    MPI.COMM_WORLD.Allgather(bytearray(launch.node_name().encode()[:NAME_BYTES].ljust(NAME_BYTES)), names)
    nodes = [names[rank * NAME_BYTES :][:NAME_BYTES].decode().strip() for rank in range(world.size)]
    return Ranks(MPI.COMM_WORLD.rank, nodes, "mpi", version, lambda groups: communication.MpiGroup(groups, MPI))


def select_groups(arguments: argparse.Namespace, nodes: Sequence[str]) -> dict[str, communication.Groups]:
    """Return the kinds of groups to measure, the run file's included. Raises UserError."""
    kinds = communication.groups_of_nodes(nodes)
    if arguments.run:
        parallel = resolve.load(arguments.run, arguments.settings).config.parallel
        kinds |= communication.groups_of_layout(fit(parallel, len(nodes)))
    for kind in arguments.groups or ():
        if kind not in kinds:
            raise UserError(f"--groups {kind!r}: there are {', '.join(map(repr, kinds))}; axes of a mesh need --run")
    selected: dict[str, communication.Groups] = {}
    for kind in arguments.groups or kinds:
        # equal groups are measured once, under all of their names
        same = next((other for other, groups in selected.items() if groups == kinds[kind]), None)
        if same:
            selected[f"{same}, {kind}"] = selected.pop(same)
        else:
            selected[kind] = kinds[kind]
    return selected


def measure(
    ranks: Ranks, kinds: Mapping[str, communication.Groups], sizes: Sequence[int], arguments: argparse.Namespace
) -> list[dict[str, Any]]:
    """Return a row per operation, kind of groups and size, times in seconds, bandwidths in bytes per second; rank 0
    prints each at once."""
    rows: list[dict[str, Any]] = []
    for kind, groups in kinds.items():
        group = ranks.group(groups)
        for operation in arguments.operations:
            if ranks.rank == 0:
                print(f"\n{operation}, {kind}: {len(groups)} x {group.size} ranks, {ranks.backend}")
                print(LINE.format(*COLUMNS))
            for size in sizes:
                timing = communication.time_operation(group, operation, size, arguments.repeats)
                low, median, high = np.quantile(timing.seconds, (0.25, 0.5, 0.75)).tolist()
                algorithm, bus = timing.size / median, timing.bus_bandwidth(operation, group.size, median)
                row = {
                    "group": kind,
                    "groups": groups,
                    "operation": operation,
                    "ranks": group.size,
                    "bytes": timing.size,
                    "seconds": median,
                    "quartiles": [low, high],
                    "algorithm_bandwidth": algorithm,
                    "bus_bandwidth": bus,
                    "wrong": timing.wrong,
                }
                rows.append(row)
                if ranks.rank == 0:
                    times = (f"{1e6 * median:,.1f}", f"[{1e6 * low:,.1f}, {1e6 * high:,.1f}]")
                    speeds = (f"{algorithm / 1e9:.3f}", f"{bus / 1e9:.3f}")
                    print(LINE.format(human_bytes(timing.size), *times, *speeds, timing.wrong), flush=True)
    return rows


def set_links(file: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write the links into a cluster file: the bus bandwidth of the largest all-reduce, the time of the smallest."""
    bandwidth, latency = dict[str, float](), dict[str, float]()
    for row in sorted((row for row in rows if row["operation"] == "all-reduce"), key=lambda row: row["bytes"]):
        for kind in row["group"].split(", "):
            bandwidth[kind] = row["bus_bandwidth"]
            latency.setdefault(kind, row["seconds"] / (2 * (row["ranks"] - 1)))  # of one of a ring's hops
    links = measured_links(bandwidth, latency)
    values: dict[str, float] = {f"efficiency.{kind}": 1.0 for kind in reached(links)}
    values |= {f"links.{key}": float(f"{value:.4g}") for key, value in links.items()}
    replace_text(file, edited(read_text(file, "cluster file"), values))


def human_bytes(count: int) -> str:
    unit, factor = next(((unit, factor) for unit, factor in reversed(UNITS.items()) if count >= factor))
    return f"{count / factor:.4g}{unit}"


def plot(file: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Draw bus bandwidth over size, a panel per kind of groups, a curve per operation. Raises UserError."""
    from megahp.report.figures import PALETTE, colour, logarithmic_x, plot_in

    kinds = list(dict.fromkeys(row["group"] for row in rows))
    operations = list(dict.fromkeys(row["operation"] for row in rows))
    with plot_in(file, 3.2 * len(kinds) + 1.5, 3.2) as figure:
        panels = figure.subplots(1, len(kinds), sharey=True, squeeze=False)[0]
        for axes, kind in zip(panels, kinds, strict=True):
            for index, operation in enumerate(operations):
                curve = [row for row in rows if (row["group"], row["operation"]) == (kind, operation)]
                sizes, speeds = [row["bytes"] for row in curve], [row["bus_bandwidth"] / 1e9 for row in curve]
                axes.plot(sizes, speeds, marker=".", color=PALETTE[colour(index)], label=operation)
            axes.set(title=f"{kind}: {curve[0]['ranks']} ranks", xlabel="size", yscale="log")
            logarithmic_x(axes, sizes, [human_bytes(count) for count in sizes])
            axes.yaxis.set_major_formatter("{x:g}")
        panels[0].set_ylabel("bus bandwidth, GB/s")
        panels[-1].legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
