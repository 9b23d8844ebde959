"""What one rank does in an optimizer step: kernels, collectives and memory, whether they are traced (trace.py) or
counted by formulas (formulas.py). Imports no torch."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any, Literal

from megahp.config import AUTO, Config, phases_of, with_values
from megahp.errors import UserError
from megahp.scaling.batch import BatchScheduler, Progress, StepPlan, largest_micro_batch

Phase = Literal["build", "forward", "backward", "update"]


@dataclass(frozen=True)
class Kernel:
    """One kernel call.

    shape: (batch, m, n, k) of a product, (batch, heads, queries, keys, head size) of attention, else (). flops count a
    multiply-add as two; bytes are those of all tensors read, and of all written. dtype: torch's name, "bfloat16".
    """

    name: str
    kind: Literal["product", "attention", "memory"]
    shape: tuple[int, ...]
    dtype: str
    flops: int
    bytes: int
    phase: Phase


@dataclass(frozen=True)
class Collective:
    """One collective call: bytes are those of the larger of its two buffers on this rank."""

    name: str
    axes: str  # of the mesh, joined by "_"; "world" for all ranks
    size: int  # ranks of the group
    bytes: int
    phase: Phase


@dataclass(frozen=True)
class Work:
    """What one step of one rank computes, sends and allocates."""

    kernels: Counter[Kernel]
    collectives: Counter[Collective]
    peak: Counter[str]  # bytes of each kind when most are allocated: weights, moments, gradients, gathered, ...
    resident: int  # bytes between steps

    @property
    def bytes(self) -> int:
        """Bytes that are allocated at the peak."""
        return sum(self.peak.values())

    def flops(self, *kinds: str) -> int:
        return sum(kernel.flops * count for kernel, count in self.kernels.items() if kernel.kind in kinds)

    def extrapolate(self, other: Work, steps: int) -> Work:
        """Return the work that follows `other` after this many more of the steps that lead from this one to it."""

        def along(before: Counter[Any], after: Counter[Any]) -> Counter[Any]:
            return Counter({key: after[key] + steps * (after[key] - before[key]) for key in {**before, **after}})

        return Work(
            along(self.kernels, other.kernels),
            along(self.collectives, other.collectives),
            along(self.peak, other.peak),
            other.resident + steps * (other.resident - self.resident),
        )

    def with_update_of(self, other: Work) -> Work:
        """Return this work with the optimizer's kernels, collectives and moments of another."""

        def merged(own: Counter[Any], others: Counter[Any]) -> Counter[Any]:
            kept = {key: count for key, count in own.items() if key.phase != "update"}
            return Counter(kept | {key: count for key, count in others.items() if key.phase == "update"})

        moments = other.peak["moments"]
        return Work(
            merged(self.kernels, other.kernels),
            merged(self.collectives, other.collectives),
            Counter({**self.peak, "moments": moments}),
            self.resident + moments - self.peak["moments"],
        )


def on_gpus(config: Config) -> Config:
    """Return the config with the train.dtype that "auto" is on the GPUs that are planned for."""
    return with_values(config, {"train.dtype": "bfloat16"}) if config.train.dtype == AUTO else config


def first_step(config: Config, dp: int) -> StepPlan:
    """Return the plan of the first step, of one sequence a microbatch where the run's start will decide on more, as
    memory allows. Raises UserError where train.tokens have no room for a step."""
    if config.batch.micro_batch == AUTO and not config.batch.largest_micro_batch:
        config = with_values(config, {"batch.largest_micro_batch": 1})
    plan = BatchScheduler(config, dp).step(Progress())
    if plan is None:
        raise UserError(f"train.tokens = {config.train.tokens} leaves no step to plan; raise it")
    return plan


def at_each_length(config: Config) -> list[Config]:
    """Return the run as if it began with each of its sequence lengths, its own first: a step keeps its tokens, and a
    microbatch has as many at most, or one sequence.

    Any of them may allocate most: longer sequences take more in a microbatch of one, shorter ones in several
    microbatches, between which FSDP keeps whole gradients.
    """
    found = [config]
    for length in dict.fromkeys(phase.length for phase in phases_of(config.data)):
        if length != config.data.sequence_length:
            values: dict[str, Any] = {"data.sequence_length": length, "data.lengths": ()}
            values["batch.global_batch"] = config.batch.global_batch * config.data.sequence_length // length
            if config.batch.micro_batch != AUTO:
                values["batch.micro_batch"] = largest_micro_batch(config, length)
            elif config.batch.largest_micro_batch:
                values["batch.largest_micro_batch"] = largest_micro_batch(config, length)
            found.append(with_values(config, values))
    return found
