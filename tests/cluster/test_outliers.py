"""What stands out among nodes: each kind of fault is named, and nothing else."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
from commands.test_check_cluster import NODES, find_problems, healthy

from megahp.commands import check_cluster as tool


def slow_pairs(found: dict[str, list[Any]], rank: int, kind: str, key: str, factor: float) -> None:
    """All pairs of a rank, seen from both ends."""
    for one, each in enumerate(found["pairs"]):
        for pair in each:
            if pair["kind"] == kind and rank in (one, pair["with"]):
                pair[key] *= factor


def cut(found: dict[str, list[Any]], nodes: set[str]) -> None:
    """All connections with these nodes."""
    for rank, partners in enumerate(found["links"]):
        for number, partner in enumerate(partners):
            ends = {NODES[rank], NODES[partner["rank"]]}
            if len(ends) == 2 and ends & nodes:
                partners[number] = {"rank": partner["rank"], "error": "timed out"}


Fault = Callable[[dict[str, list[Any]]], object]


FAULTS: dict[str, tuple[Fault, set[str | None], str]] = {
    "version": (lambda f: f["ranks"][3]["versions"].update(torch="2.11"), {"n2"}, "torch 2.11, others have 2.13"),
    "memory": (lambda f: f["memory"][5].update(free_bytes=5e10), {"n3"}, "50 GB of memory free"),
    "port": (lambda f: f["links"][6][0].update(error="refused"), {None}, "rank 6 does not reach rank 0: refused"),
    "port within": (lambda f: f["links"][0][0].update(error="refused"), {"n1"}, "rank 0 does not reach rank 1"),
    "network": (lambda f: cut(f, {"n3"}), {"n3"}, "connections with other nodes fail"),
    "network of rank 0": (lambda f: cut(f, {"n1"}), {"n1"}, "connections with other nodes fail"),
    "clock": (lambda f: [each.update(offset=-61.0) for each in f["links"][4]], {"n3"}, "-61.0 s from the median"),
    "clock of rank 0": (
        lambda f: [each.update(offset=-61.0) for partners in f["links"] for each in partners],
        {"n1"},
        "rank 0: its clock is +61.0 s",
    ),
    "room": (lambda f: f["disk"][2]["/tmp"].update(free_bytes=5e8), {"n2"}, "0.5 GB free, of 1 required"),
    "disk": (lambda f: f["disk"][6]["/tmp"].update(bytes_per_second=1e8), {"n4"}, "0.1 GB/s written to /tmp"),
    "broken disk": (lambda f: f["disk"].__setitem__(2, {"error": "Read-only"}), {"n2"}, "rank 2, disk: Read-only"),
    "slow device": (lambda f: f["gemm"][7].update(flops=5e14), {"n4"}, "rank 7: 500 TFLOP/s, the median is 900"),
    "wrong product": (lambda f: f["gemm"][1].update(wrong=1, checksum=8), {"n1"}, "1 rows of a matrix product are wr"),
    "other bits": (lambda f: f["gemm"][1].update(checksum=8), {"n1"}, "not bit-equal to that of others"),
    "versions, two and two": (
        lambda f: [each["versions"].update(torch="2.11") for each in f["ranks"][:4]],
        {None},
        "rank 4 on n3: torch 2.13, others have 2.11; which node is at fault cannot be told",
    ),
    "bits, two and two": (
        lambda f: [each.update(checksum=8) for each in f["gemm"][4:]],
        {None},
        "which node is at fault cannot be told",
    ),
    "clocks, two and two": (
        lambda f: [each.update(offset=3.0) for partners in f["links"][4:] for each in partners],
        {None},
        "rank 4 on n3: its clock is +1.5 s from the median; which node is at fault cannot be told",
    ),
    "on the CPU": (
        lambda f: [each.update(device="cpu", versions={"torch": "2.13", "NCCL": None}) for each in f["ranks"][2:6]],
        {"n2", "n3"},
        "rank 2 is on the CPU, others on CUDA",
    ),
    "no device": (
        lambda f: f["ranks"][2].update(device="", versions={}, mistakes=["n2 has 0 CUDA devices for 2 ranks"]),
        {"n2"},
        "n2 has 0 CUDA devices for 2 ranks",
    ),
    "slow link": (lambda f: slow_pairs(f, 4, "between nodes", "bytes_per_second", 0.5), {"n3"}, "rank 4: 0.5 GB/s"),
    "slow link within": (lambda f: slow_pairs(f, 4, "node", "bytes_per_second", 0.5), {"n3"}, "(node)"),
    "late link": (lambda f: slow_pairs(f, 4, "between nodes", "seconds", 9), {"n3"}, "45 us for 8 bytes"),
    "changed message": (lambda f: f["pairs"][2][0].update(wrong=3), {"n2"}, "to rank 2 changed, in 3"),
    "wrong sum": (lambda f: f["all-reduce"][0]["world"].update(wrong=3), {None}, "all-reduce (world): 3 elements"),
    "silent": (lambda f: f["gemm"].__setitem__(5, None), {"n3"}, "rank 5 does not answer (gemm)"),
    "absent": (lambda f: f["ranks"].__setitem__(5, None), {"n3"}, "1 of its 2 ranks do not answer"),
    "silent among pairs": (lambda f: f["pairs"].__setitem__(5, None), {"n3"}, "rank 5 does not answer (pairs)"),
    "no group": (lambda f: f["join"].__setitem__(5, {"error": "timeout"}), {None}, "rank 5, join: timeout"),
}


def test_nothing_stands_out_on_healthy_nodes() -> None:
    assert find_problems(tool, healthy()) == []


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_named_with_its_node_and_no_other(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    plant, nodes, words = FAULTS[name]
    found = copy.deepcopy(healthy())
    plant(found)
    problems = find_problems(tool, found)
    assert {problem.node for problem in problems} == nodes
    assert any(words in problem.what for problem in problems), problems
    tool.show(found, problems)
    said = capsys.readouterr().out
    assert all(f"BAD  {problem.node or 'somewhere'}: {problem.what}\n" in said for problem in problems)
    assert said.startswith("rank  node") and f"\n7     {NODES[7]}  " in said


@pytest.mark.parametrize("expected", [{}, dict.fromkeys(["login", "n1"], 4)])
def test_an_absent_rank_is_named_where_its_node_is_not_known(expected: dict[str, int]) -> None:
    found = {"ranks": [*healthy()["ranks"][:6], None, None]}
    assert find_problems(tool, found, expected) == [tool.Problem(None, "rank 6, 7 does not answer")]


def test_two_nodes_are_not_each_others_judges() -> None:
    """But for a rank that disagrees with those beside it; and the slower of two is the slower one."""
    two = {stage: values[:4] for stage, values in healthy().items() if stage in ("ranks", "gemm")}
    odd = copy.deepcopy(two)
    odd["gemm"][1]["checksum"] = 8
    assert [problem.node for problem in find_problems(tool, odd)] == ["n1"]
    odd["gemm"][0]["checksum"] = 8
    assert {problem.node for problem in find_problems(tool, odd)} == {None}
    one_more = {stage: values[:3] for stage, values in odd.items()}  # two ranks against one are one node against one
    assert {problem.node for problem in find_problems(tool, one_more)} == {None}
    for share, named in ((0.61, set()), (0.59, {"n1"})):  # the documented 40 % at --slack 0.25
        slow = copy.deepcopy(two)
        for each in slow["gemm"][:2]:
            each["flops"] *= share
        assert {problem.node for problem in find_problems(tool, slow)} == named
