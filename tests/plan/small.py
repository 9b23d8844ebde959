"""A small run, and H100s with as much memory as a test wants."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from megahp.config import Config, resolve
from megahp.plan.machine import Machine, load_machine

GPUS = 8
RUN: dict[str, Any] = {
    "model": {"preset": "llama-3-8b", "layers": 6},
    "data": {"train": ["none"], "sequence_length": 4096},
    "batch": {"global_batch": 64, "micro_batch": 1},
    "train": {"tokens": 1e9, "dtype": "bfloat16"},
    "parallel": {"pp": 2, "tp": 4},  # of another cluster: to be replaced
}


def with_settings(run: dict[str, Any], settings: dict[str, Any]) -> Config:
    """A run with settings, section.key -> value."""
    tree = {section: dict(values) for section, values in run.items()}
    for key, value in settings.items():
        section, name = key.split(".")
        tree.setdefault(section, {})[name] = value
    return resolve.resolve([("test", tree)], written=True).config


def config(**sections: dict[str, Any]) -> Config:
    tree = {section: {**values, **sections.get(section, {})} for section, values in RUN.items()}
    return resolve.resolve([("test", tree)], written=True).config


def machine(gib: float) -> Machine:
    """An H100 of which this much can be used."""
    return replace(load_machine("h100"), memory=(gib * 2**30 + 2e9) / 0.97)
