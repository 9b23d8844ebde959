"""Runs of a batch plan, step by step."""

from __future__ import annotations

from collections.abc import Sequence

from megahp.config import Config, with_values
from megahp.scaling.batch import BatchScheduler, Change, Progress

SAVED = {"batch": 12, "length": 16, "since": None, "least": None, "began": 0}
NOISE = {
    "batch__policy": "noise-scale",
    "batch__target": 0.5,
    "batch__noise_to_total": 1.0,
    "batch__look_every": 1,
    "batch__delay": 0.05,
    "batch__largest": 64,
    "train__noise_half_life": 0.02,
}
TOKENS = 16 * 4 * 1000  # 1,000 steps of the first batch; a half-life is 20 of them


def config(global_batch: int, micro_batch: int = 2, tokens: int = 16 * 240, **more: object) -> Config:
    values = {
        "data.sequence_length": 16,
        "batch.global_batch": global_batch,
        "batch.micro_batch": micro_batch,
        "train.tokens": tokens,
    }
    return with_values(Config(), values | {key.replace("__", "."): value for key, value in more.items()})


def run(plan: BatchScheduler, noise: Sequence[float | None] = (None,)) -> list[tuple[Progress, int, Change | None]]:
    """(progress before a step, its batch, the change after it) for every step. The noise scales are spread evenly over
    the run's tokens."""
    progress, seen = Progress(), []
    while step := plan.step(progress):
        before, progress = progress, progress.after(step)
        seen.append((before, step.global_batch, plan.update(progress, at(noise, progress, plan))))
    return seen


def at(noise: Sequence[float | None], progress: Progress, plan: BatchScheduler) -> float | None:
    return noise[(progress.tokens - 1) * len(noise) // plan.config.train.tokens]
