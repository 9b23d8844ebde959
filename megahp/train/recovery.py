"""What a step does that did not go as steps go: done again, skipped, rewound; and what is looked at now and then."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

from megahp import checkpoint
from megahp.data.loader import Loader
from megahp.errors import Fault, UserError
from megahp.faults.copies import check_copies
from megahp.faults.suspects import WEIGHT, find_in_weights, first_suspects, watch_layers
from megahp.faults.watchdog import Watchdog
from megahp.scaling.batch import StepPlan
from megahp.train.reporter import Reporter
from megahp.train.run import Run, broadcast_from_rank0
from megahp.train.start import go_back
from megahp.train.step import Measurement
from megahp.train.trainer import Step

BETWEEN_SAVES = 2.0  # seconds
MOST_SKIPPED = 20  # skipped steps in a row end a run
MOST_REWINDS = 3  # and so do rewinds without a checkpoint since


@dataclass(frozen=True)
class Verdict:
    """What becomes of a step once its gradients are known, and why."""

    action: Literal["update", "skip", "rewind"]
    reason: str = ""


def compute_with_retry(
    compute: Callable[[], Step], run: Run, plan: StepPlan, reporter: Reporter
) -> tuple[Step, Verdict]:
    """Compute a step's gradients, and once more under observation where they are not finite: a passing fault leaves no
    trace then, another is named. Also returns what is to become of the step. Raises Fault when a weight is the
    cause."""
    step = compute()
    if step.measured.finite:
        return step, judge_spike(run, step.measured, reporter)
    # in float16 a gradient that overflows is the loss scale's daily work
    overflown = run.config.train.dtype == "float16" and math.isfinite(step.measured.loss)
    if overflown or run.skipped_in_a_row:
        return step, Verdict("skip", "the gradient is not finite")
    run.engine.zero()
    with watch_layers(run.engine.model.stages, run.samples(plan)) as found:
        step = compute()
    if step.measured.finite:
        reporter.event("repeated", "the gradient was not finite, and is, computed again: a passing fault", run.progress)
        return step, judge_spike(run, step.measured, reporter)
    grads = dict(zip(run.engine.trained, step.grads, strict=True))
    suspects = first_suspects([*found, *find_in_weights(run.engine.weights, grads)])
    why = "; ".join(map(str, suspects)) or "the loss is not finite"
    if suspects and suspects[0].kind == WEIGHT:  # skipping will not help
        check_copies(run.engine.weights, run.engine.rows, run.mesh)
        reporter.event("broken", why, run.progress)
        raise Fault(f"{why}; a checkpoint has it as it was, unless optimizer.lr is so large that it comes again")
    return step, Verdict("skip", why)


def judge_spike(run: Run, measured: Measurement, reporter: Reporter) -> Verdict:
    """What becomes of a step whose gradients are finite: where its loss or its gradient norm is a spike, what
    resilience.spikes says."""
    spike = run.spikes.update(measured.loss, measured.grad_norm)
    if not spike:
        return Verdict("update")
    reporter.event("spike", spike, run.progress, loss=measured.loss, grad_norm=measured.grad_norm)
    wanted = run.config.resilience.spikes
    if wanted == "rewind" and run.saved_at >= 0:
        return Verdict("rewind", spike)
    return Verdict("update" if wanted == "tell" else "skip", spike)


def skip(run: Run, reporter: Reporter, plan: StepPlan, measured: Measurement, why: str) -> None:
    """Leave the weights alone this once. Raises UserError when that has become the rule."""
    run.skipped += 1
    run.skipped_in_a_row += 1
    samples = [plan.first_sample, plan.first_sample + plan.global_batch - 1]
    scale = run.loss_scale.value
    reporter.event("skipped", why, run.progress, loss=measured.loss, loss_scale=scale, samples=samples)
    if run.skipped_in_a_row == MOST_SKIPPED:
        raise UserError(
            f"{MOST_SKIPPED} steps in a row were skipped, the last one, {plan.step}, because {why}, with "
            f"optimizer.lr = {run.config.optimizer.lr:g}; lower it and go on from the last checkpoint"
        )


def wait_for_save(run: Run, reporter: Reporter) -> None:
    """Wait for the checkpoint that is under way. That it could not be written is told, and ends nothing but the run's
    end."""
    try:
        run.store.wait()
    except UserError as error:
        reporter.event("unsaved", str(error), run.progress)


def save_at_end(run: Run, reporter: Reporter, validation: float | None) -> bool:
    """Save the last step, again and again for resilience.save_again seconds while that fails. Returns whether it is on
    the disk."""
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
            return True
        except UserError as error:
            reporter.event("unsaved", str(error), run.progress)
            run.saved_at = -1
        if broadcast_from_rank0(lambda: time.monotonic() >= end):
            return False
        time.sleep(BETWEEN_SAVES)


def rewind(run: Run, loader: Loader, reporter: Reporter, plan: StepPlan, why: str) -> None:
    """Go back to the newest checkpoint, and on from there with the samples after this step's. Raises UserError when
    that does not help. (PaLM, arXiv 2204.02311, from a secondary source: 100 steps back, past 200 to 500 batches.)"""
    run.engine.zero()
    run.rewinds += 1
    loader.forget()
    wait_for_save(run, reporter)
    oldest_first = broadcast_from_rank0(lambda: [path.name for path in checkpoint.complete_without_links(run.folder)])
    paths = [run.folder / name for name in oldest_first[::-1]]
    if not paths or run.rewinds > MOST_REWINDS:
        what = f"and {MOST_REWINDS} rewinds did not help" if paths else "and no checkpoint could be written"
        raise UserError(
            f"{why} at step {plan.step}, {what}; lower optimizer.lr = {run.config.optimizer.lr:g}, or set "
            "resilience.spikes=skip"
        )
    path, taken, refused = go_back(run, paths)
    passed_over = [run.progress.samples, plan.first_sample + plan.global_batch - 1]
    run.progress = replace(run.progress, samples=passed_over[1] + 1)
    told = f"to {path}, and past samples {passed_over[0]} to {passed_over[1]}, because {why}"
    reporter.began("rewound", told, run, taken)
    for each in refused:
        reporter.event("refused", each, run.progress)


def check(run: Run, watchdog: Watchdog, reporter: Reporter) -> None:
    """Compare the ranks: copied weights, which must be equal, and how much of their time they wait for one another.
    Raises Fault."""
    check_copies(run.engine.weights, run.engine.rows, run.mesh)
    slow = watchdog.slow_ranks(run.mesh.rank("pp"))
    if slow is None:
        return
    if slow.keys() - run.slow:
        reporter.event("straggler", "; ".join(slow.values()), run.progress, ranks=list(slow))
    run.slow = set(slow)
