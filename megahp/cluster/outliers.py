"""What stands out among the findings of `megahp check-cluster`, and which node's fault it is."""

import math
import statistics
from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

MOST_APART = 1.0  # seconds, of clocks
DISK_SHARE = 0.25  # of the median rate, at least
LATENCY = 5.0  # times the median's
COLLECTIVE = ("join", "pairs", "all-reduce")  # stages that go on for all ranks or for none


Findings = Mapping[str, Sequence[Any]]  # stage -> what every rank found
Nodes = Sequence[str | None]  # of every rank; None of one that has not come


@dataclass(frozen=True)
class Problem:
    """Something that is not as it should be; the node it is the fault of, unless that cannot be told."""

    node: str | None
    what: str


def find_problems(found: Findings, slack: float, free_gb: float, expected: Mapping[str, int]) -> list[Problem]:
    """What stands out. The findings are those of `look`; expected are Slurm's nodes and how many ranks each has."""
    nodes = [rank and rank["node"] for rank in found["ranks"]]
    ranks, links, products = (answers(found, stage) for stage in ("ranks", "links", "gemm"))
    free = {rank: each["free_bytes"] for rank, each in answers(found, "memory").items()}
    return [
        *absent(nodes, expected),
        *silent(nodes, found),
        *dict.fromkeys(Problem(nodes[rank], what) for rank, each in ranks.items() for what in each["mistakes"]),
        *odd_devices(nodes, ranks),
        *bad_links(nodes, links),
        *bad_clocks(nodes, links),
        *bad_disks(nodes, answers(found, "disk"), free_gb),
        *low(nodes, free, 1 - slack, 1e9, "GB of memory free"),
        *low(nodes, {rank: each["flops"] for rank, each in products.items()}, 1 - slack, 1e12, "TFLOP/s"),
        *wrong_products(nodes, products),
        *bad_pairs(nodes, answers(found, "pairs"), slack),
        *wrong_sums(answers(found, "all-reduce")),
    ]


def absent(nodes: Nodes, expected: Mapping[str, int]) -> Iterator[Problem]:
    """Nodes of Slurm's from which fewer ranks have come than it has started there; else ranks that have not come."""
    missing, here = [str(rank) for rank, node in enumerate(nodes) if node is None], Counter(nodes)
    if missing and {*filter(None, nodes)} <= expected.keys():
        for node, ranks in expected.items():
            if here[node] < ranks:
                yield Problem(node, f"{ranks - here[node]} of its {ranks} ranks do not answer")
    elif missing:
        yield Problem(None, f"rank {', '.join(missing)} does not answer")


def silent(nodes: Nodes, found: Findings) -> Iterator[Problem]:
    """Ranks that came, and then fell silent or failed."""
    for stage, values in found.items():
        for rank, value in enumerate(values):
            if value is None and nodes[rank]:
                yield Problem(nodes[rank], f"rank {rank} does not answer ({stage})")
            elif value and "error" in value:
                yield Problem(None if stage in COLLECTIVE else nodes[rank], f"rank {rank}, {stage}: {value['error']}")


def odd_devices(nodes: Nodes, ranks: Mapping[int, Mapping[str, Any]]) -> Iterator[Problem]:
    """Ranks that have no CUDA device where others have; where there are none such, those with odd versions."""
    on_the_cpu = [rank for rank, each in ranks.items() if each["device"] == "cpu"]
    if on_the_cpu and "cuda" in {each["device"] for each in ranks.values()}:
        for rank in on_the_cpu:
            yield Problem(nodes[rank], f"rank {rank} is on the CPU, others on CUDA")
        return
    for name in dict.fromkeys(name for each in ranks.values() for name in each["versions"]):
        there = {rank: each["versions"][name] for rank, each in ranks.items() if name in each["versions"]}
        yield from odd(nodes, there, f"{name} {{}}, others have {{}}")


def answers(found: Findings, stage: str) -> dict[int, Any]:
    """What the ranks found that did."""
    return {rank: each for rank, each in enumerate(found.get(stage, ())) if each and "error" not in each}


def low(nodes: Nodes, values: Mapping[int, float], share: float, unit: float, of: str) -> Iterator[Problem]:
    """Ranks whose value is less than this share of the median."""
    median = statistics.median(values.values()) if values else 0.0
    for rank, value in values.items():
        if value < share * median:
            yield Problem(nodes[rank], f"rank {rank}: {value / unit:.3g} {of}, the median is {median / unit:.3g}")


def odd(nodes: Nodes, values: Mapping[int, Any], what: str) -> Iterator[Problem]:
    """Ranks whose value is not that of most."""
    usual = Counter(values.values()).most_common(1)[0][0] if values else None
    others = {rank: what.format(value, usual) for rank, value in values.items() if value != usual}
    yield from outvoted(nodes, values, others)


def outvoted(nodes: Nodes, asked: Collection[int], odd: Mapping[int, str]) -> Iterator[Problem]:
    """The odd ones of the ranks that were asked; nobody's fault unless more than half of the nodes have a rank that is
    not odd."""
    view = {nodes[rank] for rank in asked if rank not in odd}
    told = len(view) > len({nodes[rank] for rank in asked}) / 2
    for rank, what in odd.items():
        if told:
            yield Problem(nodes[rank], f"rank {rank}: {what}")
        else:
            yield Problem(None, f"rank {rank} on {nodes[rank]}: {what}; which node is at fault cannot be told")


def bad_links(nodes: Nodes, links: Mapping[int, Sequence[Mapping[str, Any]]]) -> Iterator[Problem]:
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
    most = {node: count for node, count in failed.items() if count > total[node] / 2}
    for node, count in most.items():
        yield Problem(node, f"{count} of {total[node]} connections with other nodes fail, such as: {errors[node][0]}")
    if failed and not most:
        yield Problem(None, next(iter(errors.values()))[0])


def bad_clocks(nodes: Nodes, links: Mapping[int, Sequence[Mapping[str, Any]]]) -> Iterator[Problem]:
    offsets = clock_offsets(links)
    median = statistics.median(offsets.values())
    apart = {rank: offset - median for rank, offset in offsets.items() if abs(offset - median) > MOST_APART}
    said = {rank: f"its clock is {seconds:+.1f} s from the median" for rank, seconds in apart.items()}
    yield from outvoted(nodes, offsets, said)


def clock_offsets(links: Mapping[int, Sequence[Mapping[str, Any]]]) -> dict[int, float]:
    """Of the clocks of ranks that reach rank 0, from rank 0's."""
    to_first = {rank: each for rank, partners in links.items() for each in partners if each["rank"] == 0}
    return {0: 0.0} | {rank: each["offset"] for rank, each in to_first.items() if "offset" in each}


def bad_disks(nodes: Nodes, disks: Mapping[int, Mapping[str, Any]], free_gb: float) -> Iterator[Problem]:
    for place in dict.fromkeys(place for each in disks.values() for place in each):
        there = {rank: each[place] for rank, each in disks.items() if place in each}
        for rank, each in there.items():
            if each["free_bytes"] < free_gb * 1e9:
                yield Problem(nodes[rank], f"{place}: {each['free_bytes'] / 1e9:.1f} GB free, of {free_gb:g} wanted")
        rates = {rank: each["bytes_per_second"] for rank, each in there.items()}
        yield from low(nodes, rates, DISK_SHARE, 1e9, f"GB/s written to {place}")


def wrong_products(nodes: Nodes, products: Mapping[int, Mapping[str, Any]]) -> Iterator[Problem]:
    for rank, each in products.items():
        if each["wrong"]:
            yield Problem(nodes[rank], f"rank {rank}: {each['wrong']} rows of a matrix product are wrong")
    right = {rank: each["checksum"] for rank, each in products.items() if not each["wrong"]}
    yield from odd(nodes, right, "a matrix product is not, bit for bit, that of others")


def bad_pairs(nodes: Nodes, found: Mapping[int, Sequence[Mapping[str, Any]]], slack: float) -> Iterator[Problem]:
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
                what = f"what rank {pair['with']} sent rank {rank} arrived changed, in {pair['wrong']} elements"
                yield Problem(nodes[rank], what)
                yield Problem(nodes[pair["with"]], what)


def best_pairs(found: Mapping[int, Sequence[Mapping[str, Any]]]) -> dict[str, dict[int, tuple[float, float]]]:
    """By kind and rank: bytes a second of its fastest pair, and seconds of its quickest."""
    best: dict[str, dict[int, tuple[float, float]]] = defaultdict(dict)
    for rank, each in found.items():
        for pair in each:
            rate, seconds = best[pair["kind"]].get(rank, (0.0, math.inf))
            best[pair["kind"]][rank] = max(rate, pair["bytes_per_second"]), min(seconds, pair["seconds"])
    return best


def wrong_sums(found: Mapping[int, Mapping[str, Any]]) -> Iterator[Problem]:
    for kind, each in found.get(0, {}).items():
        if each["wrong"]:
            yield Problem(None, f"all-reduce ({kind}): {each['wrong']} elements are wrong")


def excluded(before: Collection[str], found: Findings, problems: Sequence[Problem]) -> list[str]:
    """The nodes to be left out: the bad ones, and those of before that have not proved fit since, as they do where all
    was measured and what is wrong is known."""
    proved = "gemm" in found and all(problem.node for problem in problems)
    fit = {rank["node"] for rank in found["ranks"]} if proved else set()
    return sorted({*before} - fit | {problem.node for problem in problems if problem.node})
