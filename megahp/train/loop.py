"""Training, from the first line to the last: each thing a step does is a line of `train`, in order."""

from __future__ import annotations

import time
from collections.abc import Iterator
from functools import partial

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from megahp import config
from megahp.data.loader import Batch, Loader, TrainingData, rank_samples
from megahp.data.ngrams import unigram_and_bigram
from megahp.faults.notice import Notice
from megahp.faults.watchdog import Watchdog
from megahp.launch import World
from megahp.parallel.device import device_of
from megahp.parallel.layout import Layout
from megahp.parallel.mesh import make_mesh
from megahp.scaling.batch import Plan
from megahp.train.prepare import open_data
from megahp.train.recovery import check, rewind, settle, skip, soundly, stands_out
from megahp.train.reporter import Reporter
from megahp.train.run import Run, is_first
from megahp.train.start import start
from megahp.train.step import Measurement, clip

BASELINE_TOKENS = 50_000_000  # the n-gram models of the report are fitted on at most so many training tokens


def train(settings: config.Config, place: World, store: dist.Store, layout: Layout, resume: bool) -> bool:
    """Run, or go on with, the run of these prepared settings, as one of its ranks. Returns whether it is finished:
    False when it was told to leave before."""
    notice = Notice(settings.resilience.stop_after)
    mesh = make_mesh(layout, device_of(settings, place))
    reporter = Reporter(settings)
    data = open_data(settings)
    loader = Loader(data, mesh.device, settings.data.mask_documents)
    run = Run(settings, mesh, data)
    start(run, reporter, resume)

    watchdog = Watchdog(store, settings.resilience.hang_after, settings.directory)
    with reporter.showing(run.progress), watchdog:
        while plan := run.batch_plan.step(run.progress):
            began = time.monotonic()
            if run.enter_stage(plan):
                reporter.stage(run, plan)
            grads, measured, why = soundly(partial(compute, run, loader, plan, notice.given), run, plan, reporter)
            if measured.finite:
                why = stands_out(run, measured, reporter)
            if why and measured.finite and settings.resilience.spikes == "rewind" and run.saved_at >= 0:
                rewind(run, loader, reporter, plan, why)
                watchdog.alive(run.progress.step)
                continue
            if why:
                skip(run, reporter, plan, measured, why)
            else:
                run.noise.update(measured.grad_sq_example, measured.grad_sq_batch, plan.global_batch, plan.tokens)
                clip(grads, measured.grad_norm, settings.optimizer.clip, run.loss_scale.value)
                run.optimizer.step(grads, plan)
                run.engine.rebalance(measured.load)
                run.skipped_in_a_row = 0
            if settings.train.dtype == "float16":
                run.loss_scale.update(measured.finite)
            run.engine.zero()
            del grads  # or they would lie in memory beside the next step's
            run.progress = run.progress.after(plan)
            change = run.batch_plan.look(run.progress, run.noise.pooled.ratio)
            masked = run.masks.look(plan, run.progress) if not why else None
            seconds = time.monotonic() - began
            validation = validate(run, data) if is_due(settings.train.validate_every, run) else None
            watchdog.alive(run.progress.step)
            reporter.step(run, plan, measured, change, masked, seconds, validation, skipped=bool(why))
            if is_due(settings.resilience.check_every, run):
                check(run, watchdog, reporter)
            if is_due(settings.checkpoint.every, run):
                settle(run, reporter)
                run.save(validation)
            watchdog.alive(run.progress.step)
            if measured.told or run.is_outgrown:
                break

    loader.close()
    if run.progress.step != run.saved_at:
        settle(run, reporter)
        run.save(None)
    run.store.wait()
    if run.batch_plan.step(run.progress):
        reporter.event("stopped", why_stopped(run, notice), run.progress)
        reporter.close()
        return False
    if is_first() and settings.log.baselines and settings.train.validation_samples:
        reporter.baselines(*baselines(settings, data))
    reporter.event("finished", "the token budget or train.steps is reached", run.progress, skipped=run.skipped)
    reporter.close()
    return True


def why_stopped(run: Run, notice: Notice) -> str:
    if run.is_outgrown:
        return f"the global batch has grown to resilience.stop_at_batch = {run.settings.resilience.stop_at_batch}"
    return notice.why or "another rank was told to leave"


def compute(run: Run, loader: Loader, plan: Plan, told: bool) -> tuple[list[Tensor], Measurement]:
    """One step's gradients, and what they say, on all ranks."""
    scale = run.loss_scale.value
    batches = microbatches(loader, plan, run)
    loss = run.engine.forward_backward(batches, plan.microbatches(run.mesh.layout.dp), plan.tokens, scale)
    grads = run.engine.gradients()
    run.masks.apply(grads, plan)
    return grads, run.engine.measure(loss, grads, plan.global_batch, scale, told)


def microbatches(loader: Loader, plan: Plan, run: Run) -> Iterator[Batch]:
    """This rank's microbatches of one step; while each computes, the one after it is read."""
    ids = samples_of(plan, run)
    following = run.batch_plan.step(run.progress.after(plan))  # unless the batch grows: then it is read in vain
    if following and following.stage != plan.stage:
        following = None  # its data is not yet entered
    ahead = [*ids[1:], samples_of(following, run)[0] if following else None]
    for now, then in zip(ids, ahead, strict=True):
        yield loader.take(now, then)


def samples_of(plan: Plan, run: Run) -> list[np.ndarray]:
    return rank_samples(plan.first_sample, plan.global_batch, plan.micro_batch, run.mesh.data_rank, run.mesh.layout.dp)


def is_due(every: int, run: Run) -> bool:
    """Whether something done every so many steps, and at the end, is due after this one; 0 = at the end only."""
    return (every and run.progress.step % every == 0) or run.batch_plan.step(run.progress) is None


def validate(run: Run, data: TrainingData) -> float | None:
    """Mean loss over the validation samples, in nats per token, equal on all ranks; None where there are none."""
    if run.settings.train.validation_samples == 0:
        return None
    samples = data.validation(run.settings.train.validation_samples)
    count, dp, size = len(samples.tokens), run.mesh.layout.dp, run.settings.batch.micro_batch
    total = torch.zeros((), dtype=torch.float64, device=run.mesh.device)
    for first in range(run.mesh.data_rank * size, -(-count // (dp * size)) * dp * size, dp * size):
        # FSDP2 needs as many forward passes on every rank: where samples run out the last is repeated, for nothing
        index = np.arange(first, first + size)
        total += run.engine.evaluate(rows_of(samples, index.clip(max=count - 1), run), torch.from_numpy(index < count))
    run.engine.reshard()
    if not run.mesh.is_first(("tp",)):
        total.zero_()
    dist.all_reduce(total)
    return total.item() / (count * run.settings.data.sequence_length)


def rows_of(samples: Batch, index: np.ndarray, run: Run) -> Batch:
    device = run.mesh.device
    masked = samples.documents is not None and run.settings.data.mask_documents
    documents = samples.documents[index].to(device) if masked else None  # type: ignore[index]
    return Batch(samples.tokens[index].to(device), documents, samples.ids[index])


def baselines(settings: config.Config, data: TrainingData) -> tuple[float, float]:
    """What a unigram and a bigram model of the training tokens lose on the validation samples, nats per token."""
    samples = data.validation(settings.train.validation_samples)
    return unigram_and_bigram(data.training_chunks(BASELINE_TOKENS), samples.tokens, settings.model.vocab_size)
