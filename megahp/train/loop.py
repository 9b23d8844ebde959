"""Training, from the first line to the last: each thing a step does is a line of `train`, in order."""

import time
from functools import partial

import torch.distributed as dist

from megahp.config import Config
from megahp.data.loader import Loader
from megahp.faults.notice import Notice
from megahp.faults.watchdog import Watchdog
from megahp.launch import World
from megahp.parallel.device import device_of
from megahp.parallel.layout import Layout
from megahp.parallel.mesh import make_mesh
from megahp.scaling.batch import StepPlan
from megahp.train.prepare import open_data
from megahp.train.recovery import check, compute_with_retry, rewind, save_at_end, skip, wait_for_save
from megahp.train.reporter import Reporter
from megahp.train.run import Run, is_rank0
from megahp.train.start import start
from megahp.train.trainer import Step
from megahp.train.validation import baselines, validate


def train(config: Config, place: World, store: dist.Store, layout: Layout, resume: bool) -> bool:
    """Run, or go on with, the run of these prepared settings, as one of its ranks. Returns whether it is finished:
    False when it was told to leave before, or its end could not be saved."""
    began = time.monotonic()
    mesh = make_mesh(layout, device_of(config, place))
    reporter = Reporter(config)
    data = open_data(config)
    loader = Loader(data, mesh.device, config.data.mask_documents)
    run = Run(config, mesh, data)
    start(run, reporter, resume)
    dist.barrier()  # or a signal would end the first rank, which has begun the logs, and be noted by the others
    notice = Notice(config.resilience.stop_after, began)

    plan = run.next_step()
    watchdog = Watchdog(store, config.resilience.hang_after, config.directory)
    validation = None
    with reporter.showing(run.progress), watchdog:
        while plan:
            began = time.monotonic()
            if run.enter_phase(plan):
                reporter.phase(run, plan)
            step, verdict = compute_with_retry(partial(compute, run, loader, plan, notice.given), run, plan, reporter)
            if verdict.action == "rewind":
                rewind(run, loader, reporter, plan, verdict.reason)
                watchdog.alive(run.progress.step)
                plan = run.next_step()
                continue
            updated, measured = verdict.action == "update", step.measured
            if updated:
                run.update(step, plan)
                run.skipped_in_a_row = 0
            else:
                skip(run, reporter, plan, measured, verdict.reason)
            del step  # or its gradients would lie in memory beside the next one's
            if run.batch_scheduler.is_calibration_step(plan.step) and (example := run.example(loader, plan)):
                run.calibrate(example, plan)
            change, masked = run.advance(plan, measured, updated)
            following = run.next_step()
            seconds, over = time.monotonic() - began, following is None
            validation = validate(run, data) if run.is_due(config.train.validate_every, over) else None
            watchdog.alive(run.progress.step)
            reporter.step(run, plan, measured, change, masked, seconds, validation, skipped=not updated)
            if run.is_due(config.resilience.check_every, over):
                check(run, watchdog, reporter)
            if run.is_due(config.checkpoint.every, over):
                wait_for_save(run, reporter)
                run.save(validation)
            watchdog.alive(run.progress.step)
            plan = following
            if measured.stop_requested or run.is_outgrown:
                break

    loader.close()
    is_saved = save_at_end(run, reporter, validation)
    if plan or not is_saved:
        why = why_stopped(run, notice) if is_saved else "the newest checkpoint is older than the last step"
        reporter.event("stopped", why, run.progress, saved=is_saved)
    else:
        if is_rank0() and config.log.baselines and config.train.validation_samples:
            reporter.baselines(*baselines(config, data))
        reporter.event("finished", "the token budget or train.steps is reached", run.progress, skipped=run.skipped)
    reporter.close()
    return plan is None and is_saved


def compute(run: Run, loader: Loader, plan: StepPlan, stop_requested: bool) -> Step:
    """One step's gradients from the run's own data: forward, backward, measured."""
    return run.compute(run.microbatches(loader, plan), plan, stop_requested)


def why_stopped(run: Run, notice: Notice) -> str:
    if run.is_outgrown:
        return f"the global batch has grown to resilience.stop_at_batch = {run.config.resilience.stop_at_batch}"
    return notice.why or "another rank was told to leave"
