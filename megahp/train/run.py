"""A run's state: all that exists before the first step, and all that a checkpoint keeps for the next start."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

from megahp import checkpoint
from megahp.config import Config, config_to_dict, resolve
from megahp.data.loader import TrainingData
from megahp.errors import UserError
from megahp.faults.copies import check_copies
from megahp.faults.spikes import Spikes
from megahp.log.wandb_log import new_id
from megahp.parallel.layout import Layout
from megahp.parallel.mesh import Mesh
from megahp.parallel.messages import on_rank0
from megahp.parallel.parameters import storage
from megahp.scaling.batch import BatchScheduler, Change, Progress, StepPlan
from megahp.scaling.noise_scale import NoiseScale
from megahp.scaling.parameterization import table_of
from megahp.train.engine import LossScale, initial_loss_scale
from megahp.train.prepare import initial_batch_state
from megahp.train.trainer import Step, Trainer

T = TypeVar("T")


@dataclass(frozen=True)
class Restored:
    """State restored at start."""

    config: Mapping[str, Mapping[str, Any]] | None  # of the run that wrote the checkpoint; None without a checkpoint
    batch_state: Mapping[str, Any]  # what the batch scheduler was given
    changes: Sequence[Change] = ()  # of the batch, which that state led to at once
    restarted_sources: Sequence[str] = ()  # data that is read from its beginning
    changed_data: Sequence[str] = ()  # prefixes, some of whose tokens are others than before


class Run(Trainer):
    """A trainer with its data, its directory, and the state that survives a process: that of a checkpoint."""

    def __init__(self, config: Config, mesh: Mesh, data: TrainingData) -> None:
        super().__init__(config, mesh)
        self.data = data
        self.skipped = self.skipped_in_a_row = self.rewinds = 0  # rewinds: since the last save
        self.cause_located = False  # of the present row of steps that are not finite
        self.spikes = Spikes(config.resilience)
        self.slow: set[int] = set()  # ranks reported as stragglers
        self.saved_at = -1  # step
        self.wandb_id = new_id()
        self.store = checkpoint.Store(self.folder, config.checkpoint)

    @property
    def folder(self) -> Path:
        return self.config.directory / "checkpoints"

    @property
    def is_outgrown(self) -> bool:
        """Return whether the batch has grown to resilience.stop_at_batch, to continue on more ranks."""
        return 0 < self.config.resilience.stop_at_batch <= self.batch_scheduler.batch

    def epochs(self) -> dict[str, float]:
        """Return how many epochs of each source were read so far."""
        return self.data.epochs_read(self.progress.samples)

    def is_due(self, every: int, is_last: bool) -> bool:
        """Return whether something done every `every` steps (0 = at the end only) is due after this one."""
        return is_last or (every > 0 and self.progress.step % every == 0)

    def update(self, step: Step, plan: StepPlan) -> None:
        super().update(step, plan)
        self.skipped_in_a_row = 0

    def save(self, validation_loss: float | None) -> None:
        """Begin to write a checkpoint of this moment, from all ranks. Raises UserError when the one before it could
        not be written, and Fault when copies of a weight differ."""
        state = state_of_weights(self.config) | {
            "progress": asdict(self.progress),
            "skipped": self.skipped,
            "updates": self.optimizer.updates,
            "noise_scale": self.noise.state(),
            "batch_plan": self.batch_scheduler.state(),
            "loss_scale": vars(self.loss_scale),
            "spikes": self.spikes.state(),
            "wandb_id": self.wandb_id,
            "data": self.data.fingerprint,
            "sources": self.data.identities(),
            "data_order": self.data.state(self.progress.samples),
            "layout": asdict(self.mesh.layout),
            "validation_loss": validation_loss,
        }
        self.saved_at, self.rewinds = self.progress.step, 0
        check_copies(self.engine.weights, self.engine.rows, self.mesh)  # of which one is saved: never a wrong one
        self.store.begin(self.progress.step, self._tensors(), state)

    def restore(self, path: checkpoint.Location) -> Restored:
        """Load a checkpoint of this run onto the current layout. Raises DamagedError, or UserError."""
        state = self._load(path)
        changed_data = self.data.recognize(state.get("sources", ()))
        if state["data"] != self.data.fingerprint:
            changed = f"the data of {', '.join(self.config.data.train)} is not what {path} was trained on"
            raise UserError(f"{changed}; restore those files, or start a new run under another log.name")
        self.data.load_state(state["data_order"])
        self.skipped, self.wandb_id = state["skipped"], state["wandb_id"]
        changes = self.batch_scheduler.load_state(state["batch_plan"], self.progress)
        return Restored(state["config"], state["batch_plan"], changes, changed_data=changed_data)

    def branch(self, path: checkpoint.Location) -> Restored:
        """Start from another run's checkpoint, under this run's settings: load weights, moments, averages and progress,
        with this run's data, each source from where it was left, and this run's batch plan.

        What is set as it was there continues; moments start at 0 where other weights are trained, averages of the noise
        scale where sequences have another length. Raises DamagedError, or UserError.
        """
        state = self._load(path)
        saved = resolve.from_dict(state["config"], str(path))
        changed_data = self.data.recognize(state.get("sources", ()))
        restarted_sources: list[str] = []
        if state["data"] == self.data.fingerprint:
            self.data.load_state(state["data_order"])
        else:
            restarted_sources = self.data.branch(state["data_order"], self.progress.tokens, self.progress.samples)
        if state["data_order"]["length"] != self.data.length:
            self.reset_noise()
        batch_state = initial_batch_state(self.config, saved, state, self.batch_scheduler)
        changes = self.batch_scheduler.load_state(batch_state, self.progress)
        return Restored(state["config"], batch_state, changes, restarted_sources, changed_data)

    def enter_phase(self, plan: StepPlan) -> bool:
        """Enter the phase of the data that this step belongs to. Returns whether it is a new one."""
        if plan.phase == self.data.phase:
            return False
        if plan.length != self.data.length:
            self.reset_noise()
        self.data.enter_phase(plan.phase, plan.first_sample)
        return True

    def _load(self, path: checkpoint.Location) -> dict[str, Any]:
        """Load weights, moments, progress and averages of a checkpoint. Returns its JSON state."""
        state = broadcast_from_rank0(lambda: checkpoint.read_state(path))
        if not self.table.is_of(state["table"]):
            raise UserError(
                f"{path} has another parameterization table than this run; set [parameterization] back, or use the "
                "megahp that wrote it"
            )
        trained_before = resolve.from_dict(state["config"], str(path)).train.weights
        # AdamW corrects the bias of all moments by one count of updates, so all must have as many updates: where other
        # weights are trained than before, all start at 0
        updates = state["updates"] if self.config.train.weights == trained_before else 0
        # a checkpoint without updates may hold no moments: those of converted models do not
        checkpoint.load(path, self._tensors() if updates else self.engine.saved | self.masks.state())
        self.engine.loaded()
        if not updates:  # at a rewind, or after a damaged checkpoint, they are not 0
            for moments in self.optimizer.state().values():
                storage(moments).zero_()
        self.masks.recount()
        self.progress = Progress(**state["progress"])
        self.saved_at = self.progress.step
        self.optimizer.updates = updates
        self.loss_scale = LossScale(**state["loss_scale"])
        self.spikes.load_state(state["spikes"])
        if self.config.train.noise_scale:
            self.noise.load_state(state["noise_scale"])
        return state

    def _tensors(self) -> dict[str, torch.Tensor]:
        return self.engine.saved | self.optimizer.state() | self.masks.state()


def state_of_weights(config: Config) -> dict[str, Any]:
    """Return the JSON state of a checkpoint that holds weights and masks alone, as before a run's first step: no data
    read, no updates made."""
    return {
        "progress": asdict(Progress()),
        "skipped": 0,
        "updates": 0,
        "noise_scale": NoiseScale(1.0).state(),
        "batch_plan": BatchScheduler(config, 1).state(),
        "loss_scale": vars(initial_loss_scale(config.train.dtype)),
        "spikes": Spikes(config.resilience).state(),
        "wandb_id": new_id(),
        "data": None,
        "data_order": {"stage": 0, "first_sample": 0, "length": 0, "begins": {}, "taken": {}},
        "table": table_of(config).to_dict(),
        "layout": asdict(Layout()),
        "config": config_to_dict(config),
        "versions": {"torch": torch.__version__},
        "validation_loss": None,
    }


def broadcast_from_rank0(read: Callable[[], T]) -> T:
    """Return on every rank what `read` returns on rank 0 (JSON), or raise its error. Ranks must not read for
    themselves what they then decide by: a shared file system may show them different things."""
    return on_rank0(read, kinds=(checkpoint.DamagedError, checkpoint.UnreadableError, UserError))
