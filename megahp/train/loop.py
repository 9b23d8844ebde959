"""The training loop: every step of training is a line of `train`, in order.

An Engine sums a step's gradients; a Trainer makes a step of it, with optimizer, masks and the next batch; a Run is a
trainer with its data, its directory and checkpoints.
"""

import time
from functools import partial

import torch.distributed as dist

from megahp.config import Config
from megahp.data.loader import MIXTURE, Loader
from megahp.faults.notice import Notice
from megahp.faults.watchdog import Watchdog
from megahp.launch import World
from megahp.parallel.device import claim_device
from megahp.parallel.layout import Layout
from megahp.parallel.mesh import make_mesh
from megahp.scaling.batch import StepPlan
from megahp.train import recovery
from megahp.train.auto_settings import resolve_auto
from megahp.train.prepare import open_data
from megahp.train.reporter import Reporter
from megahp.train.run import Run
from megahp.train.start import start
from megahp.train.trainer import Step
from megahp.train.validation import baselines, validate


def train(config: Config, world: World, store: dist.Store, layout: Layout, resume: bool) -> bool:
    """Train a prepared config as one of its ranks, from the newest checkpoint if resuming.

    Returns whether the run is finished: False when it was stopped early, or its last step could not be saved.
    """
    start_time = time.monotonic()
    run, loader, reporter, is_new = begin(config, world, layout, resume)
    config, data = run.config, run.data
    # Until here a signal ends the process. From here on it is recorded, and the step is finished and saved. All ranks
    # must switch together: otherwise a signal could end rank 0 while the others record it and wait for rank 0.
    dist.barrier()
    notice = Notice(config.resilience.stop_after, start_time)
    plan = run.next_step()
    validation: dict[str, float] = {}
    watchdog = Watchdog(store, config.resilience.hang_after, config.directory)
    with reporter.display_progress(run.progress), watchdog:  # each alive() restarts the limit of hang_after seconds
        if config.train.validate_first and is_new:
            reporter.first_validation(run, validate(run, data))
            watchdog.alive(run.progress.step)
        while plan:
            step_start = time.monotonic()
            if run.enter_phase(plan):
                reporter.phase(run, plan)
            # backward is in Engine.forward_backward; clip and optimizer step in Trainer.update; zero_grad in advance
            computing = partial(compute, run, loader, plan, notice.given)
            step, decision = recovery.compute_with_retry(computing, run, plan, reporter)
            if step.measured.wrong_samples:
                recovery.report_wrong_samples(run, reporter, plan)
            if decision.action == "rewind":
                del step  # or its gradients would lie in memory beside what is loaded
                recovery.rewind(run, loader, reporter, plan, decision.reason)
                watchdog.alive(run.progress.step)
                plan = run.next_step()
                continue

            measured, updated = step.measured, decision.action == "update"
            if updated:
                run.update(step, plan)
            else:
                recovery.skip(run, reporter, plan, measured, decision.reason)
            del step  # or its gradients would survive engine.zero, and lie in memory beside the next ones
            # Calibrate before `advance`, on the first unused sample, with the updated weights.
            if run.batch_scheduler.is_calibration_step(plan.step) and (example := run.example(loader, plan)):
                run.calibrate(example, plan)
            change, mask_change = run.advance(plan, measured, updated)
            next_plan = run.next_step()
            step_seconds = time.monotonic() - step_start  # without validation, checks and saves

            # validation comes before saving: a checkpoint holds its validation loss, for checkpoint.keep_best
            is_last = next_plan is None
            validation = validate(run, data) if run.is_due(config.train.validate_every, is_last) else {}
            watchdog.alive(run.progress.step)
            reporter.step(run, plan, measured, change, mask_change, step_seconds, validation, skipped=not updated)
            check_and_save(run, reporter, watchdog, validation.get(MIXTURE), is_last)
            plan = next_plan
            # stop_requested was all-reduced with the gradients' norms, so that all ranks stop after the same step
            if measured.stop_requested or run.is_outgrown:
                break
    loader.close()
    return finish(run, reporter, notice, validation.get(MIXTURE), is_over=plan is None)


def begin(config: Config, world: World, layout: Layout, resume: bool) -> tuple[Run, Loader, Reporter, bool]:
    """Build this rank's part of a run, from the newest checkpoint if resuming. Returns also whether the run is new."""
    mesh = make_mesh(layout, claim_device(config, world))
    config, decisions = resolve_auto(config, mesh, world, resume)
    reporter = Reporter(config)  # locks the run directory: a second run on it ends here, before a model is built
    data = open_data(config)
    loader = Loader(data, mesh.device, config.data.mask_documents)
    run = Run(config, mesh, data)
    is_new = start(run, reporter, resume)
    for line in decisions:
        reporter.event("settled", line, run.progress)
    return run, loader, reporter, is_new


def compute(run: Run, loader: Loader, plan: StepPlan, stop_requested: bool) -> Step:
    """Compute one step's gradients on the run's own data. A module-level function, so that tests can inject faults."""
    return run.compute(run.microbatches(loader, plan), plan, stop_requested)


def check_and_save(
    run: Run, reporter: Reporter, watchdog: Watchdog, validation_loss: float | None, is_last: bool
) -> None:
    """Compare the ranks' copies of weights, and begin to save a checkpoint, where a step is due for it."""
    if run.is_due(run.config.resilience.check_every, is_last):
        recovery.consistency_check(run, watchdog, reporter)
    if run.is_due(run.config.checkpoint.every, is_last):
        recovery.wait_for_save(run, reporter)  # one save at a time; that the last one failed does not end training
        run.save(validation_loss)
    watchdog.alive(run.progress.step)


def finish(run: Run, reporter: Reporter, notice: Notice, validation_loss: float | None, is_over: bool) -> bool:
    """Save the last step, log how the run ended, and close the log. Returns whether it is finished: over, and saved."""
    config, is_saved = run.config, recovery.save_at_end(run, reporter, validation_loss)
    is_finished = is_over and is_saved
    if is_finished:
        counts_tokens = config.log.baselines and not config.model.levels  # of series a loss is within a token's level
        if dist.get_rank() == 0 and counts_tokens and config.train.validation_samples:
            reporter.baselines(*baselines(config, run.data))
        reason = "the token budget or train.steps is reached"
        reporter.event("finished", reason, run.progress, skipped=run.skipped, epochs=run.epochs())
    else:
        reason = notice.reason or "another rank was asked to stop"
        if not is_saved:
            reason = "the newest checkpoint is older than the last step"
        elif run.is_outgrown:
            reason = f"the global batch has grown to resilience.stop_at_batch = {config.resilience.stop_at_batch}"
        reporter.event("stopped", reason, run.progress, saved=is_saved, epochs=run.epochs())
    reporter.close()
    return is_finished
