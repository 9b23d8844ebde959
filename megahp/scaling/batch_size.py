"""The batch plan: what one optimizer step does, as a function of the run's progress alone."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from megahp.config import Config
from megahp.scaling import schedules


@dataclass(frozen=True)
class Progress:
    """How far a run is. Only samples and tokens decide what comes next."""

    step: int = 0
    samples: int = 0
    tokens: int = 0

    def after(self, plan: Plan) -> Progress:
        return Progress(self.step + 1, self.samples + plan.global_batch, self.tokens + plan.tokens)


@dataclass(frozen=True)
class Plan:
    """One optimizer step: its samples, how they are divided, and the base hyperparameters it uses."""

    step: int  # 1 for the first
    first_sample: int
    global_batch: int  # sequences
    micro_batch: int  # sequences of one rank's forward pass
    tokens: int  # of the whole global batch
    lr: float
    weight_decay: float
    beta1: float
    beta2: float
    eps: float

    def microbatches(self, dp: int) -> int:
        return self.global_batch // (dp * self.micro_batch)

    def samples(self, dp_rank: int, dp: int) -> list[np.ndarray]:
        """Global sample ids of one data-parallel rank, int64, one array a microbatch."""
        size = self.micro_batch
        first = self.first_sample + dp_rank * size
        return [np.arange(first + m * dp * size, first + m * dp * size + size) for m in range(self.microbatches(dp))]


def runnable(global_batch: int, dp: int, micro_batch: int) -> tuple[int, ...]:
    """The runnable global batches nearest to the wanted one, ascending: one, if it is itself runnable, or two.

    A layout can run multiples of dp x micro_batch sequences.
    """
    unit = dp * micro_batch
    below = global_batch // unit * unit
    if below == global_batch:
        return (global_batch,)
    return (below, below + unit) if below else (unit,)


def plan_step(config: Config, progress: Progress) -> Plan | None:
    """The next optimizer step, or None when the run is over: the horizon has no room for another batch, or
    train.steps are done. The learning rate is the schedule's at the middle of the step's tokens, so that its mean
    over a linear schedule does not depend on the batch."""
    tokens = config.batch.global_batch * config.data.sequence_length
    done = config.train.steps and progress.step >= config.train.steps
    if done or progress.tokens + tokens > config.train.tokens:
        return None
    rate = schedules.fraction(config.schedule, progress.tokens + tokens / 2, config.train.tokens)
    optimizer = config.optimizer
    return Plan(
        step=progress.step + 1,
        first_sample=progress.samples,
        global_batch=config.batch.global_batch,
        micro_batch=config.batch.micro_batch,
        tokens=tokens,
        lr=optimizer.lr * rate,
        weight_decay=optimizer.weight_decay,
        beta1=optimizer.beta1,
        beta2=optimizer.beta2,
        eps=optimizer.eps,
    )
