"""What is measured on a cluster becomes a cluster file that a plan reads."""

from __future__ import annotations

from pathlib import Path

import pytest

from megahp.plan.machine import load_machine
from megahp.plan.measured import machine_toml, measured_links, measured_machine

RATES = {
    "products": {"float32": 5e13, "float16": 6e14, "bfloat16": 7e14},
    "memory": 2.9e12,
    "launch": 5e-6,
    "units": 132,
}


@pytest.mark.parametrize(
    ("device", "peak", "best"), [("NVIDIA H100 80GB HBM3", 989e12, 7e14 / 989e12), ("L4", 7e14, 1)]
)
def test_a_file_of_measurements(tmp_path: Path, device: str, peak: float, best: float) -> None:
    links = measured_links({"node": 3e11, "world": 1e9}, {"node": 3e-6, "between nodes": 2e-5})
    machine = measured_machine(device, 85_000_000_000, 4, RATES, links)
    (tmp_path / "mine.toml").write_text(machine_toml(machine, load_machine("h100")))
    read = load_machine(str(tmp_path / "mine.toml"))
    assert (read.peak.bfloat16, read.gpus_per_node, read.memory, read.memory_bandwidth) == (peak, 4, 8.5e10, 2.9e12)
    assert read.best.products == pytest.approx(best, rel=1e-3)
    assert (read.links.node_bandwidth, read.links.node_latency, read.links.network_latency) == (3e11, 3e-6, 2e-5)
    assert read.links.network_bandwidth == load_machine("h100").links.network_bandwidth  # not measured
    assert read.efficiency.node == 1 and read.efficiency.network == load_machine("h100").efficiency.network
