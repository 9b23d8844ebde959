"""Test the cluster check: each kind of fault is named, and nothing else; a really slow rank is found."""

from __future__ import annotations

import json
import os
import platform
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from megahp import cli
from megahp.errors import UserError
from megahp.plan.machine import Machine, load_machine

SCRIPT = Path(__file__).parents[2] / "tools" / "check_cluster.py"
COMMAND = ["check-cluster"]
NODES = ["n1", "n1", "n2", "n2", "n3", "n3", "n4", "n4"]
EXPECTED = dict.fromkeys(NODES, 2)
SLOW = 1  # rank


def healthy() -> dict[str, list[Any]]:
    """Return the results of four healthy nodes with two ranks each."""
    size = len(NODES)
    pairs = [
        [
            {"kind": "node", "with": rank ^ 1, "bytes_per_second": 9e9, "seconds": 1e-6, "wrong": 0},
            *(
                {
                    "kind": "between nodes",
                    "with": (rank + by) % size,
                    "bytes_per_second": 1e9,
                    "seconds": 5e-6,
                    "wrong": 0,
                }
                for by in (2, -2)
            ),
        ]
        for rank in range(size)
    ]
    return {
        "ranks": [
            {"node": node, "device": "cuda", "versions": {"torch": "2.13", "NCCL": "2.29"}, "mistakes": []}
            for node in NODES
        ],
        "links": [
            [
                {"rank": other, "seconds": 1e-4, "offset": 1e-3 * rank}
                for other in sorted({0, *((rank + 2**k) % size for k in range(4))} - {rank})
            ]
            for rank in range(size)
        ],
        "memory": [{"free_bytes": 8e10} for _ in NODES],
        "disk": [
            {"/tmp": {"free_bytes": 1e11, "bytes_per_second": 1e9}} if rank % 2 == 0 else {} for rank in range(size)
        ],
        "gemm": [{"flops": 9e14 + rank, "wrong": 0, "checksum": 7} for rank in range(size)],
        "join": ["joined"] * size,
        "pairs": pairs,
        "all-reduce": [{"world": {"bytes_per_second": 1e9, "wrong": 0}} for _ in range(size)],
    }


def find_problems(tool: ModuleType, results: dict[str, list[Any]], expected: Mapping[str, int] = EXPECTED) -> Any:
    return tool.find_problems(results, 0.25, 1.0, expected)


def test_ranks_on_unlike_devices_do_nothing_together(tool: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """What all ranks lack is invalid input."""

    def facts(world: Any, *_: Any) -> dict[str, Any]:
        kind = ("cuda", "cpu")[world.rank]
        return {"node": f"n{world.rank}", "device": kind, "versions": {"device": kind}, "mistakes": mistakes}

    def look() -> list[dict[str, list[Any]]]:
        store = torch.distributed.HashStore()
        boards = [tool.Board(store, tool.launch.World(rank, 2, rank, 2), 9.0) for rank in range(2)]
        with ThreadPoolExecutor(2) as pool:
            return list(pool.map(lambda board: tool.check_ranks(board, Path(), "auto"), boards))

    monkeypatch.setattr(tool, "facts", facts)
    mistakes: list[str] = []
    first, second = look()
    assert list(first) == list(second) == ["ranks"]
    assert find_problems(tool, first, {}) == [tool.Problem("n1", "rank 1 is on the CPU, others on CUDA")]
    mistakes.append("--folder runs is no folder")
    with pytest.raises(UserError, match="runs is no folder"):
        look()


def test_what_was_measured_is_a_cluster_file(tool: ModuleType, tmp_path: Path) -> None:
    """Of links inside and between nodes that of their own groups; on one node the world is that node."""
    results = healthy()
    for rank in results["ranks"]:
        rank["versions"]["device"] = "NVIDIA H100 80GB HBM3"
    results["memory"] = [{"free_bytes": 8e10, "total_bytes": 8.5e10} for _ in NODES]
    products = dict.fromkeys(("float32", "float16", "bfloat16"), 6e14)
    results["rates"] = [{"products": products, "memory": 2.5e12, "launch": 4e-6, "units": 132} for _ in NODES]
    sums = {"world": 3e9, "node": 3e11, "between nodes": 2e10}
    results["all-reduce"] = [
        {kind: {"bytes_per_second": rate, "wrong": 0} for kind, rate in sums.items()} for _ in NODES
    ]

    def written() -> Machine:
        (tmp_path / "mine.toml").write_text(tool.cluster_file(results))
        return load_machine(str(tmp_path / "mine.toml"))

    machine = written()
    assert (machine.gpus_per_node, machine.memory, machine.peak.bfloat16) == (2, 8.5e10, 989e12)
    links = machine.links
    assert (links.node_bandwidth, links.node_latency) == (3e11, 1e-6)
    assert (links.network_bandwidth, links.network_latency) == (2e10, 5e-6)
    for rank in results["ranks"]:
        rank["node"] = "n1"
    for sums_of_rank in results["all-reduce"]:
        del sums_of_rank["node"], sums_of_rank["between nodes"]
    assert written().links.node_bandwidth == 3e9 and written().gpus_per_node == 8
    del results["rates"]
    with pytest.raises(UserError, match="--cluster-file: the check ended before"):
        written()


def test_the_list_of_bad_nodes_is_kept(tool: ModuleType) -> None:
    """Nodes found fit are removed; all stay where a stage is missing or a fault has no node."""
    bad, unknown, before = tool.Problem("n3", ""), tool.Problem(None, ""), ["n2", "n9"]
    assert tool.excluded(before, healthy(), [bad]) == ["n3", "n9"]
    assert tool.excluded(before, healthy(), [bad, unknown]) == ["n2", "n3", "n9"]
    assert tool.excluded(before, {"ranks": healthy()["ranks"]}, [bad]) == ["n2", "n3", "n9"]


def test_lists_of_several_checks_are_one(tool: ModuleType, tmp_path: Path) -> None:
    """Eight checks at the same time, each on its own nodes."""
    file, pool = tmp_path / "bad.txt", ThreadPoolExecutor(8)
    arguments = cli.parse([*COMMAND, "--exclude-file", str(file)])[1]
    bad = [[tool.Problem(f"n{number}", "")] for number in range(8)]
    list(pool.map(lambda problems: tool.write(arguments, [], {"ranks": []}, problems), bad))
    assert file.read_text().split() == [f"n{number}" for number in range(8)]


@pytest.mark.parametrize("size", range(2, 9))
def test_in_every_round_a_rank_has_one_partner(size: int, tool: ModuleType) -> None:
    rounds = tool.rounds(size)
    assert all(match[match[one]] == one != match[one] for match in rounds for one in match)
    edges = sorted(tuple(sorted((one, match[one]))) for match in rounds for one in match)
    ring = {tuple(sorted((one, (one + 1) % size))) for one in range(size)}
    assert edges == sorted([*ring, *ring])  # from both ends


def test_a_wrong_product_is_seen(tool: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tool, "SIDE", {"cpu": 128})
    assert tool.gemm(torch.device("cpu"))["wrong"] == 0
    right = torch.Tensor.__matmul__

    def broken(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        c = right(a, b)
        if c.dtype == torch.float32:
            c[5, 7] += 1
        return c

    monkeypatch.setattr(torch.Tensor, "__matmul__", broken)
    assert tool.gemm(torch.device("cpu"))["wrong"] == 1


def test_a_slow_rank_is_named(tmp_path: Path, tool: ModuleType) -> None:
    """Three real ranks, one of them stopped for 19/20 of the time while all multiply matrices."""
    (tmp_path / "bad.txt").write_text("n9\n")
    words = ["--ranks", "3", "--slack", "0.6", "--json", "found.json", "--exclude-file", "bad.txt"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "SLURMD_NODENAME": "n1"}
    command = [sys.executable, str(SCRIPT), *words]
    check = subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True)
    assert check.stdout
    out, over = "", threading.Event()
    for line in check.stdout:
        out += line
        if line.startswith("gemm"):
            threading.Thread(target=throttle, args=(pid_of_rank(check.pid, SLOW), over)).start()
        elif line.startswith("join"):
            over.set()
    over.set()
    assert check.wait(60) == 1, out
    assert f"BAD  n1: rank {SLOW}: " in out and "TFLOP/s, the median is" in out
    assert (tmp_path / "bad.txt").read_text() == "n1\nn9\n"
    assert out.count("\nrank  node") == 1 and f"\n{SLOW}     n1            {platform.machine()} " in out
    everything = json.loads((tmp_path / "found.json").read_text())
    assert everything["command"][:2] == ["megahp", *COMMAND] and everything["versions"]["torch"]
    results = everything["found"]
    assert [[link["rank"] for link in links] for links in results["links"]] == [[1, 2], [0, 2], [0, 1]]
    assert all(abs(link["offset"]) < 0.1 for links in results["links"] for link in links)
    assert [sorted(disks) for disks in results["disk"]] == [sorted({str(tmp_path), tempfile.gettempdir()}), [], []]
    assert all(disk["bytes_per_second"] > 1e6 for disk in results["disk"][0].values())
    assert all(0 < memory["free_bytes"] < memory["total_bytes"] for memory in results["memory"])
    products = results["gemm"]
    assert min(products, key=lambda each: each["flops"]) == products[SLOW]
    assert len({each["checksum"] for each in products}) == 1
    pairs = [pair for pairs in results["pairs"] for pair in pairs]
    assert [[pair["with"] for pair in pairs] for pairs in results["pairs"]] == [[1, 2], [0, 2], [1, 0]]
    assert all(pair["wrong"] == 0 and 1e-7 < pair["seconds"] < 0.1 for pair in pairs)
    assert all(1e-4 < tool.MESSAGE["cpu"] / pair["bytes_per_second"] < 1 for pair in pairs)
    assert [list(each) for each in results["all-reduce"]] == [
        ["world"]
    ] * 3  # of which the only node's would be the same


def test_nodes_that_do_not_come_or_lack_the_folder_are_named(tmp_path: Path) -> None:
    """Two real ranks of the three that srun claims to have started; the second has no folder."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    step = {"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "3", "SLURM_STEP_TASKS_PER_NODE": "1(x3)"}
    step |= {
        "SLURM_STEP_NODELIST": "n[1-3]",
        "SLURM_LOCALID": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    command = [sys.executable, str(SCRIPT), "--folder", "runs", "--patience", "8", "--exclude-file", "bad.txt"]
    ranks = []
    for rank in range(2):
        folder = tmp_path / str(rank)
        (folder / ("runs" if rank == 0 else "nothing")).mkdir(parents=True)
        own = {"SLURM_PROCID": str(rank), "SLURM_NODEID": str(rank), "SLURMD_NODENAME": f"n{rank + 1}"}
        environment = os.environ | step | own
        ranks.append(subprocess.Popen(command, cwd=folder, env=environment, stdout=subprocess.PIPE, text=True))
    output = [rank.communicate(timeout=60)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [1, 1] and not output[1]
    assert "BAD  n3: 1 of its 1 ranks do not answer\nBAD  n2: --folder runs is no folder" in output[0]
    assert "2 nodes, 3 ranks: n2, n3 bad" in output[0]
    assert (tmp_path / "0" / "bad.txt").read_text() == "n2\nn3\n"


def test_a_changed_message_is_seen(tool: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tool, "MESSAGE", {"cpu": 4096})

    def swap(given: torch.Tensor, taken: torch.Tensor, other: int) -> float:
        taken.copy_(tool.pattern(other, 0, len(taken)))
        taken[1] += 1
        return 0.5

    monkeypatch.setattr(tool, "swap", swap)
    assert tool.pair(1, 0, torch.device("cpu")) == {"bytes_per_second": 8192, "seconds": 0.5, "wrong": 2}


def pid_of_rank(launcher: int, rank: int) -> int:
    children = Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()
    return next(int(pid) for pid in children if f"\0RANK={rank}\0" in Path(f"/proc/{pid}/environ").read_text())


def throttle(pid: int, over: threading.Event) -> None:
    with suppress(ProcessLookupError):
        while not over.wait(0.005):
            os.kill(pid, signal.SIGSTOP)
            time.sleep(0.095)
            os.kill(pid, signal.SIGCONT)


@pytest.mark.parametrize(
    ("words", "mistake"),
    [
        (["--slack", "1.5"], "--slack 1.5 must be below 1"),
        (["--patience", "soon"], "'soon' is no number above 0 for --patience"),
        (["--folder", "nowhere"], "--folder nowhere is no folder"),
        (["--exclude-file", "nowhere/bad.txt"], "nowhere is no folder"),
        (["--exclude-file", "/dev/zero"], "--exclude-file /dev/zero is not a regular file"),
    ],
)
def test_invalid_input(words: list[str], mistake: str, tool: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([*COMMAND, *words]) == 2
    assert mistake in capsys.readouterr().err
