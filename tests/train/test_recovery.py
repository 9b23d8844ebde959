"""Recovery from bad steps on one rank, in this process, where what is held in memory can be seen."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from corpus import write_corpus
from distributed import runs, world
from faults.test_soak import RUN

from megahp.log.metrics import read_events
from megahp.train import loop, recovery
from megahp.train.trainer import Step

NAN, SPIKE = {"grad_norm": math.nan}, {"loss": 1e6}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("recovery")
    write_corpus(folder / "corpus", 0.02)
    (folder / "run.toml").write_text(RUN)
    return folder


@dataclass
class Faults:
    """Replaces what was measured by what a fault would give: {step: changes of the first pass, of the second ...}; and
    counts the steps whose gradients are still in memory when others are computed or a checkpoint is loaded."""

    planned: Mapping[int, list[dict[str, float]]]
    computed: Callable[..., Step]
    restored: Callable[..., Any]
    steps: list[list[weakref.ref[Any]]] = field(default_factory=list)
    most_held: int = 0

    def count_held(self) -> None:
        self.most_held = max(self.most_held, sum(any(grad() is not None for grad in grads) for grads in self.steps))

    def compute(self, run: Any, loader: Any, plan: Any, told: bool) -> Step:
        self.count_held()
        step = self.computed(run, loader, plan, told)
        self.steps.append([weakref.ref(grad) for grad in step.grads])
        due = self.planned.get(plan.step)
        return replace(step, measured=replace(step.measured, **due.pop(0))) if due else step

    def restore_newest(self, *arguments: Any) -> Any:
        self.count_held()
        return self.restored(*arguments)


def train(folder: Path, name: str, planned: Mapping[int, list[dict[str, float]]], *words: str) -> int:
    """Train 20 steps with these faults. Returns the most steps whose gradients were held beside another's."""
    # only what is planned is a spike: of four steps the scatter is small by chance
    words = (f"log.name={name}", "train.steps=20", "resilience.spike_window=4", "resilience.spike_sigmas=100", *words)
    faults = Faults(planned, loop.compute, recovery.restore_newest)
    with (
        mock.patch.object(loop, "compute", faults.compute),
        mock.patch.object(recovery, "restore_newest", faults.restore_newest),
        mock.patch.object(recovery, "MAX_SKIPPED_IN_A_ROW", 3),
    ):
        runs.as_rank(folder, ["parallel.dp_replicate=1", *words], resume=False)
    return faults.most_held


def events(folder: Path, name: str, *kinds: str) -> list[tuple[str, int]]:
    """What happened, and after which step."""
    return [(each["event"], each["step"]) for each in read_events(folder / "runs" / name) if each["event"] in kinds]


def test_a_retry_holds_one_set_of_gradients(folder: Path) -> None:
    (most_held,) = world.run(1, train, folder, "retry", {3: [NAN, {}]})
    assert events(folder, "retry", "repeated", "skipped") == [("repeated", 2)]
    assert most_held == 0


def test_a_rewind_holds_no_gradients(folder: Path) -> None:
    (most_held,) = world.run(1, train, folder, "rewind", {8: [SPIKE]}, "resilience.spikes=rewind")
    assert events(folder, "rewind", "rewound") == [("rewound", 6)]
    assert most_held == 0


def test_a_step_not_finite_after_a_skipped_spike_is_retried(folder: Path) -> None:
    """The skip of a spike has located no cause. The same for a second step that is not finite after a finite one."""
    planned = {7: [SPIKE], 8: [NAN, {}], 10: [NAN, NAN], 11: [SPIKE], 13: [NAN, {}]}
    world.run(1, train, folder, "skip", planned, "resilience.spikes=skip", "checkpoint.every=0")
    happened = events(folder, "skip", "repeated", "skipped")
    assert happened == [("skipped", 6), ("repeated", 7), ("skipped", 9), ("skipped", 10), ("repeated", 12)]


def test_a_rewind_ends_a_row_of_skipped_steps(folder: Path) -> None:
    """Three in a row would end this run."""
    planned = {8: [NAN, NAN], 9: [NAN], 10: [SPIKE], 7: [{}, NAN, NAN]}
    world.run(1, train, folder, "row", planned, "resilience.spikes=rewind", "checkpoint.every=6")
    happened = events(folder, "row", "rewound", "skipped")
    assert happened == [("skipped", 7), ("skipped", 8), ("rewound", 6), ("skipped", 6)]
