"""What a run tells the world: its directory, its logs, its progress display. Only the first rank speaks."""

import contextlib
import fcntl
import json
import math
import os
import socket
from pathlib import Path
from typing import IO, Any

from megahp.config import Config, config_to_dict, config_to_toml
from megahp.errors import UserError, masked
from megahp.files import open_unlinked, refuse_links
from megahp.log.events import GONE_BACK
from megahp.log.metrics import Record, RunLog
from megahp.log.progress import ProgressDisplay
from megahp.log.wandb_log import WandbLog
from megahp.scaling.batch import Change, Progress, StepPlan
from megahp.train.masks import MaskChange
from megahp.train.prepare import changes
from megahp.train.run import Restored, Run, is_rank0
from megahp.train.step import Measurement


class Reporter:
    """Writes the run directory and shows progress, on the first rank; the others' calls do nothing.

    Raises UserError when another process writes there, or nobody can.
    """

    def __init__(self, config: Config) -> None:
        self.config = config
        self.log: RunLog | None = None
        self.wandb: WandbLog | None = None
        self.display: ProgressDisplay | None = None
        self.lock = _lock(config.directory) if is_rank0() else None

    @contextlib.contextmanager
    def showing(self, progress: Progress) -> Any:
        """A progress display for the time of training."""
        if self.log is None:
            yield
            return
        try:
            with ProgressDisplay(self.config.train.tokens, progress.tokens) as self.display:
                yield
        except BaseException:
            self.close()  # what is logged arrives, whatever ends the run
            raise
        finally:
            self.display = None

    def event(self, event: str, why: str, progress: Progress, **inputs: Any) -> None:
        """Log something that happened, and why, and show it. TensorBoard and W&B get the words too, masked here."""
        why = masked(why)
        if self.log:
            details = {"step": progress.step, "tokens": progress.tokens, **inputs}
            self.log.event(event, **{"reason": why, **details})
            self.say(f"{event}: {why}")
        if self.wandb:
            self.wandb.event(event, why, progress.step)

    def began(self, event: str, why: str, run: Run, taken: Restored) -> None:
        """Log a start (event: started, branched, resumed, rewound), with all that decides what follows, so that it can
        be replayed. Steps logged beyond a checkpoint of the run's own will be taken again, so their lines go."""
        if kept := self._open(run, run.progress.step if event in GONE_BACK else None):
            why = f"{why}; what was logged before it, by a run without a checkpoint left, is kept in {kept.name}"
        changed = changes(run.config, taken.config) if taken.config else {}
        self.event(
            event,
            why,
            run.progress,
            samples=run.progress.samples,
            batch_plan=taken.batch_scheduler,  # the key in events.jsonl, which replay reads
            changed={key: {"before": before, "now": now} for key, (before, now) in changed.items()},
            layout=vars(run.mesh.layout),
            config=config_to_dict(self.config),
        )

    def phase(self, run: Run, plan: StepPlan) -> None:
        """Log that another stage of the data begins."""
        weights = run.data.phases[plan.phase].weights
        shares = ", ".join(f"{weight / sum(weights):.3g}" for weight in weights)
        reads = f"batches of {plan.global_batch} sequences of {plan.length} tokens, the sources' shares {shares}"
        self.event("stage", reads, run.progress, stage=plan.phase, length=plan.length, weights=weights)

    def step(
        self,
        run: Run,
        plan: StepPlan,
        measured: Measurement,
        change: Change | None,
        masked: MaskChange | None,
        seconds: float,
        validation: float | None,
        skipped: bool,
    ) -> None:
        """Log and show one step, if it is one of those logged, and what it changed."""
        step = run.progress.step
        due = (
            step % self.config.log.every == 0
            or run.batch_scheduler.is_decision_step(step)
            or change
            or masked
            or validation is not None
        )
        if self.log and due:
            record = _record(run, plan, measured, seconds, validation, skipped)
            self.log.metrics(record)
            if self.wandb:
                self.wandb.metrics(record)
            if self.display:
                self.display.update(record)
        if change:
            self.event("batch", change.reason, run.progress, **change.to_dict())
        if masked:
            self.event("masks", masked.reason, run.progress, **vars(masked))

    def say(self, text: str) -> None:
        """Show a line."""
        if self.display:
            self.display.message(masked(text))
        elif self.log:
            print(masked(text), flush=True)

    def baselines(self, unigram: float, bigram: float) -> None:
        """Keep what the simplest models lose on the same validation tokens, in nats per token."""
        if self.log:
            _write(self.config.directory / "baselines.json", json.dumps({"unigram": unigram, "bigram": bigram}))

    def close(self) -> None:
        if self.wandb:
            self.wandb.close()
        if self.log:
            self.log.close()

    def _open(self, run: Run, step: int | None) -> Path | None:
        """Begin to write, after all that could refuse the run. step: what was logged beyond it is taken back; None
        where the run begins. Returns the file that older metrics are kept in."""
        if self.log:
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
            self.wandb = WandbLog(log.wandb, log.wandb_project, log.name, directory, run.wandb_id, config, self.say)
        return kept


def _record(
    run: Run, plan: StepPlan, measured: Measurement, seconds: float, validation: float | None, skipped: bool
) -> Record:
    numbers = run.noise.numbers()
    noise = numbers["noise_scale"]
    # at the step that reaches sequences of another length the policy has seen nothing of them
    seen = numbers[run.batch_scheduler.sees] if run.batch_scheduler.length == plan.length else None
    record: Record = {
        "step": run.progress.step,
        "tokens": run.progress.tokens,
        "samples": run.progress.samples,
        "loss": measured.loss,
        "lr": plan.lr,
        "weight_decay": plan.weight_decay,
        "global_batch": plan.global_batch,
        "batch_target": run.batch_scheduler.aim(run.progress, seen),
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
    if validation is not None:
        record["validation_loss"] = validation
    return record


def _lock(directory: Path) -> IO[str]:
    """A lock on the run directory that ends with this process."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        refuse_links(directory)
        file = open_unlinked(directory / ".lock", "a+")
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
    """Replace a small file in one step, so that a reader or a crash never meets half of it."""
    part = path.with_suffix(path.suffix + ".part")
    with open_unlinked(part, "w") as file:
        file.write(text)
    part.replace(path)
