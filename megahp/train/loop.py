"""Training, from the first line to the last: each thing a step does is a line of `train`, in order."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from megahp import checkpoint, config
from megahp.data.loader import Batch, Loader, TrainingData
from megahp.data.ngrams import unigram_and_bigram
from megahp.errors import UserError
from megahp.launch import World
from megahp.parallel.layout import Layout
from megahp.parallel.mesh import make_mesh
from megahp.scaling.batch_size import Plan
from megahp.train.reporter import Reporter
from megahp.train.run import Run, Taken, cuda_wanted, is_first, open_data
from megahp.train.step import Measurement, clip

MOST_SKIPPED = 20  # non-finite gradients in a row end a run
BASELINE_TOKENS = 50_000_000  # the n-gram models of the report are fitted on at most so many training tokens


def train(settings: config.Config, place: World, layout: Layout, resume: bool) -> Path:
    """Run, or go on with, the run of these prepared settings, as one of its ranks. Returns the run directory."""
    mesh = make_mesh(layout, device_of(settings, place))
    reporter = Reporter(settings)
    data = open_data(settings)
    loader = Loader(data, mesh.device, settings.data.mask_documents)
    run = Run(settings, mesh, data)
    start(run, reporter, resume)

    with reporter.showing(run.progress):
        while plan := run.batch_plan.step(run.progress):
            began = time.monotonic()
            if run.enter_stage(plan):
                reporter.stage(run, plan)
            batches = microbatches(loader, plan, run)
            scale = run.loss_scale.value
            loss = run.engine.forward_backward(batches, plan.microbatches(layout.dp), plan.tokens, scale)
            grads = run.engine.gradients()
            run.masks.apply(grads, plan)
            measured = run.engine.measure(loss, grads, plan.global_batch, scale)
            if measured.finite:
                run.noise.update(measured.grad_sq_example, measured.grad_sq_batch, plan.global_batch, plan.tokens)
                clip(grads, measured.grad_norm, settings.optimizer.clip, scale)
                run.optimizer.step(grads, plan)
                run.engine.rebalance(measured.load)
                run.skipped_in_a_row = 0
            else:
                skip(run, reporter, measured)
            if settings.train.dtype == "float16":
                run.loss_scale.update(measured.finite)
            run.engine.zero()
            del grads  # or they would lie in memory beside the next step's
            run.progress = run.progress.after(plan)
            change = run.batch_plan.look(run.progress, run.noise.pooled.ratio)
            masked = run.masks.look(plan, run.progress) if measured.finite else None
            seconds = time.monotonic() - began
            validation = validate(run, data) if is_due(settings.train.validate_every, run) else None
            reporter.step(run, plan, measured, change, masked, seconds, validation)
            if is_due(settings.checkpoint.every, run) and not run.skipped_in_a_row:
                save(run, reporter, validation)

    loader.close()
    if run.progress.step != run.saved_at and not run.skipped_in_a_row:
        save(run, reporter)
    run.store.wait()
    if is_first() and settings.log.baselines and settings.train.validation_samples:
        reporter.baselines(*baselines(settings, data))
    reporter.event("finished", "the token budget or train.steps is reached", run.progress, skipped=run.skipped)
    reporter.close()
    return settings.directory


def device_of(settings: config.Config, place: World) -> torch.device:
    """This rank's device. Ranks on CPUs share the machine's cores between them."""
    if cuda_wanted(settings):
        torch.cuda.set_device(place.local_rank)
        return torch.device("cuda", place.local_rank)
    torch.set_num_threads(max(1, torch.get_num_threads() // place.local_size))
    return torch.device("cpu")


def start(run: Run, reporter: Reporter, resume: bool) -> None:
    """Begin at the newest checkpoint if resuming and there is one, else where train.start_from says, else at the
    beginning."""
    found = [checkpoints_to_start_from(run, resume) if is_first() else None]
    dist.broadcast_object_list(found)  # a shared file system may show the ranks different things
    if isinstance(found[0], UserError):
        raise found[0]
    if found[0] is None:
        reporter.began("started", f"a new run of {count(run)} parameters", run, Taken(None, run.batch_plan.state()))
        return
    event, paths = found[0]
    path, taken, refused = go_back(run, paths) if event == "resumed" else (paths[0], run.branch(paths[0]), [])
    anew = f"; {', '.join(taken.anew)} read from the beginning" if taken.anew else ""
    reporter.began(event, f"from {path}{anew}", run, taken)
    for why in refused:
        reporter.event("refused", why, run.progress)
    for change in taken.changes:
        reporter.event("batch", change.reason, run.progress, **change.to_dict())


def go_back(run: Run, newest_first: list[checkpoint.Place]) -> tuple[checkpoint.Place, Taken, list[str]]:
    """Restore the newest checkpoint that is as it was written. Returns it, what was taken over, and why newer ones were
    refused. Raises UserError when there is none."""
    refused: list[str] = []
    for path in newest_first:
        try:
            return path, run.restore(path), refused
        except checkpoint.DamagedError as error:
            refused.append(str(error))
    raise UserError("; ".join(refused))


def checkpoints_to_start_from(run: Run, resume: bool) -> tuple[str, list[checkpoint.Place]] | UserError | None:
    """The event a start is, and the checkpoints that serve, the best first; or why there is none."""
    try:
        if resume and (own := checkpoint.candidates(run.folder, run.settings.checkpoint.remote)):
            return "resumed", own
        origin = run.settings.train.start_from
        return ("branched", [checkpoint.find(checkpoint.place(origin))]) if origin else None
    except UserError as error:
        return error


def save(run: Run, reporter: Reporter, validation: float | None = None) -> None:
    """Begin a checkpoint. That the one before it could not be written is told, and ends nothing but the run's end."""
    try:
        run.store.wait()
    except UserError as error:
        reporter.event("unsaved", str(error), run.progress)
    run.save(validation)


def skip(run: Run, reporter: Reporter, measured: Measurement) -> None:
    """Leave the weights alone this once. Raises UserError when that has become the rule."""
    run.skipped += 1
    run.skipped_in_a_row += 1
    scale = run.loss_scale.value
    reporter.event("skipped", "the gradient is not finite", run.progress, loss=measured.loss, loss_scale=scale)
    if run.skipped_in_a_row == MOST_SKIPPED:
        raise UserError(
            f"{MOST_SKIPPED} gradients in a row were not finite, at step {run.progress.step + 1} with "
            f"optimizer.lr = {run.settings.optimizer.lr:g}; lower it and go on from the last checkpoint"
        )


def count(run: Run) -> str:
    return f"{run.engine.model.parameters:,}"


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
    return plan.samples(run.mesh.data_rank, run.mesh.layout.dp)


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
    for start in range(run.mesh.data_rank * size, -(-count // (dp * size)) * dp * size, dp * size):
        # FSDP2 needs as many forward passes on every rank: where samples run out the last is repeated, for nothing
        index = np.arange(start, start + size)
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
