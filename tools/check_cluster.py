"""Are these nodes fit to train on? Measures every rank, compares it with the others, names what stands out.

    srun --ntasks-per-node=8 python tools/check_cluster.py --exclude-file bad-nodes.txt      # or torchrun, mpirun,
        [--ranks N] [--folder .] [--free-gb 1] [--slack 0.25] [--patience 60] [--device auto|cpu|cuda]    # or alone
        [--json FILE]

What is looked at, and what makes a node bad:

    versions   python, torch, numpy, megahp, CUDA, cuDNN, NCCL, driver: not those of most ranks
    names      the host names of rank 0 and of the ranks 1, 2, 4, 8, ... further on, resolved and connected to at a free
    and ports  port: more than half of a node's connections with other nodes fail, or one within it
    clocks     the offset from rank 0, by the quickest of ten exchanges: more than 1 s from the median
    disk       --folder, where the run will write, and /tmp: less than --free-gb free, or written (64 MiB, with fsync,
               by one rank a node) at less than a quarter of the median rate
    memory     free on the device, or on the CPU available: less than (1 - slack) of the median
    gemm       products a second, bf16 on CUDA and fp32 on CPUs, of all ranks at once: less than (1 - slack) of the
               median; or a result that is not exact (whole numbers, no rounding), or not the others' to the last bit
    pairs      neighbours within a node, and those alike on neighbouring nodes, two and two, both ways at once: a rank
               whose best pair is slower than (1 - slack) of the median's best, or takes 5 times as long for 8 bytes;
               or a message that arrives changed
    all-reduce of all ranks, within nodes and between them: a wrong sum (whose fault it is is not seen)
    silence    a rank that does not answer within --patience seconds

Times are the best of several, so that a moment's other work does not count. Two nodes that do not reach each other are
both named: which one is at fault cannot be told from there. One rank alone looks at itself.

Exit code 0: all are fit; 1: some are not, or the ranks did not meet; 2: a mistake in what was given. --exclude-file
holds one node a line: bad ones are added, those that were looked at and are fit are taken out, others stay.

    sbatch --exclude=$(paste -sd, bad-nodes.txt) ...
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import shutil
import socket
import statistics
import struct
import sys
import tempfile
import threading
import time
import zlib
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from command import exit_code, positive, refuse_unwritable
from communication import Groups, TorchGroup, device_of_rank, groups_of_nodes, node_name, pattern, timed

import megahp
from megahp import launch
from megahp.errors import Fault, UserError

CLOCK = struct.Struct("d")
EXCHANGES = 10  # of clocks, on one connection
CONNECT_SECONDS = 5.0
MOST_APART = 1.0  # seconds, of clocks
DISK_BYTES, DISK_SHARE = 2**26, 0.25  # written; of the median rate, at least
LATENCY = 5.0  # times the median's
MESSAGE = {"cpu": 2**22, "cuda": 2**28}  # bytes, of a pair and of an all-reduce
SIDE = {"cpu": 1024, "cuda": 8192}  # of the square matrices
TURNS = 7  # of which the best counts
TOGETHER = ("join", "pairs", "all-reduce")  # stages that go on for all ranks or for none
SHOWN = 64  # ranks in the table; of more, those that stand out


@dataclass(frozen=True)
class Problem:
    """Something that is not as it should be; the node it is the fault of, unless that cannot be told."""

    node: str | None
    what: str


class Board:
    """What every rank found, told through the store they share, so that a rank which is silent is known."""

    def __init__(self, store: dist.Store, place: launch.World, patience: float) -> None:
        self.store, self.place, self.patience = store, place, timedelta(seconds=patience)

    def share(self, name: str, value: Any) -> list[Any]:
        """All ranks' values, by rank; None of one that does not answer. Raises Fault when rank 0 does not."""
        self.store.set(f"{name} {self.place.rank}", json.dumps(value))
        if self.place.rank == 0:
            deadline = time.monotonic() + self.patience.total_seconds()
            self.store.set(name, json.dumps([self._of(f"{name} {rank}", deadline) for rank in range(self.place.size)]))
        try:
            self.store.wait([name], 3 * self.patience)  # rank 0 waits for others, and may have come later
        except RuntimeError:
            raise Fault(f"rank 0 does not answer rank {self.place.rank} within {3 * self.patience}") from None
        return json.loads(self.store.get(name))

    def _of(self, key: str, deadline: float) -> Any:
        try:
            self.store.wait([key], timedelta(seconds=max(deadline - time.monotonic(), 0.1)))
        except RuntimeError:
            return None
        return json.loads(self.store.get(key))

    def close(self) -> None:
        """The others stay until rank 0 is through: launchers end all ranks when one has left with an exit code."""
        self.store.set(f"through {self.place.rank}", "")
        with suppress(RuntimeError):  # the store goes with rank 0
            self.store.wait(["through 0"], self.patience)


class Clock:
    """Tells this rank's time to whoever connects to its port."""

    def __init__(self) -> None:
        self.listener = socket.create_server(("", 0), backlog=1024)
        self.port = self.listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            connection, _ = self.listener.accept()
            threading.Thread(target=self._tell, args=(connection,), daemon=True).start()

    def _tell(self, connection: socket.socket) -> None:
        with connection:
            while connection.recv(1):
                connection.sendall(CLOCK.pack(time.time()))


def main(words: Sequence[str] | None = None) -> int:
    """The command; returns its exit code, 2 for a mistake of the user's."""
    words = sys.argv[1:] if words is None else list(words)
    return exit_code(lambda: check(parser().parse_args(words), words))


def check(arguments: argparse.Namespace, words: Sequence[str]) -> int:
    """Look at all ranks, and compare. Returns 1 if a node is bad, else 0."""
    for name in ("free_gb", "patience"):
        positive(getattr(arguments, name), f"no number above 0 for --{name.replace('_', '-')}")
    slack = positive(arguments.slack, "no share above 0 and below 1 for --slack")
    if slack >= 1:
        raise UserError(f"--slack {arguments.slack} must be below 1, the share of the median that a rank may lack")
    refuse_unwritable(arguments.json, arguments.exclude_file)
    if not arguments.folder.is_dir():
        raise UserError(f"--folder {arguments.folder} is no folder; make it, or name another")
    place = launch.world()
    if arguments.ranks not in (None, place.size):
        if place.size > 1 or arguments.ranks < 1:
            raise UserError(f"--ranks {arguments.ranks}, and there are {place.size}; leave --ranks out")
        return launch.spawn(words, arguments.ranks, (__file__,))
    device, patience = device_of_rank(arguments.device, place), float(arguments.patience)
    board = Board(launch.meet(place, timedelta(seconds=patience)), place, patience)
    found = look(board, arguments.folder, device)
    problems = verdict(found, slack, float(arguments.free_gb))
    if place.rank == 0:
        show(found, problems)
        write(arguments, words, found, problems)
    board.close()
    return 1 if problems else 0


def look(board: Board, folder: Path, device: torch.device) -> dict[str, list[Any]]:
    """All stages' findings, by stage and rank. Ends with the stage in which a rank is silent, or is not heard."""
    place, clock = board.place, Clock()
    found = {"ranks": board.share("ranks", facts(place, clock.port, device))}
    if None in found["ranks"]:
        return found
    ranks = found["ranks"]
    nodes = [rank["node"] for rank in ranks]
    world = {"world": [list(range(place.size))]}

    def join() -> str:
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(
            backend, store=board.store, rank=place.rank, world_size=place.size, timeout=board.patience
        )
        return "joined"

    stages: dict[str, Callable[[], Any]] = {
        "links": lambda: links(place, ranks),
        "disk": lambda: disk(folder) if place.rank == nodes.index(ranks[place.rank]["node"]) else {},
        "gemm": lambda: gemm(device),
    }
    if place.size > 1:
        stages |= {
            "join": join,
            "pairs": lambda: [pair for kind in kinds(nodes).items() for pair in pairs(*kind, place.rank, device)],
            "all-reduce": lambda: {kind: all_reduce(each, device) for kind, each in (world | kinds(nodes)).items()},
        }
    for name, stage in stages.items():
        if place.rank == 0:
            print(f"{name} ...", flush=True)
        found[name] = board.share(name, attempt(stage))
        if None in found[name] or (name in TOGETHER and any("error" in each for each in found[name])):
            break
    return found


def attempt(stage: Callable[[], Any]) -> Any:
    """What a stage finds, or its error: of a rank that has one, the others shall know."""
    try:
        return stage()
    except (OSError, RuntimeError) as error:
        return {"error": (str(error).splitlines() or [type(error).__name__])[0]}


def kinds(nodes: Sequence[str]) -> dict[str, Groups]:
    """The kinds of groups whose pairs are measured: world only where there is nothing else, on uneven nodes."""
    there = groups_of_nodes(nodes)
    return {name: groups for name, groups in there.items() if name != "world" or len(there) == 1}


def facts(place: launch.World, port: int, device: torch.device) -> dict[str, Any]:
    """Who this is, with which versions, and how much memory is free on its device."""
    cuda = device.type == "cuda"
    free, total = torch.cuda.mem_get_info() if cuda else cpu_memory()
    versions = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "megahp": megahp.__version__,
        "CUDA": torch.version.cuda,
        "cuDNN": torch.backends.cudnn.version() if cuda else None,
        "NCCL": ".".join(map(str, torch.cuda.nccl.version())) if cuda else None,
        "CUDA of the driver": torch._C._cuda_getDriverVersion() if cuda else None,  # type: ignore[attr-defined]
    }
    return {
        "node": node_name(),
        "host": socket.gethostname(),
        "port": port,
        "local_rank": place.local_rank,
        "device": torch.cuda.get_device_name() if cuda else platform.machine(),
        "free_bytes": free,
        "total_bytes": total,
        "versions": versions,
    }


def cpu_memory() -> tuple[int, int]:
    """Bytes that are available, and all, by Linux."""
    lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    available, total = (1024 * int(lines[name].split()[0]) for name in ("MemAvailable", "MemTotal"))
    return available, total


def links(place: launch.World, ranks: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Connections to rank 0 and to those 1, 2, 4, ... further on: their error, or round trip and clock offset (s)."""
    partners = {0} | {(place.rank + 2**k) % place.size for k in range(place.size.bit_length())}
    return [{"rank": rank, **link(ranks[rank])} for rank in sorted(partners - {place.rank})]


def link(partner: Mapping[str, Any]) -> dict[str, Any]:
    """One of them; the offset by half of the quickest round trip, as NTP takes it."""
    try:
        with socket.create_connection((partner["host"], partner["port"]), CONNECT_SECONDS) as connection:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            exchanges = [exchange(connection) for _ in range(EXCHANGES)]
    except socket.gaierror as error:
        return {"error": f"the name {partner['host']} does not resolve ({error.strerror})"}
    except (OSError, struct.error) as error:
        return {"error": f"{partner['host']}:{partner['port']}: {error}"}
    trip, offset = min(exchanges)
    return {"seconds": trip, "offset": offset}


def exchange(connection: socket.socket) -> tuple[float, float]:
    """Seconds there and back, and by how much this clock is ahead."""
    sent, began = time.time(), time.perf_counter()
    connection.sendall(b"?")
    theirs = CLOCK.unpack(connection.recv(CLOCK.size, socket.MSG_WAITALL))[0]
    trip = time.perf_counter() - began
    return trip, sent + trip / 2 - theirs


def disk(folder: Path) -> dict[str, Any]:
    """Bytes free, and bytes a second with fsync, of a run's folder and of /tmp."""
    return {str(place): writing(place) for place in dict.fromkeys((folder.resolve(), Path(tempfile.gettempdir())))}


def writing(folder: Path) -> dict[str, float]:
    free, block = shutil.disk_usage(folder).free, os.urandom(2**22)
    if free < 2 * DISK_BYTES:
        return {"free_bytes": free, "bytes_per_second": 0.0}
    with tempfile.TemporaryFile(dir=folder, buffering=0) as file:
        began = time.perf_counter()
        for _ in range(DISK_BYTES // len(block)):
            file.write(block)
        os.fsync(file.fileno())
        return {"free_bytes": free, "bytes_per_second": DISK_BYTES / (time.perf_counter() - began)}


def gemm(device: torch.device) -> dict[str, Any]:
    """FLOP/s of a square product, elements of it that are wrong in some row, and its checksum.

    A is -1, 0 or 1, B -1 or 1, and A is thin, so that every sum, in whatever order, is a whole number that bf16 holds.
    Rows are checked by Freivalds' product with a vector, exact in float64: a row with one wrong element never passes.
    """
    n, dtype = SIDE[device.type], torch.float32 if device.type == "cpu" else torch.bfloat16
    draw = torch.Generator().manual_seed(0)
    thin = torch.randint(0, 32, (n, n), generator=draw)
    a = ((thin == 0).int() - (thin == 1).int()).to(device, dtype)
    b = (torch.randint(0, 2, (n, n), generator=draw) * 2 - 1).to(device, dtype)
    signs = (torch.randint(0, 2, (n, 1), generator=draw) * 2 - 1).to(device, torch.float64)
    best, c = math.inf, a @ b
    for _ in range(TURNS):
        synchronize(device)
        began = time.perf_counter()
        c = a @ b
        synchronize(device)
        best = min(best, time.perf_counter() - began)
    wrong = (c.double() @ signs != a.double() @ (b.double() @ signs)).sum()
    checksum = zlib.crc32(c.cpu().view(torch.uint8).numpy().data)
    return {"flops": 2 * n**3 / best, "wrong": int(wrong), "checksum": checksum}


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def pairs(kind: str, groups: Groups, rank: int, device: torch.device) -> Iterator[dict[str, Any]]:
    """This rank's pairs with its neighbours in the ring of its group, all pairs of a round at once."""
    ring = next(ranks for ranks in groups if rank in ranks)
    place = ring.index(rank)
    for match in rounds(len(ring)):
        dist.barrier()
        if place in match:
            yield {"kind": kind, "with": ring[match[place]], **pair(ring[match[place]], rank, device)}


def rounds(size: int) -> list[dict[int, int]]:
    """Who talks with whom in each round, so that all neighbours in a ring of so many do once, and one at a time."""
    edges = [(place, (place + 1) % size) for place in range(size if size > 2 else size - 1)]
    turns = [edges[: size - 1 : 2], edges[1 : size - 1 : 2], edges[size - 1 :]]
    return [dict([*turn, *((b, a) for a, b in turn)]) for turn in turns if turn]


def pair(other: int, rank: int, device: torch.device) -> dict[str, Any]:
    """Bytes a second each way, both ways at once; seconds there and back for 8 bytes, halved; elements changed."""
    sizes = (MESSAGE[device.type] // 4, 2)
    times = {}
    for size in sizes:
        given, taken = pattern(rank, 0, size).to(device), torch.empty(size, device=device)
        times[size] = min(swap(given, taken, other) for _ in range(TURNS if size == sizes[0] else 10 * TURNS))
        wrong = int((taken != pattern(other, 0, size).to(device)).sum())
    return {"bytes_per_second": 4 * sizes[0] / times[sizes[0]], "seconds": times[2], "wrong": wrong}


def swap(given: torch.Tensor, taken: torch.Tensor, other: int) -> float:
    synchronize(given.device)
    began = time.perf_counter()
    for work in dist.batch_isend_irecv([dist.P2POp(dist.isend, given, other), dist.P2POp(dist.irecv, taken, other)]):
        work.wait()
    synchronize(given.device)
    return time.perf_counter() - began


def all_reduce(groups: Groups, device: torch.device) -> dict[str, Any]:
    """Bus bandwidth, by the definition of tools/benchmark_communication.py, and wrong elements."""
    group = TorchGroup(groups, device)
    timing = timed(group, "all-reduce", MESSAGE[device.type], TURNS)
    return {
        "bytes_per_second": timing.bus_bandwidth("all-reduce", group.size, min(timing.seconds)),
        "wrong": timing.wrong,
    }


def verdict(found: Mapping[str, Sequence[Any]], slack: float, free_gb: float) -> list[Problem]:
    """What stands out. The findings are those of `look`."""
    ranks, problems = found["ranks"], []
    nodes = [rank and rank["node"] for rank in ranks]
    for stage, values in found.items():
        for rank, value in enumerate(values):
            if value is None:
                problems.append(Problem(nodes[rank], f"rank {rank} does not answer ({stage})"))
            elif "error" in value:
                problems.append(
                    Problem(None if stage in TOGETHER else nodes[rank], f"rank {rank}, {stage}: {value['error']}")
                )
    if None in ranks:
        return problems
    return [
        *problems,
        *odd_versions(ranks),
        *bad_links(nodes, heard(found, "links")),
        *bad_clocks(nodes, heard(found, "links")),
        *bad_disks(nodes, heard(found, "disk"), free_gb),
        *low(nodes, {rank: each["free_bytes"] for rank, each in enumerate(ranks)}, 1 - slack, 1e9, "GB of memory free"),
        *low(nodes, {r: each["flops"] for r, each in heard(found, "gemm").items()}, 1 - slack, 1e12, "TFLOP/s"),
        *wrong_products(nodes, heard(found, "gemm")),
        *bad_pairs(nodes, heard(found, "pairs"), slack),
        *wrong_sums(heard(found, "all-reduce")),
    ]


def heard(found: Mapping[str, Sequence[Any]], stage: str) -> dict[int, Any]:
    """What the ranks found that did."""
    return {rank: each for rank, each in enumerate(found.get(stage, ())) if each and "error" not in each}


def low(nodes: Sequence[str], values: Mapping[int, float], share: float, unit: float, of: str) -> Iterator[Problem]:
    """Ranks whose value is less than this share of the median."""
    median = statistics.median(values.values()) if values else 0.0
    for rank, value in values.items():
        if value < share * median:
            yield Problem(nodes[rank], f"rank {rank}: {value / unit:.3g} {of}, the median is {median / unit:.3g}")


def odd_versions(ranks: Sequence[Mapping[str, Any]]) -> Iterator[Problem]:
    for name in ranks[0]["versions"]:
        usual, _ = Counter(rank["versions"][name] for rank in ranks).most_common(1)[0]
        for rank, each in enumerate(ranks):
            if (version := each["versions"][name]) != usual:
                yield Problem(each["node"], f"rank {rank}: {name} {version}, most have {usual}")


def bad_links(nodes: Sequence[str], links: Mapping[int, Sequence[Mapping[str, Any]]]) -> Iterator[Problem]:
    """A node most of whose connections with others fail, whoever began them, or one within it."""
    total, failed, errors = Counter[str](), Counter[str](), defaultdict(list)
    for rank, partners in links.items():
        for partner in partners:
            ends = {nodes[rank], nodes[partner["rank"]]}
            if "error" in partner:
                text = f"rank {rank} does not reach rank {partner['rank']}: {partner['error']}"
                if len(ends) == 1:
                    yield Problem(nodes[rank], text)
                for node in ends:
                    errors[node].append(text)
            if len(ends) == 2:
                total.update(ends)
                failed.update(ends if "error" in partner else ())
    for node, count in failed.items():
        if count > total[node] / 2:
            yield Problem(
                node, f"{count} of {total[node]} connections with other nodes fail, such as: {errors[node][0]}"
            )
    if failed and not any(count > total[node] / 2 for node, count in failed.items()):
        yield Problem(None, next(iter(errors.values()))[0])


def bad_clocks(nodes: Sequence[str], links: Mapping[int, Sequence[Mapping[str, Any]]]) -> Iterator[Problem]:
    offsets = offsets_of(links)
    median = statistics.median(offsets.values())
    for rank, offset in offsets.items():
        if abs(offset - median) > MOST_APART:
            yield Problem(nodes[rank], f"rank {rank}: its clock is {offset - median:+.1f} s from the median")


def offsets_of(links: Mapping[int, Sequence[Mapping[str, Any]]]) -> dict[int, float]:
    """Of the clocks of ranks that reach rank 0, from rank 0's."""
    to_first = {rank: each for rank, partners in links.items() for each in partners if each["rank"] == 0}
    return {0: 0.0} | {rank: each["offset"] for rank, each in to_first.items() if "offset" in each}


def bad_disks(nodes: Sequence[str], disks: Mapping[int, Mapping[str, Any]], free_gb: float) -> Iterator[Problem]:
    for place in dict.fromkeys(place for each in disks.values() for place in each):
        there = {rank: each[place] for rank, each in disks.items() if place in each}
        for rank, each in there.items():
            if each["free_bytes"] < free_gb * 1e9:
                yield Problem(nodes[rank], f"{place}: {each['free_bytes'] / 1e9:.1f} GB free, of {free_gb:g} wanted")
        rates = {rank: each["bytes_per_second"] for rank, each in there.items()}
        yield from low(nodes, rates, DISK_SHARE, 1e9, f"GB/s written to {place}")


def wrong_products(nodes: Sequence[str], products: Mapping[int, Mapping[str, Any]]) -> Iterator[Problem]:
    usual = Counter(each["checksum"] for each in products.values()).most_common(1)
    for rank, each in products.items():
        if each["wrong"]:
            yield Problem(nodes[rank], f"rank {rank}: {each['wrong']} rows of a matrix product are wrong")
        elif each["checksum"] != usual[0][0]:
            yield Problem(nodes[rank], f"rank {rank}: a matrix product is not, bit for bit, that of most ranks")


def bad_pairs(
    nodes: Sequence[str], found: Mapping[int, Sequence[Mapping[str, Any]]], slack: float
) -> Iterator[Problem]:
    for kind, best in best_pairs(found).items():
        rates = {rank: rate for rank, (rate, _) in best.items()}
        yield from low(nodes, rates, 1 - slack, 1e9, f"GB/s at best with a neighbour ({kind})")
        median = statistics.median(seconds for _, seconds in best.values())
        for rank, (_, seconds) in best.items():
            if seconds > LATENCY * median:
                what = f"{1e6 * seconds:.0f} us for 8 bytes ({kind}), the median is {1e6 * median:.0f}"
                yield Problem(nodes[rank], f"rank {rank}: {what}")
    for rank, each in found.items():
        for pair in each:
            if pair["wrong"]:
                for end in (rank, pair["with"]):
                    what = f"what rank {pair['with']} sent rank {rank} arrived changed"
                    yield Problem(nodes[end], f"{what}, in {pair['wrong']} elements")


def best_pairs(found: Mapping[int, Sequence[Mapping[str, Any]]]) -> dict[str, dict[int, tuple[float, float]]]:
    """By kind and rank: bytes a second of its fastest pair, and seconds of its quickest."""
    by_kind: dict[str, dict[int, list[Mapping[str, Any]]]] = defaultdict(lambda: defaultdict(list))
    for rank, each in found.items():
        for pair in each:
            by_kind[pair["kind"]][rank].append(pair)
    return {
        kind: {
            rank: (max(pair["bytes_per_second"] for pair in mine), min(pair["seconds"] for pair in mine))
            for rank, mine in ranks.items()
        }
        for kind, ranks in by_kind.items()
    }


def wrong_sums(found: Mapping[int, Mapping[str, Any]]) -> Iterator[Problem]:
    for kind, each in found.get(0, {}).items():
        if each["wrong"]:
            yield Problem(None, f"all-reduce ({kind}): {each['wrong']} elements are wrong")


def show(found: Mapping[str, Sequence[Any]], problems: Sequence[Problem]) -> None:
    """Print a line a rank, those of a large job that stand out, then what is wrong."""
    if None not in found["ranks"]:
        table(found, {problem.node for problem in problems})
    for kind, each in heard(found, "all-reduce").get(0, {}).items():
        print(f"all-reduce ({kind}): bus bandwidth {each['bytes_per_second'] / 1e9:.3g} GB/s")
    for problem in problems:
        print(f"BAD  {problem.node or 'somewhere'}: {problem.what}")
    nodes = {rank["node"] for rank in found["ranks"] if rank}
    bad = {problem.node for problem in problems if problem.node}
    said = f"{', '.join(sorted(bad))} bad" if bad else "no node is bad" if not problems else "no node can be named"
    print(f"{len(nodes)} nodes, {len(found['ranks'])} ranks: {said}")


def table(found: Mapping[str, Sequence[Any]], bad: Collection[str | None]) -> None:
    ranks, gemms, disks = found["ranks"], heard(found, "gemm"), heard(found, "disk")
    offsets, best = offsets_of(heard(found, "links")), best_pairs(heard(found, "pairs"))
    layout = "{:<6}{:<14}{:>9}{:>10}{:>12}{:>10}  {}"
    print(layout.format("rank", "node", "free GB", "clock ms", "disks GB/s", "TFLOP/s", "pairs GB/s, us"))
    for rank, each in enumerate(ranks):
        if len(ranks) > SHOWN and each["node"] not in bad:
            continue
        rates = "/".join(f"{place['bytes_per_second'] / 1e9:.2f}" for place in disks.get(rank, {}).values())
        clock = f"{1e3 * offsets[rank]:+.2f}" if rank in offsets else "?"
        speed = f"{gemms[rank]['flops'] / 1e12:.3g}" if rank in gemms else "?"
        near = [f"{kind} {rate / 1e9:.3g}, {1e6 * s:.0f}" for kind, of in best.items() for rate, s in [of[rank]]]
        free = f"{each['free_bytes'] / 1e9:.1f}"
        print(layout.format(rank, each["node"], free, clock, rates, speed, "; ".join(near)))


def write(
    arguments: argparse.Namespace, words: Sequence[str], found: Mapping[str, Any], problems: Sequence[Problem]
) -> None:
    """The JSON, and the list of nodes to be left out."""
    if arguments.json:
        everything = {
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "command": ["check_cluster.py", *words],
            "found": found,
            "problems": [asdict(problem) for problem in problems],
        }
        arguments.json.write_text(json.dumps(everything, indent=2) + "\n")
    if file := arguments.exclude_file:
        before = file.read_text().split() if file.exists() else []
        fresh = file.with_name(f".{file.name}.{os.getpid()}")
        fresh.write_text("".join(f"{node}\n" for node in excluded(before, found["ranks"], problems)))
        fresh.replace(file)


def excluded(before: Sequence[str], ranks: Sequence[Any], problems: Sequence[Problem]) -> list[str]:
    """The nodes to be left out: the bad ones, and those of before that were not looked at."""
    fit = {rank["node"] for rank in ranks if rank}
    return sorted({*before} - fit | {problem.node for problem in problems if problem.node})


def parser() -> argparse.ArgumentParser:
    plain = argparse.RawDescriptionHelpFormatter
    options = argparse.ArgumentParser(description=__doc__, formatter_class=plain, allow_abbrev=False)
    options.add_argument("--ranks", type=int, metavar="N", help="start N ranks on this machine")
    options.add_argument("--folder", type=Path, default=Path(), help="where the run will write (default: here)")
    options.add_argument("--free-gb", default="1", metavar="GB", help="of room wanted on disks (default 1)")
    options.add_argument("--slack", default="0.25", help="share of the median that a rank may lack (default 0.25)")
    options.add_argument("--patience", default="60", metavar="S", help="seconds to wait for a rank (default 60)")
    options.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    options.add_argument("--json", type=Path, metavar="FILE", help="write everything found here too")
    options.add_argument("--exclude-file", type=Path, metavar="FILE", help="keep the list of bad nodes here")
    return options


if __name__ == "__main__":
    launch.leave(main())
