"""A run's state: everything that is opened before the first step and kept for the next start."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from megahp import checkpoint
from megahp.config import Config, config_to_dict, resolve
from megahp.data.loader import TrainingData
from megahp.errors import UserError
from megahp.faults.copies import check_copies
from megahp.faults.spikes import Spikes
from megahp.files import read_toml, refuse_links
from megahp.log.wandb_log import new_id
from megahp.parallel.layout import Layout
from megahp.parallel.mesh import Mesh
from megahp.parallel.messages import on_rank0
from megahp.scaling.batch import BatchScheduler, Change, Progress, StepPlan
from megahp.scaling.noise_scale import NoiseScale
from megahp.scaling.parameterization import table_of
from megahp.train.prepare import initial_batch_state
from megahp.train.step import LossScale, initial_loss_scale
from megahp.train.trainer import Trainer

T = TypeVar("T")


@dataclass(frozen=True)
class Restored:
    """What a start took over."""

    config: Mapping[str, Mapping[str, Any]] | None  # of the run that wrote the checkpoint; None = there is none
    batch_scheduler: Mapping[str, Any]  # the state the batch plan went on from
    changes: Sequence[Change] = ()  # of the batch that came of it
    anew: Sequence[str] = ()  # sources whose samples begin at the beginning


class Run(Trainer):
    """A trainer with its data, a directory and what outlives a start: what a checkpoint holds."""

    def __init__(self, config: Config, mesh: Mesh, data: TrainingData) -> None:
        super().__init__(config, mesh)
        self.data = data
        self.skipped = self.skipped_in_a_row = self.rewinds = 0
        self.spikes = Spikes(config.resilience)
        self.slow: set[int] = set()  # ranks that hold up others, as told
        self.saved_at = -1  # step
        self.wandb_id = new_id()
        self.store = checkpoint.Store(self.folder, config.checkpoint)

    @property
    def folder(self) -> Path:
        return self.config.directory / "checkpoints"

    @property
    def is_outgrown(self) -> bool:
        """Whether the batch has grown to where the run goes on on more ranks."""
        return 0 < self.config.resilience.stop_at_batch <= self.batch_scheduler.batch

    def is_due(self, every: int, over: bool) -> bool:
        """Whether something done every so many steps (0 = at the end only) is due after this one. over: it is the
        last."""
        return over or (every > 0 and self.progress.step % every == 0)

    def save(self, validation_loss: float | None) -> None:
        """Begin to write a checkpoint of this moment, from all ranks. Raises UserError when that before it could not be
        written."""
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
            "data_order": self.data.state(self.progress.samples),
            "layout": asdict(self.mesh.layout),
            "validation_loss": validation_loss,
        }
        self.saved_at, self.rewinds = self.progress.step, 0
        check_copies(self.engine.weights, self.engine.rows, self.mesh)
        self.store.begin(self.progress.step, self._tensors(), state)

    def restore(self, path: checkpoint.Location) -> Restored:
        """Become what was saved, on this layout. Raises UserError."""
        state = self._load(path)
        if state["data"] != self.data.fingerprint:
            raise UserError(
                f"the data of {', '.join(self.config.data.train)} is not what {path} was trained on; "
                "restore those files, or start a new run under another log.name"
            )
        self.data.restore(state["data_order"])
        self.skipped, self.wandb_id = state["skipped"], state["wandb_id"]
        return Restored(
            state["config"], state["batch_plan"], self.batch_scheduler.load_state(state["batch_plan"], self.progress)
        )

    def branch(self, path: checkpoint.Location) -> Restored:
        """Take over weights, moments, averages and progress, and go on under this run's own settings: with its data,
        each source from where it stands, and its batch plan. What is set as before goes on as before; moments begin
        anew where other weights are trained than before. Raises UserError."""
        state = self._load(path)
        saved = resolve.from_dict(state["config"], str(path))
        anew: list[str] = []
        if state["data"] == self.data.fingerprint:
            self.data.restore(state["data_order"])
        else:
            anew = self.data.branch(state["data_order"], self.progress.tokens, self.progress.samples)
        if state["data_order"]["length"] != self.data.length:
            self.reset_noise()
        plan = initial_batch_state(self.config, saved, state, self.batch_scheduler)
        return Restored(state["config"], plan, self.batch_scheduler.load_state(plan, self.progress), anew)

    def enter_phase(self, plan: StepPlan) -> bool:
        """Whether this step is the first of another stage of the data, which is then entered."""
        if plan.phase == self.data.phase:
            return False
        if plan.length != self.data.length:
            self.reset_noise()
        self.data.enter(plan.phase, plan.first_sample)
        return True

    def _load(self, path: checkpoint.Location) -> dict[str, Any]:
        """Weights, moments, progress and averages of a checkpoint. Returns its JSON state."""
        state = broadcast_from_rank0(lambda: checkpoint.read_state(path))
        if state["table"] != self.table.to_dict():
            raise UserError(
                f"the parameterization table of this megahp differs from the one in {path}; "
                "go on with the version that wrote it"
            )
        before = resolve.from_dict(state["config"], str(path)).train.weights
        # AdamW corrects all moments by one count of updates, so all are of as many
        updates = state["updates"] if self.config.train.weights == before else 0
        # before the first update moments are 0, and what comes from elsewhere has none
        checkpoint.load(path, self._tensors() if updates else self.engine.saved | self.masks.state())
        self.masks.measure()
        self.progress = Progress(**state["progress"])
        self.saved_at = self.progress.step
        self.optimizer.updates = updates
        self.loss_scale = LossScale(**state["loss_scale"])
        self.spikes.load_state(state["spikes"])
        if self.config.train.noise_scale:
            self.noise.restore(state["noise_scale"])
        return state

    def _tensors(self) -> dict[str, torch.Tensor]:
        return self.engine.saved | self.optimizer.state() | self.masks.state()


def state_of_weights(config: Config) -> dict[str, Any]:
    """The JSON part of a checkpoint that holds weights, and masks, and nothing of a run: one before its first step,
    that has seen no data."""
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


def broadcast_from_rank0(look: Callable[[], T]) -> T:
    """What the first rank finds, as JSON, or its error, on every rank: a shared file system may show them different
    things."""
    return on_rank0(look, kinds=(checkpoint.DamagedError, checkpoint.UnreadableError, UserError))


def is_rank0() -> bool:
    """Whether this is the rank that writes and speaks."""
    return dist.get_rank() == 0


def read_config(directory: Path) -> Config:
    """The resolved settings in a run directory. Raises UserError."""
    refuse_links(directory)
    path = directory / "config.toml"
    return resolve.from_dict(
        read_toml(path, "run settings", "name a run directory, such as runs/quickstart"), str(path)
    )
