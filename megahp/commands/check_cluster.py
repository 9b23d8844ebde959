"""Check that all nodes are fit to train on: measure every rank, compare it with the others, name the outliers.

    srun --ntasks-per-node=8 megahp check-cluster --exclude-file bad-nodes.txt      # or torchrun, mpirun,
        [--ranks N] [--folder .] [--free-gb 1] [--slack 0.25] [--patience 20] [--device auto|cpu|cuda]    # or alone
        [--json FILE] [--cluster-file FILE.toml]

You see a row per rank, then a line per problem. What is checked, and what makes a node bad:

    ranks      ranks that do not answer (under srun their nodes are named); no --folder on a node, or fewer devices than
               ranks. The check ends here then, and where some ranks are on CUDA and some on the CPU
    versions   device, python, torch, numpy, megahp, CUDA, cuDNN, NCCL, driver: other than most ranks'
    names      the host names of rank 0 and of the ranks 1, 2, 4, 8, ... after this one, resolved and connected to at a
    and ports  free port: more than half of a node's connections to other nodes fail, or one within it
    clocks     the offset from rank 0, by the quickest of ten exchanges: more than 1 s from the median
    disk       --folder, where the run will write, and /tmp: less than --free-gb free, or written (64 MiB, with fsync,
               by one rank per node) at less than a quarter of the median rate
    memory     free on the device, or available to the CPU: less than (1 - slack) of the median
    gemm       FLOP/s of a matrix product, bf16 on CUDA and fp32 on CPUs, on all ranks at once: less than (1 - slack) of
               the median; or a result that is not exact (whole numbers, no rounding), or not bitwise the others'
    pairs      neighbours within a node, and n-th ranks of neighbouring nodes, two at a time, in both directions: a rank
               whose best pair is slower than (1 - slack) of the median's best, or takes 5 times as long for 8 bytes;
               or a message that arrives changed
    all-reduce of all ranks, within nodes and between them: a wrong sum (of which no node can be blamed)
    silence    a rank that does not answer within --patience seconds, at any of these

Times are the best of several, so that a moment's other load does not count. Where it cannot be decided who is wrong, no
node is named: unless more than half of the nodes agree on a version, a product or the time. Two nodes that do not reach
each other are both named. With two nodes the median lies between them, so --slack 0.25 means 40 % less than the other.
A single rank checks itself. What all ranks lack is invalid input, and no node's fault.

Exit code 0: all are fit; 1: some are not, or the ranks did not meet; 2: invalid input. --exclude-file has one node per
line: bad ones are added, those that were checked and are fit are removed, others stay.

--cluster-file adds what a plan (docs/plan.md) wants to know: products by dtype, memory, launches; and, on several
ranks, the links' bandwidth by the all-reduce and latency by the pairs. Of a known GPU the peaks are its data sheet's.

    sbatch --exclude=$(paste -sd, bad-nodes.txt) ...
"""

import argparse
import ctypes
import fcntl
import json
import math
import os
import platform
import shutil
import socket
import statistics
import struct
import tempfile
import threading
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

import megahp
from megahp import launch
from megahp.benchmark.communication import (
    Groups,
    TorchGroup,
    device_of_rank,
    groups_of_nodes,
    pattern,
    time_operation,
    warm_up,
)
from megahp.benchmark.machine import synchronize
from megahp.benchmark.rates import device_rates
from megahp.cluster.outliers import (
    COLLECTIVE,
    Findings,
    Problem,
    answers,
    best_pairs,
    clock_offsets,
    excluded,
    find_problems,
)
from megahp.commands.arguments import must_spawn, parse_positive
from megahp.commands.output import check_folder, provenance, write_json
from megahp.errors import Fault, UserError
from megahp.files import open_unlinked, read_text, replace_text
from megahp.plan.guard import name_of
from megahp.plan.machine import load_machine
from megahp.plan.measured import machine_toml, measured_links, measured_machine

CLOCK = struct.Struct("d")
EXCHANGES = 10  # of clocks, on one connection
CONNECT_SECONDS = 5.0
DISK_BYTES = 2**26  # written
MESSAGE = {"cpu": 2**22, "cuda": 2**28}  # bytes, of a pair and of an all-reduce
SIDE = {"cpu": 1024, "cuda": 8192}  # of the square matrices
REPEATS, FILES = 7, 3  # of which the best counts
SHOWN_RANKS = 64  # in the table; of more, only those of bad nodes


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--ranks", type=int, metavar="N", help="start N ranks on this machine")
    add("--folder", type=Path, default=Path(), help="where the run will write (default: here)")
    add("--free-gb", default="1", metavar="GB", help="required free disk space (default 1)")
    add("--slack", default="0.25", help="share of the median that a rank may lack (default 0.25)")
    add("--patience", default="20", metavar="S", help="seconds to wait for a rank (default 20)")
    add("--device", choices=["auto", "cpu", "cuda"], default="auto")
    add("--json", type=Path, metavar="FILE", help="also write all results here")
    add("--cluster-file", type=Path, metavar="FILE.toml", help="write what megahp plan --cluster reads")
    add("--exclude-file", type=Path, metavar="FILE", help="update this list of bad nodes")


class Board:
    """Share every rank's results through the ranks' store, so that a silent rank is detected."""

    def __init__(self, store: dist.Store, world: launch.World, patience: float) -> None:
        self.store, self.world, self.patience = store, world, timedelta(seconds=patience)

    def share(self, name: str, value: Any) -> list[Any]:
        """Return all ranks' values; None for a rank that does not answer. Raises Fault when rank 0 does not."""
        self.store.set(f"{name} {self.world.rank}", json.dumps(value))
        if self.world.rank == 0:
            deadline = time.monotonic() + self.patience.total_seconds()
            values = []
            for key in (f"{name} {rank}" for rank in range(self.world.size)):
                if (left := deadline - time.monotonic()) > 0:
                    with suppress(RuntimeError):
                        self.store.wait([key], timedelta(seconds=left))
                values.append(json.loads(self.store.get(key)) if self.store.check([key]) else None)
            self.store.set(name, json.dumps(values))
        try:
            self.store.wait([name], 3 * self.patience)  # rank 0 waits for others, and may have started later
        except RuntimeError:
            raise Fault(f"rank 0 does not answer rank {self.world.rank} within {3 * self.patience}") from None
        return json.loads(self.store.get(name))

    def close(self) -> None:
        """Wait for rank 0 to finish, which waits until others have read its last values: launchers end all ranks when
        one exits with an error, and the store ends with rank 0."""
        launch.keep_store_alive(self.world)
        with suppress(RuntimeError):
            self.store.set(f"through {self.world.rank}", "")
            self.store.wait(["through 0"], self.patience)


class ClockServer:
    """Send this rank's time to whoever connects to its port on this host, or on all networks if host is empty."""

    def __init__(self, host: str) -> None:
        both = not host and socket.has_dualstack_ipv6()
        family = socket.AF_INET6 if both else socket.AF_INET
        self.listener = socket.create_server((host, 0), family=family, backlog=1024, dualstack_ipv6=both)
        self.port = self.listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            connection, _ = self.listener.accept()
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        with connection:
            while connection.recv(1):
                connection.sendall(CLOCK.pack(time.time()))


def run(arguments: argparse.Namespace, words: Sequence[str]) -> int:
    free_gb = parse_positive(arguments.free_gb, "no number above 0 for --free-gb")
    patience = parse_positive(arguments.patience, "no number above 0 for --patience")
    slack = parse_positive(arguments.slack, "no share above 0 and below 1 for --slack")
    if slack >= 1:
        raise UserError(f"--slack {arguments.slack} must be below 1, the share of the median that a rank may lack")
    world = launch.world()
    if world.rank == 0:  # only rank 0 writes, and other nodes' folders may differ
        check_folder(arguments.exclude_file)
        check_folder(arguments.cluster_file)
        bad_nodes(arguments.exclude_file)  # or what was measured would be lost to a bad list
    if must_spawn(arguments.ranks, world.size):
        return launch.spawn(words, arguments.ranks)
    board = Board(launch.meet(world, timedelta(seconds=patience), wait_for_all=False), world, patience)
    try:
        results = check_ranks(board, arguments.folder, arguments.device, arguments.cluster_file is not None)
        problems = find_problems(results, slack, free_gb, launch.ranks_per_node(world.size))
        if world.rank == 0:
            write(arguments, words, results, problems)
            show(results, problems)
    finally:
        board.close()
    return 1 if problems else 0


def check_ranks(board: Board, folder: Path, choice: str, with_rates: bool = False) -> dict[str, list[Any]]:
    """Return all results, by stage and rank, up to a stage in which a rank is silent or a collective one failed. Raises
    UserError for invalid input, which all ranks find. with_rates: those of megahp.benchmark.rates too."""
    world, local_host = board.world, launch.LOOPBACK if launch.is_single_node(board.world) else ""
    clock = ClockServer(local_host)
    own_facts = facts(world, local_host or socket.gethostname(), clock.port, folder, choice)
    ranks = board.share("ranks", own_facts)
    results = {"ranks": ranks}
    if all(rank and rank["mistakes"] for rank in ranks):
        raise UserError(ranks[0]["mistakes"][0])
    if None in ranks or any(rank["mistakes"] for rank in ranks) or len({rank["device"] for rank in ranks}) > 1:
        return results
    device, nodes = device_of_rank(choice, world), [rank["node"] for rank in ranks]

    def join() -> str:
        os.environ["TORCH_NCCL_BLOCKING_WAIT"] = "1"  # NCCL's calls raise on a timeout, instead of aborting
        launch.join(world, device.type == "cuda", board.patience, board.store)
        warm_up(device)
        return "joined"

    stages: dict[str, Callable[[], Any]] = {
        "links": lambda: links(world, ranks),
        "memory": lambda: memory(device),
        "disk": lambda: disk(folder) if world.rank == nodes.index(ranks[world.rank]["node"]) else {},
        "gemm": lambda: gemm(device),
    }
    if with_rates:
        stages["rates"] = lambda: device_rates(device)
    if world.size > 1:
        kinds = groups_of_nodes(nodes)
        # pairs of the world only where there is no other kind: on uneven nodes
        paired = {kind: groups for kind, groups in kinds.items() if kind != "world" or len(kinds) == 1}
        # sums over the world, and over other kinds where they are not the same
        summed = {kind: groups for kind, groups in kinds.items() if kind == "world" or groups != kinds["world"]}
        stages |= {
            "join": join,
            "pairs": lambda: [pair for kind in paired.items() for pair in pairs(*kind, world.rank, device)],
            "all-reduce": lambda: {
                kind: all_reduce(TorchGroup(groups, device, board.patience)) for kind, groups in summed.items()
            },
        }
    for name, stage in stages.items():
        if world.rank == 0:
            print(f"{name} ...", flush=True)
        try:
            result = stage()
        except (OSError, RuntimeError) as error:  # shared too, so that the others do not wait for this rank
            result = {"error": (str(error).splitlines() or [type(error).__name__])[0]}
        results[name] = board.share(name, result)
        if None in results[name] or (name in COLLECTIVE and any("error" in rank for rank in results[name])):
            break
    return results


def facts(world: launch.World, host: str, port: int, folder: Path, choice: str) -> dict[str, Any]:
    """Return this rank's node, address, device and versions, and the mistakes that prevent further checks."""
    device, versions = "", dict[str, Any]()
    mistakes = [] if folder.is_dir() else [f"--folder {folder} is no folder; make it, or name another"]
    try:
        device = device_of_rank(choice, world).type
        cuda = device == "cuda"
        versions = {
            "device": torch.cuda.get_device_name() if cuda else platform.machine(),
            "python": platform.python_version(),
            "torch": torch.__version__,
            "numpy": np.__version__,
            "megahp": megahp.__version__,
            "CUDA": torch.version.cuda,
            "cuDNN": torch.backends.cudnn.version() if cuda else None,
            "NCCL": ".".join(map(str, torch.cuda.nccl.version())) if cuda else None,
            "CUDA of the driver": cuda_of_driver() if cuda else None,
        }
    except (UserError, RuntimeError) as error:
        mistakes.append(str(error).splitlines()[0])
    return {
        "node": launch.node_name(),
        "host": host,
        "port": port,
        "local_rank": world.local_rank,
        "device": device,
        "versions": versions,
        "mistakes": mistakes,
    }


def cuda_of_driver() -> int | None:
    """Return the newest CUDA that NVIDIA's driver serves, 13000 for 13.0; torch has no name for it that lasts."""
    version = ctypes.c_int()
    with suppress(OSError):  # another maker's driver
        ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version))
    return version.value or None


def memory(device: torch.device) -> dict[str, int]:
    """Return the device's free and total bytes; on a CPU those that Linux calls available."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info()
    else:
        lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        free, total = (1024 * int(lines[name].split()[0]) for name in ("MemAvailable", "MemTotal"))
    return {"free_bytes": free, "total_bytes": total}


def links(world: launch.World, ranks: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Connect to rank 0 and to the ranks 1, 2, 4, ... after this one. Returns each one's error, or round trip and clock
    offset in seconds: by how much this clock is ahead, assuming half of the quickest round trip each way, as NTP."""
    partners = {0} | {(world.rank + 2**k) % world.size for k in range(world.size.bit_length())}
    results: list[dict[str, Any]] = []
    for rank in sorted(partners - {world.rank}):
        host, port, exchanges = ranks[rank]["host"], ranks[rank]["port"], []
        try:
            with socket.create_connection((host, port), CONNECT_SECONDS) as connection:
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                for _ in range(EXCHANGES):
                    sent, began = time.time(), time.perf_counter()
                    connection.sendall(b"?")
                    remote_time = CLOCK.unpack(connection.recv(CLOCK.size, socket.MSG_WAITALL))[0]
                    trip = time.perf_counter() - began
                    exchanges.append((trip, sent + trip / 2 - remote_time))
            trip, offset = min(exchanges)
            results.append({"rank": rank, "seconds": trip, "offset": offset})
        except socket.gaierror as error:
            results.append({"rank": rank, "error": f"the name {host} does not resolve ({error.strerror})"})
        except (OSError, struct.error) as error:
            results.append({"rank": rank, "error": f"{host}:{port}: {error}"})
    return results


def disk(folder: Path) -> dict[str, Any]:
    """Return free bytes, and bytes per second with fsync, of a run's folder and of /tmp."""
    results, block = {}, os.urandom(2**22)
    for path in dict.fromkeys((folder.resolve(), Path(tempfile.gettempdir()))):
        free, best = shutil.disk_usage(path).free, math.inf
        for _ in range(FILES if free > 2 * DISK_BYTES else 0):
            with tempfile.TemporaryFile(dir=path, buffering=0) as file:
                began = time.perf_counter()
                for _ in range(DISK_BYTES // len(block)):
                    file.write(block)
                os.fsync(file.fileno())
                best = min(best, time.perf_counter() - began)
        results[str(path)] = {"free_bytes": free, "bytes_per_second": DISK_BYTES / best}
    return results


def gemm(device: torch.device) -> dict[str, Any]:
    """Return FLOP/s of a square matrix product, its number of wrong rows, and its checksum.

    A is -1, 0 or 1, B -1 or 1, and A is sparse, so that every sum, in any order, is a whole number that bf16 holds.
    Rows are checked by Freivalds' product with a vector, exact in float64: a row with one wrong element never passes.
    """
    n, dtype = SIDE[device.type], torch.float32 if device.type == "cpu" else torch.bfloat16
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(0, 32, (n, n), generator=generator)
    a = ((drawn == 0).int() - (drawn == 1).int()).to(device, dtype)
    b = (torch.randint(0, 2, (n, n), generator=generator) * 2 - 1).to(device, dtype)
    signs = (torch.randint(0, 2, (n, 1), generator=generator) * 2 - 1).to(device, torch.float64)
    best, c = math.inf, a @ b
    for _ in range(REPEATS):
        synchronize(device)
        began = time.perf_counter()
        c = a @ b
        synchronize(device)
        best = min(best, time.perf_counter() - began)
    wrong = (c.double() @ signs != a.double() @ (b.double() @ signs)).sum()
    checksum = zlib.crc32(c.cpu().view(torch.uint8).numpy().data)
    return {"flops": 2 * n**3 / best, "wrong": int(wrong), "checksum": checksum}


def pairs(kind: str, groups: Groups, rank: int, device: torch.device) -> Iterator[dict[str, Any]]:
    """Measure this rank's pairs with its neighbours in the ring of its group, all pairs of a round at once."""
    ring = next(ranks for ranks in groups if rank in ranks)
    index = ring.index(rank)
    for partners in rounds(len(ring)):
        dist.barrier()
        if index in partners:
            other = ring[partners[index]]
            yield {"kind": kind, "with": other, **pair(other, rank, device)}


def rounds(size: int) -> list[dict[int, int]]:
    """Return everyone's partner in each round, so that all neighbours in a ring are paired once, and one at a time."""
    edges = [(index, (index + 1) % size) for index in range(size if size > 2 else size - 1)]
    # even edges, odd edges, and the one that closes the ring: of an odd ring it would meet a neighbour in either
    matchings = [edges[: size - 1 : 2], edges[1 : size - 1 : 2], edges[size - 1 :]]
    return [dict([*matching, *((b, a) for a, b in matching)]) for matching in matchings if matching]


def pair(other: int, rank: int, device: torch.device) -> dict[str, Any]:
    """Return bytes per second each way, both at once; seconds of half a round trip of 8 bytes; wrong elements."""
    large, times, wrong = MESSAGE[device.type] // 4, [], 0
    for size, repeats in ((large, REPEATS), (2, 10 * REPEATS)):
        source, target = pattern(rank, 0, size).to(device), torch.empty(size, device=device)
        times.append(min(swap(source, target, other) for _ in range(repeats)))
        wrong += int((target != pattern(other, 0, size).to(device)).sum())
    return {"bytes_per_second": 4 * large / times[0], "seconds": times[1], "wrong": wrong}


def swap(source: torch.Tensor, target: torch.Tensor, other: int) -> float:
    synchronize(source.device)
    began = time.perf_counter()
    for work in dist.batch_isend_irecv([dist.P2POp(dist.isend, source, other), dist.P2POp(dist.irecv, target, other)]):
        work.wait()
    synchronize(source.device)
    return time.perf_counter() - began


def all_reduce(group: TorchGroup) -> dict[str, Any]:
    """Return the bus bandwidth, as `megahp benchmark communication` defines it, and the number of wrong elements."""
    timing = time_operation(group, "all-reduce", MESSAGE[group.device.type], REPEATS)
    rate = timing.bus_bandwidth("all-reduce", group.size, min(timing.seconds))
    return {"bytes_per_second": rate, "wrong": timing.wrong}


def show(results: Findings, problems: Sequence[Problem]) -> None:
    """Print a row per rank, ? where a result is missing, then the problems."""
    memories, disks, gemms = (answers(results, stage) for stage in ("memory", "disk", "gemm"))
    offsets, best = clock_offsets(answers(results, "links")), best_pairs(answers(results, "pairs"))
    columns = "{:<6}{:<14}{:<24}{:>9}{:>10}{:>12}{:>10}  {}"
    print(columns.format("rank", "node", "device", "free GB", "clock ms", "disks GB/s", "TFLOP/s", "pairs GB/s, us"))
    bad = {problem.node for problem in problems}
    for rank, answer in answers(results, "ranks").items():
        if len(results["ranks"]) > SHOWN_RANKS and answer["node"] not in bad:
            continue
        device = answer["versions"].get("device", "?")
        free = f"{memories[rank]['free_bytes'] / 1e9:.1f}" if rank in memories else "?"
        clock = f"{1e3 * offsets[rank]:+.2f}" if rank in offsets else "?"
        rates = "/".join(f"{path['bytes_per_second'] / 1e9:.2f}" for path in disks.get(rank, {}).values())
        speed = f"{gemms[rank]['flops'] / 1e12:.3g}" if rank in gemms else "?"
        own_best = {kind: by_rank[rank] for kind, by_rank in best.items() if rank in by_rank}
        near = "; ".join(f"{kind} {rate / 1e9:.3g}, {1e6 * seconds:.0f}" for kind, (rate, seconds) in own_best.items())
        print(columns.format(rank, answer["node"], device, free, clock, rates, speed, near))
    for kind, result in answers(results, "all-reduce").get(0, {}).items():
        print(f"all-reduce ({kind}): bus bandwidth {result['bytes_per_second'] / 1e9:.3g} GB/s")
    for problem in problems:
        print(f"BAD  {problem.node or 'somewhere'}: {problem.what}")
    nodes = {rank["node"] for rank in results["ranks"] if rank}
    named = sorted(filter(None, bad))
    summary = f"{', '.join(named)} bad" if named else "no node is bad" if not problems else "no node can be named"
    print(f"{len(nodes)} nodes, {len(results['ranks'])} ranks: {summary}")


def bad_nodes(file: Path | None) -> list[str]:
    """Return the nodes in an existing list. Raises UserError."""
    return read_text(file, "--exclude-file", "name another").split() if file and file.exists() else []


def write(arguments: argparse.Namespace, words: Sequence[str], results: Findings, problems: Sequence[Problem]) -> None:
    """Write the JSON, and update the list of nodes to exclude."""
    listed = [vars(problem) for problem in problems]
    write_json(arguments.json, {**provenance(words), "found": results, "problems": listed})
    if arguments.cluster_file:
        replace_text(arguments.cluster_file, cluster_file(results))
    if file := arguments.exclude_file:
        with open_unlinked(file.with_name(f".{file.name}.lock"), "w") as lock:
            with suppress(OSError):  # file systems without locks
                fcntl.flock(lock, fcntl.LOCK_EX)
            replace_text(file, "".join(f"{node}\n" for node in excluded(bad_nodes(file), results, problems)))


def cluster_file(results: Findings) -> str:
    """Return what was measured as a cluster file: of each kind the median over the ranks. Raises UserError where a
    check did not come so far."""
    ranks, memories, rates = (answers(results, stage) for stage in ("ranks", "memory", "rates"))
    if not rates:
        raise UserError("--cluster-file: the check ended before the devices' rates were measured; repair what it names")
    device, total = ranks[0]["versions"]["device"], min(each["total_bytes"] for each in memories.values())
    nodes = Counter(each["node"] for each in ranks.values())
    # where all ranks are one node's, or each of another, these groups are the world's, which was measured once
    world = "node" if len(nodes) == 1 else "between nodes" if max(nodes.values()) == 1 else "world"
    sums = answers(results, "all-reduce").get(0, {})
    bandwidth = {world if kind == "world" else kind: each["bytes_per_second"] for kind, each in sums.items()}
    latency = {
        kind: statistics.median(seconds for _, seconds in by_rank.values())
        for kind, by_rank in best_pairs(answers(results, "pairs")).items()
    }
    middle = sorted(rates.values(), key=lambda each: each["products"]["bfloat16"])[len(rates) // 2]
    links = measured_links(bandwidth, latency)
    machine = measured_machine(device, total, max(nodes.values()), middle, links)
    return machine_toml(machine, load_machine(name_of(device) or "h100"))
