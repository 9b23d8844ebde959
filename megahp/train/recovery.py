"""Recovery from bad steps: retry, skip or rewind; periodic consistency checks; saves that fail."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from megahp import checkpoint
from megahp.data.loader import Loader
from megahp.errors import Fault, UserError
from megahp.faults.copies import check_copies
from megahp.faults.suspects import WEIGHT, find_in_weights, first_suspects, watch_layers
from megahp.faults.watchdog import Watchdog
from megahp.scaling.batch import StepPlan
from megahp.train.engine import Measurement
from megahp.train.prepare import WRONG_SAMPLES
from megahp.train.reporter import Reporter
from megahp.train.run import Run, broadcast_from_rank0
from megahp.train.start import restore_newest
from megahp.train.trainer import Step

SAVE_RETRY_SECONDS = 2.0  # seconds between attempts to save the last step
MAX_SKIPPED_IN_A_ROW = 20  # skipped steps in a row, which end a run
MAX_REWINDS = 3  # rewinds without a checkpoint in between; one more ends a run


@dataclass(frozen=True)
class Decision:
    """What to do with a step once its gradients are known, and why."""

    action: Literal["update", "skip", "rewind"]
    reason: str = ""


def compute_with_retry(
    compute: Callable[[], Step], run: Run, plan: StepPlan, reporter: Reporter
) -> tuple[Step, Decision]:
    """Compute a step's gradients, and retry once, with every layer watched, if they are not finite: a transient fault
    then costs one retry and changes no number, a lasting one is located. Raises Fault when a weight is not finite."""
    step = compute()
    if step.measured.finite:
        run.cause_located = False
        return step, decide_on_spike(run, step.measured, reporter)
    # in float16 an overflow is how the loss scale finds its value; and in a row of steps that are not finite the first
    # one's retry has located the cause
    is_overflow = run.config.train.dtype == "float16" and math.isfinite(step.measured.loss)
    if is_overflow or run.cause_located:
        return step, Decision("skip", "the gradient is not finite")
    run.engine.zero()
    del step  # or its gradients would lie in memory beside the retry's
    with watch_layers(run.engine.model.stages, run.samples(plan)) as found:
        step = compute()
    if step.measured.finite:
        reporter.event("repeated", "the gradient was not finite, and is on a retry: a transient fault", run.progress)
        return step, decide_on_spike(run, step.measured, reporter)
    grads = dict(zip(run.engine.trained, step.grads, strict=True))
    suspects = first_suspects([*found, *find_in_weights(run.engine.weights, grads)])
    reason = "; ".join(map(str, suspects)) or "the loss is not finite"
    if suspects and suspects[0].kind == WEIGHT:  # every step from here on would be skipped
        check_copies(run.engine.weights, run.engine.rows, run.mesh)  # raises where another rank's copy is finite
        reporter.event("broken", reason, run.progress)
        remedy = "resume, with a lower optimizer.lr or optimizer.weight_decay if this recurs"
        raise Fault(f"{reason}; an older checkpoint may have it finite: {remedy}")
    run.cause_located = True
    return step, Decision("skip", reason)


def decide_on_spike(run: Run, measured: Measurement, reporter: Reporter) -> Decision:
    """Decide on a step whose gradients are finite: update, or, where its loss or gradient norm is a spike, what
    resilience.spikes says."""
    spike = run.spikes.update(measured.loss, measured.grad_norm)
    if not spike:
        return Decision("update")
    reporter.event("spike", spike, run.progress, loss=measured.loss, grad_norm=measured.grad_norm)
    reaction = run.config.resilience.spikes
    if reaction == "rewind" and run.saved_at >= 0:
        return Decision("rewind", spike)
    return Decision("update" if reaction == "tell" else "skip", spike)


def skip(run: Run, reporter: Reporter, plan: StepPlan, measured: Measurement, reason: str) -> None:
    """Count and log a step without an update. Raises UserError after MAX_SKIPPED_IN_A_ROW in a row."""
    run.skipped += 1
    run.skipped_in_a_row += 1
    samples = [plan.first_sample, plan.first_sample + plan.global_batch - 1]
    scale = run.loss_scale.value
    reporter.event("skipped", reason, run.progress, loss=measured.loss, loss_scale=scale, samples=samples)
    if run.skipped_in_a_row == MAX_SKIPPED_IN_A_ROW:
        raise UserError(
            f"{MAX_SKIPPED_IN_A_ROW} steps in a row were skipped, the last one, {plan.step}, because {reason}, with "
            f"optimizer.lr = {run.config.optimizer.lr:g}; lower it and resume from the last checkpoint"
        )


def report_wrong_samples(run: Run, reporter: Reporter, plan: StepPlan) -> None:
    """Log every sample of a step in whose place another one stands, since an id is outside the vocabulary. Where
    data.wrong_samples refuses the first, saves what was trained before and raises UserError.

    Some rank has met one, and all ranks read all of them, to end alike."""
    for sample in range(plan.first_sample, plan.first_sample + plan.global_batch):
        for wrong in run.data.batch(np.array([sample]), documents=False).wrong:
            reporter.event("wrong sample", wrong, run.progress, sample=sample)
            if run.config.data.wrong_samples == "refuse":
                run.engine.zero()
                if run.progress.step:
                    save_at_end(run, reporter, None)
                raise UserError(f"{wrong}; {WRONG_SAMPLES}")


def wait_for_save(run: Run, reporter: Reporter) -> None:
    """Wait for the save in progress. Its failure is logged and does not end training: the next save may succeed."""
    try:
        run.store.wait()
    except UserError as error:
        reporter.event("unsaved", str(error), run.progress)


def save_at_end(run: Run, reporter: Reporter, validation: float | None) -> bool:
    """Save the last step, retrying for resilience.save_again seconds. Returns whether it is on the disk."""
    end = time.monotonic() + run.config.resilience.save_again
    while True:
        try:
            if run.progress.step != run.saved_at:
                wait_for_save(run, reporter)
                run.save(validation)
            run.store.wait()
            return True
        except checkpoint.UploadError as error:
            reporter.event("unsaved", str(error), run.progress)
            return True  # on this disk it is whole
        except UserError as error:
            reporter.event("unsaved", str(error), run.progress)
            run.saved_at = -1
        if broadcast_from_rank0(lambda: time.monotonic() >= end):  # one clock decides: save is a collective
            return False
        time.sleep(SAVE_RETRY_SECONDS)


def rewind(run: Run, loader: Loader, reporter: Reporter, plan: StepPlan, reason: str) -> None:
    """Return to the newest checkpoint, and continue with the samples after this step's, so that those that led to the
    spike are passed over. Raises UserError without a checkpoint, or after MAX_REWINDS.

    (PaLM, arXiv 2204.02311, from a secondary source: 100 steps back, past 200 to 500 batches.)
    """
    run.engine.zero()
    run.rewinds += 1
    run.skipped_in_a_row = 0
    loader.drop_prefetched()  # what was read ahead is of the data as it stands now, which is about to be restored
    wait_for_save(run, reporter)  # its checkpoint is the newest
    names = broadcast_from_rank0(lambda: [path.name for path in checkpoint.complete_without_links(run.folder)])
    newest_first = [run.folder / name for name in reversed(names)]
    if not newest_first or run.rewinds > MAX_REWINDS:
        why = f"and {MAX_REWINDS} rewinds did not help" if newest_first else "and no checkpoint could be written"
        raise UserError(
            f"{reason} at step {plan.step}, {why}; lower optimizer.lr = {run.config.optimizer.lr:g}, or set "
            "resilience.spikes=skip"
        )
    path, restored, refused = restore_newest(run, newest_first)
    first, last = run.progress.samples, plan.first_sample + plan.global_batch - 1
    run.progress = replace(run.progress, samples=last + 1)
    reporter.start("rewound", f"to {path}, and past samples {first} to {last}, because {reason}", run, restored)
    for why in refused:
        reporter.event("refused", why, run.progress)


def consistency_check(run: Run, watchdog: Watchdog, reporter: Reporter) -> None:
    """Compare the ranks: copies of weights, which must be equal, and the share of time each waits for the others.
    Raises Fault where copies differ."""
    check_copies(run.engine.weights, run.engine.rows, run.mesh)
    slow = watchdog.slow_ranks(run.mesh.rank("pp"))
    if slow is None:
        return
    if slow.keys() - run.slow:  # those already reported are not reported again
        reporter.event("straggler", "; ".join(slow.values()), run.progress, ranks=list(slow))
    run.slow = set(slow)
