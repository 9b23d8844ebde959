"""A cluster file from measurements on the cluster itself (megahp check-cluster, megahp benchmark communication)."""

from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

from megahp.plan.guard import machine_here, name_of
from megahp.plan.machine import Best, Machine, Peak

KINDS = {"node": "node", "between nodes": "network"}  # of groups, and the links that they measure


def measured_machine(
    device: str, memory: int, gpus_per_node: int, rates: Mapping[str, Any], links: Mapping[str, float]
) -> Machine:
    """Return the machine of these measurements. Of a device that megahp knows the peaks are its data sheet's; one of
    another reaches what was measured, whole. links: as `measured_links` returns them; others stay the known device's.

    rates: of megahp.benchmark.rates.device_rates.
    """
    known = machine_here(device, memory)
    products = rates["products"]
    if name_of(device):
        peak = known.peak
        best = replace(known.best, products=min(1.0, products["bfloat16"] / peak.bfloat16))
    else:
        peak, best = Peak(**products, float8=0.0), Best(1.0, known.best.attention)
    return replace(
        known,
        peak=peak,
        best=best,
        links=replace(known.links, **links),
        efficiency=replace(known.efficiency, memory=1.0, **{key: 1.0 for key in reached(links)}),
        memory_bandwidth=rates["memory"],
        gpus_per_node=gpus_per_node,
        units=rates["units"],
        launch=rates["launch"],
    )


def measured_links(bandwidth: Mapping[str, float], latency: Mapping[str, float]) -> dict[str, float]:
    """Return what is measured of Links. bandwidth: of a kind of groups, one of KINDS, the bus bandwidth of its
    all-reduce, bytes a second; latency: the seconds of a small message."""
    found = {f"{KINDS[kind]}_bandwidth": rate for kind, rate in bandwidth.items() if kind in KINDS}
    return found | {f"{KINDS[kind]}_latency": seconds for kind, seconds in latency.items() if kind in KINDS}


def reached(links: Mapping[str, float]) -> list[str]:
    """Return the links whose bandwidth was measured: by a collective, so that all of it is reached."""
    return [kind for kind in KINDS.values() if f"{kind}_bandwidth" in links]


def machine_toml(machine: Machine, known: Machine) -> str:
    """Return a machine as a cluster file, which says of every number whether it is the known one's or measured."""
    tree, other = asdict(machine), asdict(known)
    name = tree.pop("name")
    sections = {key: value for key, value in tree.items() if isinstance(value, dict)}
    lines = [f"# {name}, by megahp check-cluster. What is not measured is of the nearest machine that megahp knows."]
    for section, values in {"": {key: tree[key] for key in tree if key not in sections}, **sections}.items():
        lines += ["", f"[{section}]"] if section else []
        before = other[section] if section else other
        for key, value in values.items():
            rounded = float(f"{value:.4g}") if isinstance(value, float) else value
            lines.append(f"{key} = {rounded!r}" + "  # measured" * (value != before[key]))
    return "\n".join([*lines, ""])
