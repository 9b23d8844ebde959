"""What a run writes and shows: its directory, logs and progress display. Only rank 0 does."""

import contextlib
import fcntl
import json
import math
import os
import socket
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import torch.distributed as dist

from megahp.config import Config, config_to_dict, config_to_toml
from megahp.data.loader import MIXTURE
from megahp.errors import UserError, masked
from megahp.files import open_unlinked, refuse_links
from megahp.log.events import GONE_BACK
from megahp.log.metrics import Record, RunLog
from megahp.log.progress import ProgressDisplay
from megahp.log.wandb_log import WandbLog
from megahp.scaling.batch import Change, Progress, StepPlan
from megahp.train.engine import Measurement
from megahp.train.masks import MaskChange
from megahp.train.prepare import changes
from megahp.train.run import Restored, Run


class Reporter:
    """Writes the run directory and shows progress, on rank 0; on other ranks its methods do nothing.

    Raises UserError when another process writes there, or nobody can.
    """

    def __init__(self, config: Config) -> None:
        self.config = config
        self.log: RunLog | None = None
        self.wandb: WandbLog | None = None
        self.display: ProgressDisplay | None = None
        self.lock = _lock(config.directory) if dist.get_rank() == 0 else None

    @contextlib.contextmanager
    def display_progress(self, progress: Progress) -> Iterator[None]:
        """Show a progress display during training."""
        if self.log is None:
            yield
            return
        try:
            with ProgressDisplay(self.config.train.tokens, progress.tokens) as self.display:
                yield
        except BaseException:
            self.close()  # what is buffered for TensorBoard and W&B arrives, whatever ends the run
            raise
        finally:
            self.display = None

    def event(self, event: str, reason: str, progress: Progress, /, **details: Any) -> None:
        """Log and show an event. TensorBoard and W&B get the reason too, with passwords masked here."""
        reason = masked(reason)
        if self.log:
            # details may hold a reason of their own, as a Change does: that one is logged
            self.log.event(event, **{"reason": reason, "step": progress.step, "tokens": progress.tokens, **details})
            self.message(f"{event}: {reason}")
        if self.wandb:
            self.wandb.event(event, reason, progress.step)

    def start(self, event: str, reason: str, run: Run, restored: Restored) -> None:
        """Log a start (event: started, branched, resumed, rewound), with everything that decides what follows, so that
        it can be replayed."""
        # steps logged beyond a checkpoint of the run's own are about to be repeated, so their lines are dropped
        if kept := self._open(run, run.progress.step if event in GONE_BACK else None):
            reason = f"{reason}; what was logged before it, by a run without a checkpoint left, is kept in {kept.name}"
        changed = changes(run.config, restored.config) if restored.config else {}
        validation = run.data.validation_quotas(run.config.train.validation_samples)
        if event in ("started", "branched") and any(validation.values()):
            of = ", ".join(f"{count} of {prefix}" for prefix, count in validation.items())
            reason = f"{reason}; validated on {of}"
        self.event(
            event,
            reason,
            run.progress,
            samples=run.progress.samples,
            batch_plan=restored.batch_state,
            validation=validation,
            changed={key: {"before": before, "now": now} for key, (before, now) in changed.items()},
            layout=vars(run.mesh.layout),
            config=config_to_dict(self.config),
        )

    def phase(self, run: Run, plan: StepPlan) -> None:
        """Log that a new phase of the data begins. The event is called "stage", as in older logs."""
        weights = run.data.phases[plan.phase].weights
        shares = ", ".join(f"{weight / sum(weights):.3g}" for weight in weights)
        reason = f"batches of {plan.global_batch} sequences of {plan.length} tokens, the sources' shares {shares}"
        self.event("stage", reason, run.progress, stage=plan.phase, length=plan.length, weights=weights)

    def step(
        self,
        run: Run,
        plan: StepPlan,
        measured: Measurement,
        change: Change | None,
        mask_change: MaskChange | None,
        seconds: float,
        validation: Mapping[str, float],
        skipped: bool,
    ) -> None:
        """Log and show a step, if it is due, and what it changed."""
        step = run.progress.step
        is_due = (
            step % self.config.log.every == 0
            or run.batch_scheduler.is_decision_step(step)  # or `megahp replay` could not make its decision again
            or change
            or mask_change
            or validation
        )
        if self.log and is_due:
            record = _record(run, plan, measured, seconds, validation, skipped)
            self.log.metrics(record)
            if self.wandb:
                self.wandb.metrics(record)
            if self.display:
                self.display.update(record)
        if change:
            self.event("batch", change.reason, run.progress, **change.to_dict())
        if mask_change:
            self.event("masks", mask_change.reason, run.progress, **vars(mask_change))

    def first_validation(self, run: Run, losses: Mapping[str, float]) -> None:
        """Log the validation before the first step, as a line of metrics without a loss of training."""
        if self.log:
            start = {"step": run.progress.step, "tokens": run.progress.tokens, "samples": run.progress.samples}
            self.log.metrics(record := {**start, **_validation(losses)})
            if self.wandb:
                self.wandb.metrics(record)
            self.message(f"validation loss before the first step: {losses[MIXTURE]:.4f}")

    def message(self, text: str) -> None:
        """Print a line, above the progress bar if there is one. To stdout: it is what the command is run for."""
        if self.display:
            self.display.message(masked(text))
        elif self.log:
            print(masked(text), flush=True)

    def baselines(self, unigram: float, bigram: float) -> None:
        """Write baselines.json: the n-gram models' losses on the validation samples, nats per token."""
        if self.log:
            _write(self.config.directory / "baselines.json", json.dumps({"unigram": unigram, "bigram": bigram}))

    def close(self) -> None:
        if self.wandb:
            self.wandb.close()
        if self.log:
            self.log.close()

    def _open(self, run: Run, step: int | None) -> Path | None:
        """Open the logs, after everything that could refuse the run. Returns the file that older metrics are kept in.

        step: metrics beyond it are dropped; None for a new run.
        """
        if self.log:  # a rewind
            self.log.resume(step or 0)
            return None
        if not self.lock:
            return None
        directory, kept = self.config.directory, None
        try:
            self.log = RunLog(directory, self.config.log.tensorboard)
            if step is None:
                kept = self.log.begin_again()
            else:
                self.log.resume(step)
            _write(directory / "config.toml", config_to_toml(self.config))
        except OSError as error:
            raise UserError(f"{directory} cannot be written ({error.strerror}); make it writable") from None
        if (log := self.config.log).wandb != "off":
            config = config_to_dict(self.config)
            self.wandb = WandbLog(log.wandb, log.wandb_project, log.name, directory, run.wandb_id, config, self.message)
        return kept


def _record(
    run: Run, plan: StepPlan, measured: Measurement, seconds: float, validation: Mapping[str, float], skipped: bool
) -> Record:
    """Return the metrics of a step, as a line of metrics.jsonl holds them."""
    numbers = run.noise.numbers()
    noise = numbers["noise_scale"]
    # after the last step of a phase the scheduler is at the next one's length, of which nothing was measured yet
    seen = numbers[run.batch_scheduler.noise_key] if run.batch_scheduler.length == plan.length else None
    record: Record = {
        "step": run.progress.step,
        "tokens": run.progress.tokens,
        "samples": run.progress.samples,
        "loss": measured.loss,
        "lr": plan.lr,
        "weight_decay": plan.weight_decay,
        "global_batch": plan.global_batch,
        "batch_target": run.batch_scheduler.target(run.progress, seen),
        "grad_norm": measured.grad_norm,
        "grad_sq_example": sum(measured.grad_sq_example.values()) if measured.grad_sq_example else None,
        "grad_sq_batch": sum(measured.grad_sq_batch.values()) if measured.grad_sq_batch else None,
        **numbers,
        "noise_scale_tokens": noise * plan.length if noise else None,
        "noise_scale_layers": {name: average.ratio for name, average in run.noise.layers.items()},
        "tokens_per_second": plan.tokens / seconds,
        "step_seconds": seconds,
    }
    for bound, sequences in run.batch_scheduler.bounds(run.progress, seen).items():
        record[f"batch_bound_{bound}"] = sequences if math.isfinite(sequences) else None
    if measured.load:
        record["expert_load_max"] = {name: (load.max() / load.mean()).item() for name, load in measured.load.items()}
        record["expert_load_cv"] = {
            name: (load.std(correction=0) / load.mean()).item() for name, load in measured.load.items()
        }
        record["balance_loss"] = measured.balance_loss
    if run.config.sparsity.method != "none":
        record["density"] = run.masks.density
    if skipped:
        record["skipped"] = True
    if len(run.data.datasets) > 1:  # of one source it is tokens over its tokens
        record["epochs"] = run.epochs()
    return record | _validation(validation)


def _validation(losses: Mapping[str, float]) -> Record:
    """Return the part of a record that holds validation losses: the mixture's, and those of its parts if any."""
    parts = {name: loss for name, loss in losses.items() if name != MIXTURE}
    found = {"validation_loss": losses[MIXTURE]} if losses else {}
    return {**found, "validation_losses": parts} if parts else found


def _lock(directory: Path) -> IO[str]:
    """Lock the run directory until this process ends, in whatever way. Raises UserError when it is locked."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        refuse_links(directory)
        file = open_unlinked(directory / ".lock", "a+")  # not "w": it must not lose its owner's name yet
    except OSError as error:
        raise UserError(f"{directory} cannot be written ({error.strerror}); choose another log.root") from None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        owner = file.read() or "another run"
        raise UserError(f"{directory} is in use by {owner}; wait for its end, or choose another log.name") from None
    except OSError:  # a file system without locks
        pass
    file.truncate(0)
    job = f", Slurm job {os.environ['SLURM_JOB_ID']}" if "SLURM_JOB_ID" in os.environ else ""
    file.write(f"process {os.getpid()} on {socket.gethostname()}{job}")
    file.flush()
    return file


def _write(path: Path, text: str) -> None:
    """Replace a small file by one rename, so that a reader or a crash never meets half of it."""
    part = path.with_suffix(path.suffix + ".part")
    with open_unlinked(part, "w") as file:
        file.write(text)
    part.replace(path)
