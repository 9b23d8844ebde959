"""A simulated run against Daly's closed form, against a simulation second by second, and on 32,768 GPUs."""

from __future__ import annotations

import math
import random
from typing import Any

import numpy as np
import pytest

from megahp.cluster.growth import Segment
from megahp.config import Config, resolve
from megahp.errors import UserError
from megahp.plan.machine import load_machine
from megahp.plan.simulate import Conditions, Part, lives, simulate, timeline_of

STEP = 10.0  # seconds
RUN: dict[str, Any] = {
    "model": {"preset": "llama-3-8b"},
    "data": {"train": ["none"], "sequence_length": 8192},
    "batch": {"global_batch": 2048, "micro_batch": 1, "policy": "table", "table": ["2e12:4096"]},
    "train": {"tokens": 8e12, "dtype": "bfloat16"},
    "checkpoint": {"every": 100},
}


def passed(steps: int, every: int, mtbf: float, stall: float, write: float, restart: float, trials: int) -> Part:
    """A segment of equal steps on one GPU."""
    timeline = timeline_of(Segment(1, 0, [(steps, 1)]), 1, lambda *_: STEP, every, 0, stall, write)
    return lives(timeline, Conditions(mtbf=mtbf, restart=restart), np.random.default_rng(1), trials)


@pytest.mark.parametrize(("mtbf", "every"), [(3000.0, 20), (30000.0, 50), (2000.0, 100)])
def test_mean_is_dalys(mtbf: float, every: int) -> None:
    """Each interval of work and saving takes M exp(R / M) (exp(L / M) - 1), where restarts fail too (J. T. Daly,
    doi.org/10.1016/j.future.2004.11.016). The first start is one more, and with its failures M (exp(R / M) - 1)."""
    stall, restart, intervals = 30.0, 200.0, 20
    part = passed(intervals * every, every, mtbf, stall, 0.0, restart, 4000)
    interval = every * STEP + stall
    expected = intervals * mtbf * math.exp(restart / mtbf) * math.expm1(interval / mtbf) + mtbf * math.expm1(
        restart / mtbf
    )
    error = part.elapsed.std() / math.sqrt(len(part.elapsed))
    assert part.elapsed.mean() == pytest.approx(expected, abs=4 * error)
    assert error < 0.01 * expected


def second_by_second(steps: int, every: int, mtbf: float, stall: int, write: int, restart: int, seed: int) -> int:
    """The same run by a clock that ticks: each second it may fail; written in the background, a checkpoint counts once
    it is complete."""
    dice, clock, saved, done = random.Random(seed), 0, 0, 0
    waiting, writing = restart, list[tuple[int, int]]()  # (second at which it is complete, steps)
    work = 0  # seconds into the present step
    while True:
        clock += 1
        if dice.random() < 1 / mtbf:
            saved = max([saved, *(count for when, count in writing if when < clock)])
            done, work, waiting, writing = saved, 0, restart, []
            continue
        if waiting:
            waiting -= 1
            if waiting == 0 and done and (not writing or writing[-1][1] < done) and done != saved:
                writing.append((clock + write, done))
        elif done < steps:
            work += 1
            if work == STEP:
                done, work = done + 1, 0
                if done % every == 0 or done == steps:
                    waiting = stall
        if done == steps and not waiting and writing and clock >= writing[-1][0]:
            return clock


def test_mean_is_that_of_a_ticking_clock() -> None:
    """Checkpoints that are written in the background, while the next steps run: an interval of one is lost with it."""
    numbers = (200, 20, 1500.0, 5, 120, 60)
    ticked = [second_by_second(*numbers, seed) for seed in range(300)]
    part = passed(*numbers, 3000)
    assert np.mean(ticked) == pytest.approx(part.elapsed.mean(), abs=4 * np.std(ticked) / math.sqrt(len(ticked)))


def test_a_save_waits_for_the_one_before() -> None:
    """Steps take 200 s from save to save, a checkpoint 500 s, of which training waits 5 s at its beginning."""
    timeline = timeline_of(Segment(1, 0, [(50, 1)]), 1, lambda *_: STEP, 20, 10, 5.0, 500.0)
    assert timeline.saves.tolist() == [0, 105, 610, 1115]  # after steps 20, 40 and 60 of the run
    assert timeline.complete.tolist() == [0, 605, 1110, 1615] and timeline.end == 1615


def config(**more: dict[str, Any]) -> Config:
    tree = {section: {**values, **more.get(section, {})} for section, values in RUN.items()}
    return resolve.resolve([("test", tree)], written=True).config


def test_a_run_that_grows() -> None:
    """Nodes double as the batch does; shares add up; fewer failures leave more goodput."""
    machine, often = load_machine("h100"), Conditions()
    found = simulate(config(), 1024, 2048, machine, often)
    assert [part.timeline.gpus for part in found.parts] == [1024, 2048]
    assert sum(part.timeline.segment.steps for part in found.parts) == pytest.approx(
        2e12 / 2**24 + 6e12 / 2**25, rel=1e-3
    )
    assert sum(found.shares.values()) == pytest.approx(1) and min(found.shares.values()) > 0
    expected = sum(part.elapsed.mean() * part.timeline.gpus for part in found.parts) / often.mtbf
    assert sum(part.failures.mean() for part in found.parts) == pytest.approx(expected, rel=0.1)
    seldom = simulate(config(), 1024, 2048, machine, Conditions(mtbf=10 * often.mtbf))
    assert found.shares["goodput"] < seldom.shares["goodput"] < 1
    fixed = simulate(config(), 1024, 1024, machine, often)
    assert fixed.elapsed.mean() > found.elapsed.mean() and fixed.gpu_seconds == pytest.approx(
        found.gpu_seconds, rel=0.1
    )


def test_checkpoints_too_far_apart() -> None:
    with pytest.raises(UserError, match="the run never ends; lower checkpoint.every"):
        simulate(config(checkpoint={"every": 0}), 1024, 1024, load_machine("h100"), Conditions(mtbf=1e7))
