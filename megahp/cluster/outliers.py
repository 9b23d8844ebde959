"""Find outliers in the measurements of `megahp check-cluster`, and the node at fault."""

import math
import statistics
from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

MAX_CLOCK_OFFSET = 1.0  # seconds from the median
MIN_DISK_RATE = 0.25  # of the median rate
MAX_LATENCY = 5.0  # times the median
COLLECTIVE = ("join", "pairs", "all-reduce")  # stages in which one rank's failure fails others

Findings = Mapping[str, Sequence[Any]]  # stage -> what every rank found
Nodes = Sequence[str | None]  # of every rank; None if it never answered


@dataclass(frozen=True)
class Problem:
    """Something wrong, and the node at fault; None if that is unknown."""

    node: str | None
    what: str


def find_problems(found: Findings, slack: float, free_gb: float, expected: Mapping[str, int]) -> list[Problem]:
    """Return all problems.

    found: the findings of `look` in the command. slack: how far below the median a rank's speed or memory may be, as a
    share. free_gb: required disk space. expected: Slurm's nodes, and the number of ranks on each.
    """
    nodes = [rank and rank["node"] for rank in found["ranks"]]
    ranks, links, products = (answers(found, stage) for stage in ("ranks", "links", "gemm"))
    free = {rank: memory["free_bytes"] for rank, memory in answers(found, "memory").items()}
    flops = {rank: product["flops"] for rank, product in products.items()}
    return [
        *_silent(nodes, found, expected),
        *dict.fromkeys(Problem(nodes[rank], what) for rank, facts in ranks.items() for what in facts["mistakes"]),
        *_odd_devices(nodes, ranks),
        *_bad_links(nodes, links),
        *_bad_clocks(nodes, links),
        *_bad_disks(nodes, answers(found, "disk"), free_gb),
        *_low(nodes, free, 1 - slack, 1e9, "GB of memory free"),
        *_low(nodes, flops, 1 - slack, 1e12, "TFLOP/s"),
        *_wrong_products(nodes, products),
        *_bad_pairs(nodes, answers(found, "pairs"), slack),
        *(
            Problem(None, f"all-reduce ({kind}): {result['wrong']} elements are wrong")
            for kind, result in answers(found, "all-reduce").get(0, {}).items()
            if result["wrong"]
        ),
    ]


def answers(found: Findings, stage: str) -> dict[int, Any]:
    """Return the findings of the ranks that answered in a stage without an error."""
    return {rank: answer for rank, answer in enumerate(found.get(stage, ())) if answer and "error" not in answer}


def excluded(before: Collection[str], found: Findings, problems: Sequence[Problem]) -> list[str]:
    """Return the nodes to exclude: the bad ones, and those excluded before that did not prove fit since.

    They prove fit if everything was measured and every problem has a known node.
    """
    proved = "gemm" in found and all(problem.node for problem in problems)
    fit = {rank["node"] for rank in found["ranks"]} if proved else set()
    return sorted({*before} - fit | {problem.node for problem in problems if problem.node})


def clock_offsets(links: Mapping[int, Sequence[Mapping[str, Any]]]) -> dict[int, float]:
    """Return the clock offsets, from rank 0's, of ranks that reach rank 0, in seconds."""
    to_rank0 = {rank: link for rank, partners in links.items() for link in partners if link["rank"] == 0}
    return {0: 0.0} | {rank: link["offset"] for rank, link in to_rank0.items() if "offset" in link}


def best_pairs(found: Mapping[int, Sequence[Mapping[str, Any]]]) -> dict[str, dict[int, tuple[float, float]]]:
    """Return, by kind of pair and rank, the bytes per second of its fastest pair, and the lowest latency in seconds.

    The best counts, since a slow neighbour slows down all of its pairs.
    """
    best: dict[str, dict[int, tuple[float, float]]] = defaultdict(dict)
    for rank, pairs in found.items():
        for pair in pairs:
            rate, seconds = best[pair["kind"]].get(rank, (0.0, math.inf))
            best[pair["kind"]][rank] = max(rate, pair["bytes_per_second"]), min(seconds, pair["seconds"])
    return best


def _silent(nodes: Nodes, found: Findings, expected: Mapping[str, int]) -> Iterator[Problem]:
    """Yield ranks that never answered, by Slurm's nodes if these are known, and ranks that fell silent or failed."""
    missing, present = [str(rank) for rank, node in enumerate(nodes) if node is None], Counter(nodes)
    if missing and {*filter(None, nodes)} <= expected.keys():
        for node, ranks in expected.items():
            if present[node] < ranks:
                yield Problem(node, f"{ranks - present[node]} of its {ranks} ranks do not answer")
    elif missing:
        yield Problem(None, f"rank {', '.join(missing)} does not answer")
    for stage, values in found.items():
        for rank, value in enumerate(values):
            if value is None and nodes[rank]:
                yield Problem(nodes[rank], f"rank {rank} does not answer ({stage})")
            elif value and "error" in value:
                yield Problem(None if stage in COLLECTIVE else nodes[rank], f"rank {rank}, {stage}: {value['error']}")


def _odd_devices(nodes: Nodes, ranks: Mapping[int, Mapping[str, Any]]) -> Iterator[Problem]:
    """Yield ranks without a CUDA device if others have one; otherwise those with odd versions."""
    on_cpu = [rank for rank, facts in ranks.items() if facts["device"] == "cpu"]
    if on_cpu and any(facts["device"] == "cuda" for facts in ranks.values()):
        for rank in on_cpu:
            yield Problem(nodes[rank], f"rank {rank} is on the CPU, others on CUDA")
        return
    for name in dict.fromkeys(name for facts in ranks.values() for name in facts["versions"]):
        versions = {rank: facts["versions"][name] for rank, facts in ranks.items() if name in facts["versions"]}
        yield from _odd(nodes, versions, f"{name} {{}}, others have {{}}")


def _low(nodes: Nodes, values: Mapping[int, float], share: float, unit: float, of: str) -> Iterator[Problem]:
    """Yield ranks whose value is below this share of the median."""
    median = statistics.median(values.values()) if values else 0.0
    for rank, value in values.items():
        if value < share * median:
            yield Problem(nodes[rank], f"rank {rank}: {value / unit:.3g} {of}, the median is {median / unit:.3g}")


def _odd(nodes: Nodes, values: Mapping[int, Any], what: str) -> Iterator[Problem]:
    """Yield ranks whose value differs from the most common one. what: a format of (value, common value)."""
    common = Counter(values.values()).most_common(1)[0][0] if values else None
    odd = {rank: what.format(value, common) for rank, value in values.items() if value != common}
    yield from _outvoted(nodes, values, odd)


def _outvoted(nodes: Nodes, asked: Collection[int], odd: Mapping[int, str]) -> Iterator[Problem]:
    """Yield the odd ones of the ranks asked; the node at fault is known only if a majority of nodes has a normal rank.

    Nodes vote, not ranks: the ranks of one node share its faults.
    """
    normal = {nodes[rank] for rank in asked if rank not in odd}
    majority = len(normal) > len({nodes[rank] for rank in asked}) / 2
    for rank, what in odd.items():
        if majority:
            yield Problem(nodes[rank], f"rank {rank}: {what}")
        else:
            yield Problem(None, f"rank {rank} on {nodes[rank]}: {what}; which node is at fault cannot be told")


def _bad_links(nodes: Nodes, links: Mapping[int, Sequence[Mapping[str, Any]]]) -> Iterator[Problem]:
    """Yield nodes most of whose connections with others fail, in either direction, or any connection within them."""
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
    most = {node: count for node, count in failed.items() if count > total[node] / 2}
    for node, count in most.items():
        yield Problem(node, f"{count} of {total[node]} connections with other nodes fail, such as: {errors[node][0]}")
    if failed and not most:
        yield Problem(None, next(iter(errors.values()))[0])


def _bad_clocks(nodes: Nodes, links: Mapping[int, Sequence[Mapping[str, Any]]]) -> Iterator[Problem]:
    """Yield ranks whose clock is far from the median."""
    offsets = clock_offsets(links)
    median = statistics.median(offsets.values())
    apart = {rank: offset - median for rank, offset in offsets.items() if abs(offset - median) > MAX_CLOCK_OFFSET}
    odd = {rank: f"its clock is {seconds:+.1f} s from the median" for rank, seconds in apart.items()}
    yield from _outvoted(nodes, offsets, odd)


def _bad_disks(nodes: Nodes, disks: Mapping[int, Mapping[str, Any]], free_gb: float) -> Iterator[Problem]:
    """Yield ranks with a full or slow disk, for each folder that was measured."""
    for folder in dict.fromkeys(folder for folders in disks.values() for folder in folders):
        measured = {rank: folders[folder] for rank, folders in disks.items() if folder in folders}
        for rank, disk in measured.items():
            if disk["free_bytes"] < free_gb * 1e9:
                what = f"{folder}: {disk['free_bytes'] / 1e9:.1f} GB free, of {free_gb:g} required"
                yield Problem(nodes[rank], what)
        rates = {rank: disk["bytes_per_second"] for rank, disk in measured.items()}
        yield from _low(nodes, rates, MIN_DISK_RATE, 1e9, f"GB/s written to {folder}")


def _wrong_products(nodes: Nodes, products: Mapping[int, Mapping[str, Any]]) -> Iterator[Problem]:
    """Yield ranks whose matrix product is wrong, or right within tolerance but not bit-equal to the others'."""
    for rank, product in products.items():
        if product["wrong"]:
            yield Problem(nodes[rank], f"rank {rank}: {product['wrong']} rows of a matrix product are wrong")
    checksums = {rank: product["checksum"] for rank, product in products.items() if not product["wrong"]}
    yield from _odd(nodes, checksums, "a matrix product is not bit-equal to that of others")


def _bad_pairs(nodes: Nodes, found: Mapping[int, Sequence[Mapping[str, Any]]], slack: float) -> Iterator[Problem]:
    """Yield ranks with a low bandwidth or high latency, and both nodes of a pair that changed a message."""
    for kind, best in best_pairs(found).items():
        rates = {rank: rate for rank, (rate, _) in best.items()}
        yield from _low(nodes, rates, 1 - slack, 1e9, f"GB/s at best with a neighbour ({kind})")
        median = statistics.median(seconds for _, seconds in best.values())
        for rank, (_, seconds) in best.items():
            if seconds > MAX_LATENCY * median:
                what = f"{1e6 * seconds:.0f} us for 8 bytes ({kind}), the median is {1e6 * median:.0f}"
                yield Problem(nodes[rank], f"rank {rank}: {what}")
    for rank, pairs in found.items():
        for pair in pairs:
            if pair["wrong"]:
                what = f"a message from rank {pair['with']} to rank {rank} changed, in {pair['wrong']} elements"
                yield Problem(nodes[rank], what)
                yield Problem(nodes[pair["with"]], what)
