"""Are these nodes fit to train on? Measures every rank, compares it with the others, names what stands out.

    srun --ntasks-per-node=8 megahp check-cluster --exclude-file bad-nodes.txt      # or torchrun, mpirun,
        [--ranks N] [--folder .] [--free-gb 1] [--slack 0.25] [--patience 20] [--device auto|cpu|cuda]    # or alone
        [--json FILE]

What is looked at, and what makes a node bad:

    who comes  ranks that do not answer (under srun their nodes are named); no --folder on a node, or fewer devices than
               ranks. Nothing more is looked at then, nor where some ranks are on CUDA and some on the CPU
    versions   device, python, torch, numpy, megahp, CUDA, cuDNN, NCCL, driver: not those of most ranks
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
    silence    a rank that does not answer within --patience seconds, at any of these

Times are the best of several, so that a moment's other work does not count. What cannot be told names nobody: unless
more than half of the nodes agree on a version, a product or the time, whose is wrong. Two nodes that do not reach each
other are both named. With two nodes the median lies between them, so that --slack 0.25 means 40 % less than the other.
One rank alone looks at itself. What all ranks lack is a mistake in what was given, and no node's fault.

Exit code 0: all are fit; 1: some are not, or the ranks did not meet; 2: a mistake in what was given. --exclude-file
holds one node a line: bad ones are added, those that were looked at and are fit are taken out, others stay.

    sbatch --exclude=$(paste -sd, bad-nodes.txt) ...
"""

import argparse
import fcntl
import json
import math
import os
import platform
import shutil
import socket
import struct
import tempfile
import threading
import time
import zlib
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
from megahp.benchmark.communication import Groups, TorchGroup, device_of_rank, greet, groups_of_nodes, pattern, timed
from megahp.benchmark.machine import synchronize
from megahp.cluster.outliers import TOGETHER, Found, Problem, best_pairs, excluded, heard, offsets_of, verdict
from megahp.commands.arguments import positive, starts_ranks
from megahp.commands.output import about, refuse_unwritable, write_json
from megahp.errors import Fault, UserError
from megahp.files import open_unlinked

CLOCK = struct.Struct("d")
EXCHANGES = 10  # of clocks, on one connection
CONNECT_SECONDS = 5.0
DISK_BYTES = 2**26  # written
MESSAGE = {"cpu": 2**22, "cuda": 2**28}  # bytes, of a pair and of an all-reduce
SIDE = {"cpu": 1024, "cuda": 8192}  # of the square matrices
TURNS, FILES = 7, 3  # of which the best counts
SHOWN = 64  # ranks in the table; of more, those that stand out


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--ranks", type=int, metavar="N", help="start N ranks on this machine")
    add("--folder", type=Path, default=Path(), help="where the run will write (default: here)")
    add("--free-gb", default="1", metavar="GB", help="of room wanted on disks (default 1)")
    add("--slack", default="0.25", help="share of the median that a rank may lack (default 0.25)")
    add("--patience", default="20", metavar="S", help="seconds to wait for a rank (default 20)")
    add("--device", choices=["auto", "cpu", "cuda"], default="auto")
    add("--json", type=Path, metavar="FILE", help="write everything found here too")
    add("--exclude-file", type=Path, metavar="FILE", help="keep the list of bad nodes here")


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
        if (left := deadline - time.monotonic()) > 0:
            with suppress(RuntimeError):
                self.store.wait([key], timedelta(seconds=left))
        return json.loads(self.store.get(key)) if self.store.check([key]) else None

    def close(self) -> None:
        """The others stay until rank 0 is through, which leaves them time to hear what it told last: launchers end all
        ranks when one has left with an exit code, and the store goes with rank 0."""
        launch.keep_store_alive(self.place)
        with suppress(RuntimeError):
            self.store.set(f"through {self.place.rank}", "")
            self.store.wait(["through 0"], self.patience)


class Clock:
    """Tells this rank's time to whoever connects to its port on this host, or on all of its networks where host is
    empty."""

    def __init__(self, host: str) -> None:
        both = not host and socket.has_dualstack_ipv6()
        family = socket.AF_INET6 if both else socket.AF_INET
        self.listener = socket.create_server((host, 0), family=family, backlog=1024, dualstack_ipv6=both)
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


def run(arguments: argparse.Namespace, words: Sequence[str]) -> int:
    """Look at all ranks, and compare. Returns 1 if a node is bad, else 0."""
    free_gb = positive(arguments.free_gb, "no number above 0 for --free-gb")
    patience = positive(arguments.patience, "no number above 0 for --patience")
    slack = positive(arguments.slack, "no share above 0 and below 1 for --slack")
    if slack >= 1:
        raise UserError(f"--slack {arguments.slack} must be below 1, the share of the median that a rank may lack")
    place = launch.world()
    if place.rank == 0:  # which writes; of other nodes something else may be wrong
        refuse_unwritable(arguments.json, arguments.exclude_file)
    if starts_ranks(arguments.ranks, place.size):
        return launch.spawn(words, arguments.ranks)
    board = Board(launch.meet(place, timedelta(seconds=patience), wait_for_all=False), place, patience)
    try:
        found = look(board, arguments.folder, arguments.device)
        problems = verdict(found, slack, free_gb, launch.ranks_per_node(place.size))
        if place.rank == 0:
            write(arguments, words, found, problems)
            show(found, problems)
    finally:
        board.close()
    return 1 if problems else 0


def look(board: Board, folder: Path, choice: str) -> dict[str, list[Any]]:
    """All stages' findings, by stage and rank. Ends with the stage in which a rank is silent, or is not heard. Raises
    UserError for a mistake that all ranks find."""
    place, local = board.place, launch.LOOPBACK if launch.is_single_node(board.place) else ""
    clock = Clock(local)
    ranks = board.share("ranks", facts(place, local or socket.gethostname(), clock.port, folder, choice))
    found = {"ranks": ranks}
    if all(rank and rank["mistakes"] for rank in ranks):
        raise UserError(ranks[0]["mistakes"][0])
    if None in ranks or any(rank["mistakes"] for rank in ranks) or len({rank["device"] for rank in ranks}) > 1:
        return found
    device, nodes = device_of_rank(choice, place), [rank["node"] for rank in ranks]

    def join() -> str:
        os.environ["TORCH_NCCL_BLOCKING_WAIT"] = "1"  # NCCL's calls that wait too long raise then, and do not abort
        launch.join(place, device.type == "cuda", board.patience, board.store)
        greet(device)
        return "joined"

    stages: dict[str, Callable[[], Any]] = {
        "links": lambda: links(place, ranks),
        "memory": lambda: memory(device),
        "disk": lambda: disk(folder) if place.rank == nodes.index(ranks[place.rank]["node"]) else {},
        "gemm": lambda: gemm(device),
    }
    if place.size > 1:
        kinds = groups_of_nodes(nodes)
        # world only where there is nothing else, on uneven nodes
        paired = {kind: groups for kind, groups in kinds.items() if kind != "world" or len(kinds) == 1}
        # world, and others where they are not the same
        summed = {kind: groups for kind, groups in kinds.items() if kind == "world" or groups != kinds["world"]}
        stages |= {
            "join": join,
            "pairs": lambda: [pair for kind in paired.items() for pair in pairs(*kind, place.rank, device)],
            "all-reduce": lambda: {
                kind: all_reduce(TorchGroup(groups, device, board.patience)) for kind, groups in summed.items()
            },
        }
    for name, stage in stages.items():
        if place.rank == 0:
            print(f"{name} ...", flush=True)
        try:
            own = stage()
        except (OSError, RuntimeError) as error:  # of a rank that has one, the others shall know
            own = {"error": (str(error).splitlines() or [type(error).__name__])[0]}
        found[name] = board.share(name, own)
        if None in found[name] or (name in TOGETHER and any("error" in each for each in found[name])):
            break
    return found


def facts(place: launch.World, host: str, port: int, folder: Path, choice: str) -> dict[str, Any]:
    """Who this is, on which kind of device, with which versions; and what keeps it from going on."""
    device, versions = "", dict[str, Any]()
    mistakes = [] if folder.is_dir() else [f"--folder {folder} is no folder; make it, or name another"]
    try:
        device = device_of_rank(choice, place).type
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
            "CUDA of the driver": torch._C._cuda_getDriverVersion() if cuda else None,  # type: ignore[attr-defined]
        }
    except (UserError, RuntimeError) as error:
        mistakes.append(str(error).splitlines()[0])
    return {
        "node": launch.node_name(),
        "host": host,
        "port": port,
        "local_rank": place.local_rank,
        "device": device,
        "versions": versions,
        "mistakes": mistakes,
    }


def memory(device: torch.device) -> dict[str, int]:
    """Bytes that are free on a device, and all; on a CPU those that are available, by Linux."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info()
    else:
        lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        free, total = (1024 * int(lines[name].split()[0]) for name in ("MemAvailable", "MemTotal"))
    return {"free_bytes": free, "total_bytes": total}


def links(place: launch.World, ranks: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Connections to rank 0 and to those 1, 2, 4, ... further on: their error, or round trip and clock offset (s):
    by how much this clock is ahead, by half of the quickest round trip, as NTP takes it."""
    partners = {0} | {(place.rank + 2**k) % place.size for k in range(place.size.bit_length())}
    found: list[dict[str, Any]] = []
    for rank in sorted(partners - {place.rank}):
        host, port, exchanges = ranks[rank]["host"], ranks[rank]["port"], []
        try:
            with socket.create_connection((host, port), CONNECT_SECONDS) as connection:
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                for _ in range(EXCHANGES):
                    sent, began = time.time(), time.perf_counter()
                    connection.sendall(b"?")
                    theirs = CLOCK.unpack(connection.recv(CLOCK.size, socket.MSG_WAITALL))[0]
                    trip = time.perf_counter() - began
                    exchanges.append((trip, sent + trip / 2 - theirs))
            trip, offset = min(exchanges)
            found.append({"rank": rank, "seconds": trip, "offset": offset})
        except socket.gaierror as error:
            found.append({"rank": rank, "error": f"the name {host} does not resolve ({error.strerror})"})
        except (OSError, struct.error) as error:
            found.append({"rank": rank, "error": f"{host}:{port}: {error}"})
    return found


def disk(folder: Path) -> dict[str, Any]:
    """Bytes free, and bytes a second with fsync, of a run's folder and of /tmp."""
    found, block = {}, os.urandom(2**22)
    for place in dict.fromkeys((folder.resolve(), Path(tempfile.gettempdir()))):
        free, best = shutil.disk_usage(place).free, math.inf
        for _ in range(FILES if free > 2 * DISK_BYTES else 0):
            with tempfile.TemporaryFile(dir=place, buffering=0) as file:
                began = time.perf_counter()
                for _ in range(DISK_BYTES // len(block)):
                    file.write(block)
                os.fsync(file.fileno())
                best = min(best, time.perf_counter() - began)
        found[str(place)] = {"free_bytes": free, "bytes_per_second": DISK_BYTES / best}
    return found


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
    large, times, wrong = MESSAGE[device.type] // 4, [], 0
    for size, turns in ((large, TURNS), (2, 10 * TURNS)):
        given, taken = pattern(rank, 0, size).to(device), torch.empty(size, device=device)
        times.append(min(swap(given, taken, other) for _ in range(turns)))
        wrong += int((taken != pattern(other, 0, size).to(device)).sum())
    return {"bytes_per_second": 4 * large / times[0], "seconds": times[1], "wrong": wrong}


def swap(given: torch.Tensor, taken: torch.Tensor, other: int) -> float:
    synchronize(given.device)
    began = time.perf_counter()
    for work in dist.batch_isend_irecv([dist.P2POp(dist.isend, given, other), dist.P2POp(dist.irecv, taken, other)]):
        work.wait()
    synchronize(given.device)
    return time.perf_counter() - began


def all_reduce(group: TorchGroup) -> dict[str, Any]:
    """Bus bandwidth, by the definition of `megahp benchmark communication`, and wrong elements."""
    timing = timed(group, "all-reduce", MESSAGE[group.device.type], TURNS)
    rate = timing.bus_bandwidth("all-reduce", group.size, min(timing.seconds))
    return {"bytes_per_second": rate, "wrong": timing.wrong}


def show(found: Found, problems: Sequence[Problem]) -> None:
    """Print a line a rank, those of a large job that stand out: what of it was found, ? for what was not. Then what is
    wrong."""
    memories, disks, gemms = (heard(found, stage) for stage in ("memory", "disk", "gemm"))
    offsets, best = offsets_of(heard(found, "links")), best_pairs(heard(found, "pairs"))
    layout = "{:<6}{:<14}{:<24}{:>9}{:>10}{:>12}{:>10}  {}"
    print(layout.format("rank", "node", "device", "free GB", "clock ms", "disks GB/s", "TFLOP/s", "pairs GB/s, us"))
    bad = {problem.node for problem in problems}
    for rank, each in heard(found, "ranks").items():
        if len(found["ranks"]) > SHOWN and each["node"] not in bad:
            continue
        device = each["versions"].get("device", "?")
        free = f"{memories[rank]['free_bytes'] / 1e9:.1f}" if rank in memories else "?"
        clock = f"{1e3 * offsets[rank]:+.2f}" if rank in offsets else "?"
        rates = "/".join(f"{place['bytes_per_second'] / 1e9:.2f}" for place in disks.get(rank, {}).values())
        speed = f"{gemms[rank]['flops'] / 1e12:.3g}" if rank in gemms else "?"
        mine = {kind: of[rank] for kind, of in best.items() if rank in of}
        near = "; ".join(f"{kind} {rate / 1e9:.3g}, {1e6 * seconds:.0f}" for kind, (rate, seconds) in mine.items())
        print(layout.format(rank, each["node"], device, free, clock, rates, speed, near))
    for kind, each in heard(found, "all-reduce").get(0, {}).items():
        print(f"all-reduce ({kind}): bus bandwidth {each['bytes_per_second'] / 1e9:.3g} GB/s")
    for problem in problems:
        print(f"BAD  {problem.node or 'somewhere'}: {problem.what}")
    nodes = {rank["node"] for rank in found["ranks"] if rank}
    named = sorted(filter(None, bad))
    said = f"{', '.join(named)} bad" if named else "no node is bad" if not problems else "no node can be named"
    print(f"{len(nodes)} nodes, {len(found['ranks'])} ranks: {said}")


def write(arguments: argparse.Namespace, words: Sequence[str], found: Found, problems: Sequence[Problem]) -> None:
    """The JSON, and the list of nodes to be left out."""
    write_json(arguments.json, {**about(words), "found": found, "problems": [vars(problem) for problem in problems]})
    if file := arguments.exclude_file:
        with open_unlinked(file.with_name(f".{file.name}.lock"), "w") as lock:
            with suppress(OSError):  # file systems without locks
                fcntl.flock(lock, fcntl.LOCK_EX)
            before = file.read_text().split() if file.exists() else []
            fresh = file.with_name(f".{file.name}.{os.getpid()}")
            with open_unlinked(fresh, "w") as lines:
                lines.writelines(f"{node}\n" for node in excluded(before, found, problems))
            fresh.replace(file)
