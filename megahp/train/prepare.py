"""All that can be checked of a run before anything is built or written, and its data."""

import math
import os
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megahp import checkpoint, config
from megahp.config import Config, resolve, stages
from megahp.data.indexed import IndexedDataset
from megahp.data.loader import TrainingData
from megahp.data.tokenizer import Tokenizer, load_tokenizer
from megahp.errors import UserError
from megahp.files import read_json, refuse_links
from megahp.log.wandb_log import check_wandb
from megahp.model.build import longest
from megahp.ops.engines import fused_adam, linear_of, norm_of
from megahp.parallel.device import check_devices, cuda_wanted
from megahp.parallel.layout import Layout
from megahp.scaling.batch import BatchPlan, Progress, least_batch, runnable, unit
from megahp.scaling.flops import parameters as parameter_count
from megahp.train.advice import advice


def prepare(
    settings: Config, layout: Layout, ranks_here: int, resume: bool, warn: Callable[[str], None] | None = None
) -> Config:
    """Check, before anything is built or written, all that can be checked: batch and layout, tokenizer, run directory,
    and on resume that the run is the same one. Returns the settings with the vocabulary filled in. Raises UserError.

    warn: is told, of a run that begins, what is likely a mistake.
    """
    check_devices(settings, ranks_here)
    check_engines(settings)
    if settings.log.wandb != "off":
        check_wandb()
    if not settings.data.train:
        raise UserError("data.train is empty; name at least one prefix written by `megahp preprocess`")
    tokenizer = load_tokenizer(settings.data.tokenizer)
    check_tokenizer(settings, tokenizer)
    settings = with_vocabulary(settings, tokenizer)
    check_memory(settings, layout, ranks_here)
    refuse_links(settings.directory)
    saved, begin = newest(settings), 0
    if settings.directory.exists() and not settings.directory.is_dir():
        raise UserError(f"{settings.directory} is a file; choose another log.name")
    if not resume and (saved or (settings.directory / "metrics.jsonl").exists()):
        raise UserError(
            f"{saved or settings.directory} is there already; go on with --resume auto, or choose another log.name"
        )
    if resume and saved:
        state = checkpoint.read_state(saved)
        refuse_changes(settings, state["config"], saved, {"always", "unless dense", "on resume"})
        check_schedule(settings, state["progress"]["tokens"], saved)
        check_batch_to_go_on(settings, layout, state, saved)
    else:
        check_batch(settings, layout, settings.batch.global_batch)
        if settings.train.start_from:
            begin = check_start(settings, layout, checkpoint.find(checkpoint.place(settings.train.start_from)))
    data = open_data(settings)
    if warn and not (resume and saved):
        # a machine without ranks of the run, such as a login node, may lack the GPUs that its own have
        is_cuda = cuda_wanted(settings) if ranks_here else settings.train.device != "cpu"
        for line in advice(settings, data, math.prod(layout.shape), "cuda" if is_cuda else "cpu", begin):
            warn(f"warning: {line}")
    return settings


def newest(settings: Config) -> checkpoint.Place | None:
    """The checkpoint that a resumed run would go on from. Raises UserError."""
    return checkpoint.first_whole(checkpoint.candidates(settings.directory / "checkpoints", settings.checkpoint.remote))


def refuse_without_checkpoint(settings: Config) -> None:
    """Raise UserError when there is nothing to go on from."""
    if newest(settings) is None:
        folder = settings.directory / "checkpoints"
        raise UserError(f"{folder} holds no checkpoint to go on from; begin anew with --resume auto, or restore one")


def check_batch(settings: Config, layout: Layout, global_batch: int) -> None:
    """Raise UserError when the layout cannot run a global batch, of the run's beginning or of where it goes on, in
    every stage of the data."""
    batch, multiple, least = settings.batch, unit(settings, layout.dp), least_batch(settings, layout.dp)
    nearest = runnable(global_batch, multiple, least)
    if nearest != (global_batch,):
        of = f"data parallel {layout.dp} x batch.micro_batch {batch.micro_batch}"
        if layout.pp > 1:
            of += f", {layout.pp} pipeline stages kept busy by the {settings.parallel.schedule} schedule"
        if stages(settings.data)[1:]:
            of += ", in sequences of every length in data.lengths"
        wanted = f"below {least}" if global_batch < least else f"not a multiple of {multiple}"
        which = "batch.global_batch" if global_batch == batch.global_batch else "the global batch to go on with"
        raise UserError(
            f"{which} = {global_batch} is {wanted} ({of}); nearest that can be: {', '.join(map(str, nearest))}"
        )


def check_batch_to_go_on(settings: Config, layout: Layout, state: Mapping[str, Any], path: checkpoint.Place) -> None:
    """Raise UserError when the layout cannot run what becomes of a checkpoint's batch, or would soon be left again."""
    plan, saved = BatchPlan(settings, layout.dp), state["batch_plan"]
    plan.go_on(saved, Progress(**state["progress"]))
    check_batch(settings, layout, plan.batch)
    stop_at = settings.resilience.stop_at_batch
    if 0 < stop_at <= saved["batch"]:
        raise UserError(
            f"resilience.stop_at_batch = {stop_at} is not above the batch of {path}, {saved['batch']}; raise it, or "
            "leave it out"
        )


def check_memory(settings: Config, layout: Layout, ranks_here: int) -> None:
    """Raise UserError when this machine cannot even hold its ranks' shares of the weights, in 4 bytes each. GPUs
    are not asked: CUDA would have to be initialised before the ranks are started."""
    parameters = parameter_count(settings.model, longest(settings))
    share = 4 * parameters * layout.dp_replicate / math.prod(layout.shape)
    needed, there = share * ranks_here, os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if not cuda_wanted(settings) and needed > there:
        raise UserError(
            f"the model's {parameters:,} parameters take at least {needed / 1e9:,.0f} GB of this machine, which has "
            f"{there / 1e9:,.0f} GB; make it smaller, or divide it among more machines"
        )


def check_engines(settings: Config) -> None:
    """Raise UserError when an engine that is asked for is not installed, or cannot compute on the run's device."""
    if settings.compute.norms != "megahp":
        norm_of(settings.compute.norms, settings.model.norm)
    if settings.compute.fp8 != "none":
        linear_of(settings.compute.fp8, torch.device("cpu"), 16, 16)
    if settings.optimizer.engine == "apex":
        fused_adam()
    for key in ("compute.norms", "compute.fp8", "optimizer.engine"):
        if (engine := config.get(settings, key)) in ("apex", "transformer-engine") and not cuda_wanted(settings):
            raise UserError(f"{key} = {engine!r} computes on CUDA devices alone; train on one, or leave it out")


def check_start(settings: Config, layout: Layout, path: checkpoint.Place) -> int:
    """Return the tokens that a checkpoint has seen. Raises UserError when a new run cannot go on from it."""
    state = checkpoint.read_state(path)
    # a sparse run may become dense, what was masked then trained from 0 on (MediSwift, arXiv 2403.00952)
    sparse = settings.sparsity.method != "none"
    refuse_changes(settings, state["config"], path, {"always", "unless dense"} if sparse else {"always"})
    saved, progress = resolve.from_dict(state["config"], str(path)), Progress(**state["progress"])
    if settings.model.positions == "learned" and longest(settings) != longest(saved):
        raise UserError(
            f"model.positions = 'learned' holds {longest(saved)} positions in {path}, and the longest sequence would "
            f"be {longest(settings)}; keep that length"
        )
    check_schedule(settings, progress.tokens, path)
    plan = BatchPlan(settings, layout.dp)
    plan.go_on(plan_to_go_on(settings, saved, state, plan), progress)
    if plan.step(progress) is None:
        train = settings.train
        raise UserError(
            f"train.tokens = {train.tokens} and train.steps = {train.steps} leave no step after the {progress.tokens} "
            f"tokens and {progress.step} steps of {path}, which count as this run's own; raise them"
        )
    return progress.tokens


def check_schedule(settings: Config, tokens: int, path: checkpoint.Place) -> None:
    """Raise UserError when the schedule would begin only after this checkpoint."""
    if settings.schedule.start > tokens:
        raise UserError(
            f"schedule.start = {settings.schedule.start} is beyond the {tokens} tokens of {path}, where the run goes "
            f"on; set schedule.start={tokens} for a schedule that begins there"
        )


def plan_to_go_on(settings: Config, saved: Config, state: Mapping[str, Any], plan: BatchPlan) -> dict[str, Any]:
    """The state a branch's batch plan begins in: the checkpoint's, where nothing of [batch] has changed, or its own."""
    same = (saved.batch, saved.data.sequence_length) == (settings.batch, settings.data.sequence_length)
    return state["batch_plan"] if same else {**plan.state(), "began": state["progress"]["tokens"]}


def check_tokenizer(settings: Config, tokenizer: Tokenizer) -> None:
    """Raise UserError when the data says it was written with another tokenizer than the run's."""
    for prefix in settings.data.train:
        side = Path(f"{prefix}.json")
        if side.exists() and _fingerprint_in(side) != tokenizer.fingerprint:
            raise UserError(
                f"data.tokenizer = {settings.data.tokenizer!r} is not the one {prefix} was written with, "
                f"according to {side}; name that one, or preprocess again"
            )


def _fingerprint_in(side: Path) -> str:
    remedy = "preprocess again, or remove it"
    found = read_json(side, "description of data", remedy).get("tokenizer_fingerprint")
    if not isinstance(found, str):
        raise UserError(f"{side} holds no tokenizer_fingerprint; {remedy}")
    return found


def with_vocabulary(settings: Config, tokenizer: Tokenizer) -> Config:
    """model.vocab_size from the tokenizer where it is 0. Raises UserError when it is too small for the tokenizer."""
    if settings.model.vocab_size == 0:
        return config.with_values(settings, {"model.vocab_size": tokenizer.vocab_size})
    if settings.model.vocab_size < tokenizer.vocab_size:
        raise UserError(
            f"model.vocab_size = {settings.model.vocab_size} is less than the {tokenizer.vocab_size} tokens of "
            f"data.tokenizer = {settings.data.tokenizer!r}; leave it out to take the tokenizer's"
        )
    return settings


def changes(settings: Config, saved: Mapping[str, Mapping[str, Any]]) -> dict[str, tuple[Any, Any]]:
    """Settings whose value differs from the saved one: key -> (saved, now)."""
    return config.differences(resolve.from_dict(saved, "checkpoint"), settings)


def refuse_changes(
    settings: Config, saved: Mapping[str, Mapping[str, Any]], path: checkpoint.Place, fixed: Collection[str]
) -> None:
    """Raise UserError when a setting differs that is fixed in one of these ways: see megahp/config/schema.py."""
    for key, (before, now) in changes(settings, saved).items():
        if config.fixed(key) in fixed:
            elsewhere = ", or start a new run under another log.name" if "on resume" in fixed else ""
            raise UserError(f"{key} = {now!r} but {path} was trained with {before!r}; set it back{elsewhere}")


def open_data(settings: Config) -> TrainingData:
    """The run's data, memory-mapped. Raises UserError for missing or damaged files."""
    data = settings.data
    datasets = [IndexedDataset(prefix) for prefix in data.train]
    tokens = {dataset.prefix: int(dataset.lengths.sum(dtype=np.int64)) for dataset in datasets}
    for prefix, count in tokens.items():
        if count == 0:
            raise UserError(f"data {prefix!r} holds no tokens; leave it out of data.train, or preprocess again")
    by_tokens = tuple(map(float, tokens.values()))
    along = [replace(stage, weights=stage.weights or by_tokens) for stage in config.stages(data)]
    cache = Path(data.cache) if data.cache else Path(data.train[0]).parent / "cache"
    return TrainingData(
        datasets, along, settings.train.seed, data.validation_fraction, cache, settings.model.vocab_size
    )
