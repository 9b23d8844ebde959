"""Bandwidth of collective operations over message sizes, in a cluster's groups of ranks and a run's own.

    megahp benchmark communication --ranks 4           # or under srun, torchrun or mpirun, without --ranks
        [--run RUN.toml [--settings section.key=value ...]] [--groups world node ...] [--operations all-reduce ...]
        [--sizes 1K 64K 4M ...] [--repeats 7] [--backend gloo|nccl|mpi] [--json FILE] [--plot FILE]

Groups: `world`; `node`, the ranks of one; `between nodes`, ranks alike on each; with --run also every axis of its
mesh that has more than one rank. All groups of a kind talk at the same time, as in training. Operations: all-reduce
(in place), all-gather, reduce-scatter, all-to-all, send-receive (to the next rank, from the one before, in a ring).

The size is that of the larger buffer of a rank. busbw is the bus bandwidth of doc/PERFORMANCE.md of NVIDIA/nccl-tests:
size / seconds x 2(n-1)/n for all-reduce, (n-1)/n for the next three, 1 for send-receive, in 10^9 bytes a second.
Seconds are those of one call on the slowest rank, the median of the repeats, [between their quartiles]; a repeat is as
many calls as last 0.05 s, 1 to 100. What is sent are whole numbers in float32 whose sums are exact, so that every
result is compared with arithmetic to the last bit, at every size, before and after the calls that count.

Backends: NCCL where there are CUDA devices, else gloo; mpi is mpi4py from the CPU's memory, under mpirun, or srun with
the MPI plug-in. Exit code 1 means wrong results, 2 a mistake in what was given.
"""

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megahp import launch
from megahp.benchmark.communication import (
    OPERATIONS,
    Group,
    Groups,
    MpiGroup,
    TorchGroup,
    device_of_rank,
    greet,
    groups_of_layout,
    groups_of_nodes,
    timed,
)
from megahp.commands.arguments import add_outputs, at_least, starts_ranks
from megahp.commands.output import about, refuse_unwritable, write_json
from megahp.config import resolve
from megahp.errors import UserError, complain
from megahp.parallel.layout import fit
from megahp.parallel.messages import all_gather_json

SIZES = ["1K", "8K", "64K", "512K", "4M", "32M"]
NAME = 256  # bytes of a node's, at most
UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30}
COLUMNS = ("size", "us", "quartiles", "algbw", "busbw", "wrong")
LINE = "{0:>8}{1:>12}{2:>27}{3:>9}{4:>9}{5:>7}"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--ranks", type=int, metavar="N", help="start N ranks on this machine")
    add("--run", type=Path, metavar="RUN.toml", help="measure along the axes of its mesh too")
    add("--settings", nargs="+", default=[], metavar="section.key=value", help="in place of the file's")
    add("--groups", nargs="+", metavar="KIND", help="of the kinds of groups there are (default: all)")
    add("--operations", nargs="+", choices=list(OPERATIONS), default=list(OPERATIONS))
    add("--sizes", nargs="+", metavar="BYTES", default=SIZES, help=f"(default {' '.join(SIZES)})")
    add("--repeats", type=int, default=7, help="whose median counts (default 7)")
    add("--backend", choices=["auto", "gloo", "nccl", "mpi"], default="auto")
    add_outputs(parser, "bus bandwidth over size")


@dataclass(frozen=True)
class Ranks:
    """All that take part, and the library they talk over."""

    rank: int
    nodes: list[str]  # of every rank
    backend: str
    version: str  # of MPI or NCCL
    group: Callable[[Groups], Group]


def run(arguments: argparse.Namespace, words: Sequence[str]) -> int:
    """Measure, print, write. Returns the exit code."""
    sizes = [bytes_of(size) for size in arguments.sizes]
    at_least(arguments, repeats=1)
    refuse_unwritable(arguments.json, plot=arguments.plot)
    if arguments.settings and not arguments.run:
        raise UserError(f"{' '.join(arguments.settings)}: --settings go with --run RUN.toml")
    place = launch.world()
    if starts_ranks(arguments.ranks, place.size):
        if arguments.backend == "mpi":
            raise UserError("--ranks starts ranks without MPI; for --backend mpi start them by mpirun")
        return launch.spawn(words, arguments.ranks)
    if place.size == 1:
        raise UserError("there is one rank; start several by --ranks N, srun, torchrun or mpirun")
    ranks = by_mpi(place) if arguments.backend == "mpi" else by_torch(place, arguments.backend)
    rows = measure(ranks, groups_wanted(arguments, ranks.nodes), sizes, arguments)
    if ranks.rank == 0:
        found = {
            **about(words, *["mpi4py"] * (ranks.backend == "mpi")),
            "backend": ranks.backend,
            "library": ranks.version,
            "nodes": ranks.nodes,
            "rows": rows,
        }
        write_json(arguments.json, found)
        if arguments.plot:
            plot(arguments.plot, rows)
    if ranks.backend == "mpi":
        from mpi4py import MPI

        MPI.Finalize()
    wrong = sorted({f"{row['operation']} in {row['group']}" for row in rows if row["wrong"]})
    if wrong and ranks.rank == 0:
        complain(f"wrong results: {', '.join(wrong)}")
    return 1 if wrong else 0


def bytes_of(size: str) -> int:
    """64K, 4M or 1G as bytes. Raises UserError."""
    number, unit = (size[:-1], size[-1].upper()) if size[-1:].isalpha() else (size, "")
    if not number.isdigit() or unit not in UNITS or not int(number):
        raise UserError(f"--sizes {size} is no size in bytes, such as 512, 64K, 4M or 1G")
    return int(number) * UNITS[unit]


def by_torch(place: launch.World, backend: str) -> Ranks:
    """The ranks over gloo or NCCL. Raises UserError."""
    device = device_of_rank({"auto": "auto", "gloo": "cpu", "nccl": "cuda"}[backend], place)
    launch.join(place, device.type == "cuda")
    greet(device)
    nodes = all_gather_json(launch.node_name())
    name = "nccl" if device.type == "cuda" else "gloo"
    version = ".".join(map(str, torch.cuda.nccl.version())) if name == "nccl" else ""
    return Ranks(place.rank, nodes, name, version, lambda groups: TorchGroup(groups, device, launch.TIMEOUT))


def by_mpi(place: launch.World) -> Ranks:
    """The ranks over mpi4py. Raises UserError."""
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        raise UserError(f"--backend mpi needs mpi4py and its MPI ({error}); pip install mpi4py") from None
    if MPI.COMM_WORLD.size != place.size:
        seen = f"mpi4py sees {MPI.COMM_WORLD.size} ranks of {place.size}"
        raise UserError(f"{seen}: it is built for another MPI than the launcher's")
    version = MPI.Get_library_version().split(",")[0].strip("\0\n ")
    names = bytearray(place.size * NAME)
    MPI.COMM_WORLD.Allgather(bytearray(launch.node_name().encode()[:NAME].ljust(NAME)), names)  # others are pickled
    nodes = [names[rank * NAME :][:NAME].decode().strip() for rank in range(place.size)]
    return Ranks(MPI.COMM_WORLD.rank, nodes, "mpi", version, lambda groups: MpiGroup(groups, MPI))


def groups_wanted(arguments: argparse.Namespace, nodes: Sequence[str]) -> dict[str, Groups]:
    """Kinds of groups, those of the run file included. Raises UserError."""
    there = groups_of_nodes(nodes)
    if arguments.run:
        there |= groups_of_layout(fit(resolve.load(arguments.run, arguments.settings).config.parallel, len(nodes)))
    for name in arguments.groups or ():
        if name not in there:
            raise UserError(f"--groups {name!r}: there are {', '.join(map(repr, there))}; axes of a mesh need --run")
    chosen: dict[str, Groups] = {}
    for name in arguments.groups or there:
        twin = next((other for other, groups in chosen.items() if groups == there[name]), None)
        groups = chosen.pop(twin) if twin else there[name]  # measured once, under all of its names
        chosen[f"{twin}, {name}" if twin else name] = groups
    return chosen


def measure(
    ranks: Ranks, wanted: Mapping[str, Groups], sizes: Sequence[int], arguments: argparse.Namespace
) -> list[dict[str, Any]]:
    """One row an operation in a kind of groups at a size, times in seconds, bandwidths in bytes a second; rank 0 prints
    them as they come."""
    rows: list[dict[str, Any]] = []
    for name, groups in wanted.items():
        group = ranks.group(groups)
        for operation in arguments.operations:
            if ranks.rank == 0:
                print(f"\n{operation}, {name}: {len(groups)} x {group.size} ranks, {ranks.backend}")
                print(LINE.format(*COLUMNS))
            for size in sizes:
                timing = timed(group, operation, size, arguments.repeats)
                low, median, high = np.quantile(timing.seconds, (0.25, 0.5, 0.75)).tolist()
                row = {
                    "group": name,
                    "groups": groups,
                    "operation": operation,
                    "ranks": group.size,
                    "bytes": timing.size,
                    "seconds": median,
                    "quartiles": [low, high],
                    "algorithm_bandwidth": timing.size / median,
                    "bus_bandwidth": timing.bus_bandwidth(operation, group.size, median),
                    "wrong": timing.wrong,
                }
                rows.append(row)
                if ranks.rank == 0:
                    between = f"[{1e6 * low:,.1f}, {1e6 * high:,.1f}]"
                    speeds = (f"{row[key] / 1e9:.3f}" for key in ("algorithm_bandwidth", "bus_bandwidth"))
                    told = (human_bytes(timing.size), f"{1e6 * median:,.1f}", between, *speeds, timing.wrong)
                    print(LINE.format(*told), flush=True)
    return rows


def human_bytes(count: int) -> str:
    unit, factor = next(((unit, factor) for unit, factor in reversed(UNITS.items()) if count >= factor))
    return f"{count / factor:.4g}{unit}"


def plot(file: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Draw bus bandwidth over size, one panel a kind of groups, a curve an operation. Raises UserError."""

    from megahp.report.figures import PALETTE, colour, logarithmic_x, plot_in

    kinds = list(dict.fromkeys(row["group"] for row in rows))
    operations = list(dict.fromkeys(row["operation"] for row in rows))
    with plot_in(file, 3.2 * len(kinds) + 1.5, 3.2) as figure:
        panels = figure.subplots(1, len(kinds), sharey=True, squeeze=False)[0]
        for axes, kind in zip(panels, kinds, strict=True):
            for number, operation in enumerate(operations):
                mine = [row for row in rows if (row["group"], row["operation"]) == (kind, operation)]
                bytes_, speeds = [row["bytes"] for row in mine], [row["bus_bandwidth"] / 1e9 for row in mine]
                axes.plot(bytes_, speeds, marker=".", color=PALETTE[colour(number)], label=operation)
            axes.set(title=f"{kind}: {mine[0]['ranks']} ranks", xlabel="size", yscale="log")
            logarithmic_x(axes, bytes_, [human_bytes(count) for count in bytes_])
            axes.yaxis.set_major_formatter("{x:g}")
        panels[0].set_ylabel("bus bandwidth, GB/s")
        panels[-1].legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
