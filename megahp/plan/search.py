"""Search the layouts that a cluster can train a run with: all of them by formulas, then the fastest by its trace.

The global batch stays, so every layout trains the same model. Of recomputation, which gives memory for time, each
layout gets no more than it needs.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

from megahp.config import AUTO, Config, get_setting, with_values
from megahp.config.checks import find_conflicts
from megahp.config.schema import FIELDS
from megahp.errors import UserError
from megahp.parallel.layout import Layout, fit
from megahp.plan.formulas import rank_works
from megahp.plan.machine import Machine
from megahp.plan.step_time import Estimate, estimate
from megahp.plan.work import at_each_length
from megahp.train.prepare import check_batch

NAMES = ("tp", "sequence_parallel", "cp", "pp", "schedule", "stages_per_rank", "ep", "dp_replicate", "dp_shard", "zero")
KEYS = (*(f"parallel.{name}" for name in (*NAMES, "reduce")), "batch.micro_batch", "compute.recompute")
# with what must not stay of another layout
WRITTEN = (*KEYS, "parallel.split", "parallel.prefetch", "compute.recompute_every", "batch.largest_micro_batch")
RECOMPUTE = ("none", "selective", "full")  # less memory and more time from each to the next
MICRO_BATCHES = (1, 2, 4, 8, 16)
SCHEDULES = (("interleaved", 2), ("interleaved", 4), ("zero-bubble", 1), ("zbv", 2))  # beside 1f1b
# (parallel.zero, parallel.reduce) of shards without a pipeline; with one it is always the first
STATES = ((1, "once"), (2, "once"), (2, "every"), (3, "once"), (3, "every"))
LEAST_TOKENS = 4096  # of a sequence on a context-parallel rank: shorter pieces are not worth cp (assumed)
PIPELINE = {"parallel.schedule", "parallel.stages_per_rank"}
REFINED = 12  # layouts, the fastest by 1f1b, whose pipelines are tried with every schedule


@dataclass(frozen=True)
class Candidate:
    """A layout with its micro batch and recomputation, and what a step takes."""

    config: Config
    layout: Layout
    estimate: Estimate
    traced: bool = False  # memory is that of its trace

    def __str__(self) -> str:
        layout, parallel, recompute = self.layout, self.config.parallel, self.config.compute.recompute
        words = [f"{axis} {size}" for axis in ("tp", "cp", "pp", "ep") if (size := getattr(layout, axis)) > 1]
        if layout.pp > 1:
            words.append(f"{parallel.schedule} of {parallel.local_stages * layout.pp} stages")
        if layout.dp_replicate > 1:
            words.append(f"{layout.dp_replicate} replicas")
        if layout.dp_shard > 1:
            words.append(f"{layout.dp_shard} shards")
        if layout.dp_shard * layout.cp > 1:
            words.append(f"zero {parallel.zero_level}" + ", reduce every" * (parallel.reduce == "every"))
        words.append(f"micro batch {self.config.batch.micro_batch}")
        return ", ".join([*words, f"recompute {recompute}"] if recompute != "none" else words)

    @property
    def settings(self) -> dict[str, Any]:
        """The settings that make this layout, section.key -> value: of those searched what is no default, and the
        micro batch."""
        values = {key: get_setting(self.config, key) for key in KEYS}
        return {key: value for key, value in values.items() if value != FIELDS[key].default or key.startswith("batch")}


@dataclass(frozen=True)
class Found:
    """What a search found, fastest first."""

    fitting: Sequence[Candidate]
    too_large: Sequence[Candidate]


def search(config: Config, gpus: int, machine: Machine, fixed: Collection[str] = ()) -> Found:
    """Return how a run's step can be laid out on this many GPUs. fixed: settings of KEYS that keep their values.

    Raises UserError where no layout divides, or none fits.
    """
    if gpus < 1:
        raise UserError(f"--gpus {gpus} must be at least 1")
    pinned = {key: value for key in KEYS if key in fixed and (value := get_setting(config, key)) != AUTO}
    defaults = {key: FIELDS[key].default for key in WRITTEN if key not in {*fixed, "batch.micro_batch"}}
    plain = with_values(config, defaults)
    candidates: list[Candidate] = []
    for values in layouts(plain, gpus, machine, pinned):
        candidates += candidates_of(plain, values, gpus, machine, pinned)
    if not PIPELINE & pinned.keys():
        fastest = distinct(by_speed(candidates, machine)[0])[:REFINED]
        pipelines = [candidate for candidate in fastest if candidate.layout.pp > 1]
        for candidate, (schedule, stages) in product(pipelines, SCHEDULES):
            values = {**candidate.settings, "parallel.schedule": schedule, "parallel.stages_per_rank": stages}
            candidates += candidates_of(plain, values, gpus, machine, pinned)
    if not candidates:
        beside = "".join(f", {key} = {value!r}" for key, value in pinned.items())
        raise UserError(
            f"no layout of --gpus {gpus} divides model and batch.global_batch = {config.batch.global_batch}{beside}; "
            "choose another number of GPUs, or a batch that is a multiple of it"
        )
    fitting, too_large = by_speed(candidates, machine)
    if not fitting:
        least = min(candidates, key=lambda candidate: candidate.estimate.bytes)
        raise UserError(
            f"no layout fits {gpus} GPUs of {machine.name}, of which {machine.usable / 2**30:,.1f} GiB can be used; "
            f"the leanest takes {least.estimate.bytes / 2**30:,.1f} ({least}); take more GPUs, or a smaller model"
        )
    return Found(fitting, too_large)


def layouts(config: Config, gpus: int, machine: Machine, pinned: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield the settings of [parallel] of every layout of this many GPUs, pipelines by 1f1b: tensor parallelism within
    a node; shards over all data-parallel ranks, those of a node, or none."""
    model, powers = config.model, [2**n for n in range(gpus.bit_length())]
    tps = [tp for tp in powers if tp <= machine.gpus_per_node]
    cps = [cp for cp in powers if cp == 1 or config.data.sequence_length >= cp * LEAST_TOKENS]
    least_pp = 2 if PIPELINE & pinned.keys() else 1  # a schedule or stages that are fixed need a pipeline
    pps = [pp for pp in range(least_pp, min(gpus, model.layers) + 1) if gpus % pp == 0]
    for tp, cp, pp in product(tps, cps, pps):
        dp, of_node = gpus // (tp * cp * pp), max(1, machine.gpus_per_node // (tp * cp))
        by_user = {pinned.get("parallel.dp_shard") or dp, dp // (pinned.get("parallel.dp_replicate") or 1)}
        for shards in {dp, of_node, 1} | by_user:
            if gpus % (tp * cp * pp) or not shards or dp % shards:
                continue
            # the larger data axis takes what ranks there are: the settings then are right as nodes are added
            data = {"dp_replicate": 1, "dp_shard": 0} if shards == dp else {"dp_replicate": 0, "dp_shard": shards}
            eps = [ep for ep in range(1, min(shards, model.experts) + 1) if shards % ep == model.experts % ep == 0]
            for ep, (zero, reduce) in product(eps or [1], STATES if pp == 1 and shards * cp > 1 else STATES[:1]):
                sizes = {"pp": pp, "cp": cp, "tp": tp, "ep": ep, **data}
                sizes |= {"zero": zero if pp == 1 else 0, "reduce": reduce}
                values = {f"parallel.{name}": value for name, value in sizes.items()}
                # the user may have written a size as 0, for the rest, or as the number that it comes to
                true_sizes = {"parallel.dp_replicate": dp // shards, "parallel.dp_shard": shards}
                if all(pinned.get(key, value) in (value, true_sizes.get(key, value)) for key, value in values.items()):
                    yield values | {"parallel.sequence_parallel": tp > 1}


def candidates_of(
    config: Config, values: Mapping[str, Any], gpus: int, machine: Machine, pinned: Mapping[str, Any]
) -> Iterator[Candidate]:
    """Yield a layout with the micro batches that fit, each with the least recomputation that it needs, and with those
    too large that are tried on the way."""
    laid_out = with_values(config, {**values, **pinned})
    layout = fit(laid_out.parallel, gpus)
    micros = (config.batch.micro_batch,) if "batch.micro_batch" in pinned else MICRO_BATCHES
    recomputes = (config.compute.recompute,) if "compute.recompute" in pinned else RECOMPUTE
    for micro in micros:
        for recompute in recomputes:
            settings = with_values(laid_out, {"batch.micro_batch": micro, "compute.recompute": recompute})
            with suppress(UserError):  # this batch does not divide by it
                check_batch(settings, layout, settings.batch.global_batch)
                if find_conflicts(settings):
                    continue
                first, *later = (estimate(each, gpus, machine) for each in at_each_length(settings))
                fullest = max((first, *later), key=lambda each: each.bytes)
                candidate = Candidate(settings, layout, replace(first, peak=fullest.peak))
                yield candidate
                if candidate.estimate.bytes <= machine.usable:
                    break
        else:  # the batch does not divide, or full recomputation does not fit: nor would larger micro batches
            return


def confirm(found: Found, gpus: int, machine: Machine) -> Found:
    """Return what was found with the fastest layout that also fits by its trace put first. Imports torch.

    Of a pipeline the rank that the formulas find fullest is traced, at the sequence length at which it is.
    """
    from megahp.plan.trace import trace_step

    refuted = list[Candidate]()
    for index, candidate in enumerate(found.fitting):
        places = [
            (work.bytes, config, position)
            for config in at_each_length(candidate.config)
            for position, work in enumerate(rank_works(config, gpus))
        ]
        _, config, position = max(places, key=lambda place: place[0])
        trace = trace_step(config, gpus, position * gpus // candidate.layout.pp)
        # its memory alone: a time by the trace would not compare with the others' times by formulas
        traced = replace(candidate, estimate=replace(candidate.estimate, peak=dict(trace.peak)), traced=True)
        if traced.estimate.bytes <= machine.usable:
            return Found([traced, *found.fitting[index + 1 :]], [*refuted, *found.too_large])
        refuted.append(traced)
    raise UserError(f"no layout fits {gpus} GPUs of {machine.name} by its trace; take more GPUs, or a smaller model")


def by_speed(candidates: Iterable[Candidate], machine: Machine) -> tuple[list[Candidate], list[Candidate]]:
    """Return those that fit and those that are too large, fastest first."""
    ordered = sorted(candidates, key=lambda each: each.estimate.seconds)
    fitting = [each for each in ordered if each.estimate.bytes <= machine.usable]
    return fitting, [each for each in ordered if each.estimate.bytes > machine.usable]


def distinct(candidates: Iterable[Candidate]) -> list[Candidate]:
    """Return the first of each layout: others differ from it in micro batch, recomputation, ZeRO or schedule."""
    first: dict[Layout, Candidate] = {}
    for candidate in candidates:
        first.setdefault(candidate.layout, candidate)
    return list(first.values())


def why_slower(candidate: Candidate, best: Candidate) -> str:
    """Return what, above all, a layout's step takes longer with than the best one's."""
    least = best.estimate.split
    more = {kind: seconds - least.get(kind, 0.0) for kind, seconds in candidate.estimate.split.items()}
    kind = max(more, key=lambda kind: more[kind])
    return f"{kind} +{more[kind]:.2g} s"
