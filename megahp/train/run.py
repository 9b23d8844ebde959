"""A run's state and its directory: everything that is opened before the first step and kept for the next start."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist

from megahp import checkpoint, config, resolve
from megahp.config import Config, stages
from megahp.data.indexed import IndexedDataset
from megahp.data.loader import TrainingData
from megahp.data.tokenizer import Tokenizer, load_tokenizer
from megahp.errors import UserError
from megahp.model.build import build_model, longest
from megahp.ops.engines import fused_adam, linear_of, norm_of
from megahp.parallel.copies import check_copies
from megahp.parallel.layout import Layout
from megahp.parallel.mesh import WITHIN_STAGE, Mesh
from megahp.scaling.batch_size import BatchPlan, Change, Plan, Progress, least_batch, runnable, unit
from megahp.scaling.noise_scale import NoiseScale
from megahp.scaling.parameterization import table_of
from megahp.train.masks import Masks
from megahp.train.optimizer import make_optimizer
from megahp.train.spikes import Spikes
from megahp.train.step import FIRST_SCALE, Engine, LossScale
from megahp.train.wandb_log import check_wandb, new_id

T = TypeVar("T")

# What a run that starts from another's checkpoint may not change, by section or key, and what one that is resumed may
# not either. All else may, and the change is an event. Files may move: the data is known by its fingerprint.
FIXED = ("model", "parameterization", "train.dtype", "optimizer.name", "data.validation_fraction")
FIXED_ON_RESUME = (*FIXED, "sparsity", "data", "train.seed", "train.weights")
MOVABLE = ("data.train", "data.tokenizer", "data.cache", "model.balance_rate", "model.balance_loss")


def prepare(settings: Config, layout: Layout, ranks_here: int, resume: bool) -> Config:
    """Check, before anything is built or written, all that can be checked: batch and layout, tokenizer, run directory,
    and on resume that the run is the same one. Returns the settings with the vocabulary filled in. Raises UserError."""
    check_devices(settings, ranks_here)
    check_engines(settings)
    if settings.log.wandb != "off":
        check_wandb()
    if not settings.data.train:
        raise UserError("data.train is empty; name at least one prefix written by tools/preprocess_data.py")
    tokenizer = load_tokenizer(settings.data.tokenizer)
    check_tokenizer(settings, tokenizer)
    settings = with_vocabulary(settings, tokenizer)
    saved = checkpoint.first_whole(
        checkpoint.candidates(settings.directory / "checkpoints", settings.checkpoint.remote)
    )
    if settings.directory.exists() and not settings.directory.is_dir():
        raise UserError(f"{settings.directory} is a file; choose another log.name")
    if not resume and (saved or (settings.directory / "metrics.jsonl").exists()):
        raise UserError(
            f"{saved or settings.directory} is there already; go on with --resume auto, or choose another log.name"
        )
    if resume and saved:
        state = checkpoint.read_state(saved)
        refuse_changes(settings, state["config"], saved, FIXED_ON_RESUME)
        check_schedule(settings, state["progress"]["tokens"], saved)
        check_batch_to_go_on(settings, layout, state, saved)
    else:
        check_batch(settings, layout, settings.batch.global_batch)
        if settings.train.start_from:
            check_start(settings, layout, checkpoint.find(checkpoint.place(settings.train.start_from)))
    open_data(settings)
    return settings


def check_batch(settings: Config, layout: Layout, global_batch: int) -> None:
    """Raise UserError when the layout cannot run a global batch, of the run's beginning or of where it goes on, in
    every stage of the data."""
    batch, multiple, least = settings.batch, unit(settings, layout.dp), least_batch(settings, layout.dp)
    nearest = runnable(global_batch, multiple, least)
    if nearest != (global_batch,):
        of = f"data parallel {layout.dp} x batch.micro_batch {batch.micro_batch}"
        if layout.pp > 1:
            of += f", {layout.pp} pipeline stages kept busy by the {settings.parallel.schedule} schedule"
        if stages(settings.data)[1:]:
            of += ", in sequences of every length in data.lengths"
        wanted = f"below {least}" if global_batch < least else f"not a multiple of {multiple}"
        which = "batch.global_batch" if global_batch == batch.global_batch else "the global batch to go on with"
        raise UserError(
            f"{which} = {global_batch} is {wanted} ({of}); nearest that can be: {', '.join(map(str, nearest))}"
        )


def check_batch_to_go_on(settings: Config, layout: Layout, state: Mapping[str, Any], path: checkpoint.Place) -> None:
    """Raise UserError when the layout cannot run what becomes of a checkpoint's batch, or would soon be left again."""
    plan, stop_at, batch = (
        BatchPlan(settings, layout.dp),
        settings.resilience.stop_at_batch,
        state["batch_plan"]["batch"],
    )
    plan.go_on(state["batch_plan"], Progress(**state["progress"]))
    check_batch(settings, layout, plan.batch)
    if 0 < stop_at <= batch:
        raise UserError(
            f"resilience.stop_at_batch = {stop_at} is not above the batch of {path}, {batch}; raise it, or leave it out"
        )


def check_engines(settings: Config) -> None:
    """Raise UserError when an engine that is asked for is not installed, or cannot compute on the run's device."""
    if settings.compute.norms != "megahp":
        norm_of(settings.compute.norms, settings.model.norm)
    if settings.compute.fp8 != "none":
        linear_of(settings.compute.fp8, torch.device("cpu"), 16, 16)
    if settings.optimizer.engine == "apex":
        fused_adam()
    for key in ("compute.norms", "compute.fp8", "optimizer.engine"):
        if (engine := config.get(settings, key)) in ("apex", "transformer-engine") and not cuda_wanted(settings):
            raise UserError(f"{key} = {engine!r} computes on CUDA devices alone; train on one, or leave it out")


def check_start(settings: Config, layout: Layout, path: checkpoint.Place) -> None:
    """Raise UserError when a new run cannot go on from this checkpoint."""
    state = checkpoint.read_state(path)
    # a sparse run may become dense, what was masked then trained from 0 on (MediSwift, arXiv 2403.00952)
    fixed = FIXED if settings.sparsity.method == "none" else (*FIXED, "sparsity")
    refuse_changes(settings, state["config"], path, fixed)
    saved, progress = resolve.from_dict(state["config"], str(path)), Progress(**state["progress"])
    if settings.model.positions == "learned" and longest(settings) != longest(saved):
        raise UserError(
            f"model.positions = 'learned' holds {longest(saved)} positions in {path}, and the longest sequence would "
            f"be {longest(settings)}; keep that length"
        )
    check_schedule(settings, progress.tokens, path)
    plan = BatchPlan(settings, layout.dp)
    plan.go_on(plan_to_go_on(settings, saved, state, plan), progress)
    if plan.step(progress) is None:
        train = settings.train
        raise UserError(
            f"train.tokens = {train.tokens} and train.steps = {train.steps} leave no step after the {progress.tokens} "
            f"tokens and {progress.step} steps of {path}, which count as this run's own; raise them"
        )


def check_schedule(settings: Config, tokens: int, path: checkpoint.Place) -> None:
    """Raise UserError when the schedule would begin only after this checkpoint."""
    if settings.schedule.start > tokens:
        raise UserError(
            f"schedule.start = {settings.schedule.start} is beyond the {tokens} tokens of {path}, where the run goes "
            f"on; set schedule.start={tokens} for a schedule that begins there"
        )


def plan_to_go_on(settings: Config, saved: Config, state: Mapping[str, Any], plan: BatchPlan) -> dict[str, Any]:
    """The state a branch's batch plan begins in: the checkpoint's, where nothing of [batch] has changed, or its own."""
    same = (saved.batch, saved.data.sequence_length) == (settings.batch, settings.data.sequence_length)
    return state["batch_plan"] if same else {**plan.state(), "began": state["progress"]["tokens"]}


@dataclass(frozen=True)
class Taken:
    """What a start took over."""

    config: Mapping[str, Mapping[str, Any]] | None  # of the run that wrote the checkpoint; None = there is none
    batch_plan: Mapping[str, Any]  # the state the batch plan went on from
    changes: Sequence[Change] = ()  # of the batch that came of it
    anew: Sequence[str] = ()  # sources whose samples begin at the beginning


def cuda_wanted(settings: Config) -> bool:
    """Whether this run computes on CUDA devices."""
    return settings.train.device == "cuda" or (settings.train.device == "auto" and torch.cuda.is_available())


def check_devices(settings: Config, ranks_here: int) -> None:
    """Raise UserError when this machine has fewer CUDA devices than the run would use on it."""
    devices = torch.cuda.device_count()
    if cuda_wanted(settings) and devices < ranks_here:
        raise UserError(
            f"train.device = {settings.train.device!r} needs a CUDA device for each of {ranks_here} ranks and this "
            f"machine has {devices}; start fewer ranks, or set train.device=cpu"
        )


def check_tokenizer(settings: Config, tokenizer: Tokenizer) -> None:
    """Raise UserError when the data says it was written with another tokenizer than the run's."""
    for prefix in settings.data.train:
        side = Path(f"{prefix}.json")
        if side.exists() and _fingerprint_in(side) != tokenizer.fingerprint:
            raise UserError(
                f"data.tokenizer = {settings.data.tokenizer!r} is not the one {prefix} was written with, "
                f"according to {side}; name that one, or preprocess again"
            )


def _fingerprint_in(side: Path) -> str:
    try:
        return json.loads(side.read_text())["tokenizer_fingerprint"]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"{side} cannot be read ({error!r}); preprocess again, or remove it") from None


def with_vocabulary(settings: Config, tokenizer: Tokenizer) -> Config:
    """model.vocab_size from the tokenizer where it is 0. Raises UserError when it is too small for the tokenizer."""
    if settings.model.vocab_size == 0:
        return config.with_values(settings, {"model.vocab_size": tokenizer.vocab_size})
    if settings.model.vocab_size < tokenizer.vocab_size:
        raise UserError(
            f"model.vocab_size = {settings.model.vocab_size} is less than the {tokenizer.vocab_size} tokens of "
            f"data.tokenizer = {settings.data.tokenizer!r}; leave it out to take the tokenizer's"
        )
    return settings


def changes(settings: Config, saved: Mapping[str, Mapping[str, Any]]) -> dict[str, tuple[Any, Any]]:
    """Settings whose value differs from the saved one: key -> (saved, now)."""
    before = resolve.from_dict(saved, "checkpoint")
    pairs = {key: (config.get(before, key), config.get(settings, key)) for key in config.names()}
    return {key: pair for key, pair in pairs.items() if pair[0] != pair[1]}


def refuse_changes(
    settings: Config, saved: Mapping[str, Mapping[str, Any]], path: checkpoint.Place, fixed: tuple[str, ...]
) -> None:
    """Raise UserError when a setting differs that may not."""
    for key, (before, now) in changes(settings, saved).items():
        if key.startswith(fixed) and key not in MOVABLE:
            elsewhere = ", or start a new run under another log.name" if fixed == FIXED_ON_RESUME else ""
            raise UserError(f"{key} = {now!r} but {path} was trained with {before!r}; set it back{elsewhere}")


def open_data(settings: Config) -> TrainingData:
    """The run's data, memory-mapped. Raises UserError for missing or damaged files."""
    data = settings.data
    tokens = {prefix: int(IndexedDataset(prefix).lengths.sum(dtype=np.int64)) for prefix in data.train}
    for prefix, count in tokens.items():
        if count == 0:
            raise UserError(f"data {prefix!r} holds no tokens; leave it out of data.train, or preprocess again")
    by_tokens = tuple(map(float, tokens.values()))
    along = [replace(stage, weights=stage.weights or by_tokens) for stage in config.stages(data)]
    cache = Path(data.cache) if data.cache else Path(data.train[0]).parent / "cache"
    return TrainingData(
        data.train,
        along,
        settings.train.seed,
        data.validation_fraction,
        cache,
        settings.model.vocab_size,
    )


class Run:
    """Model, optimizer, data, progress and averages of one run: what a checkpoint holds."""

    def __init__(self, settings: Config, mesh: Mesh, data: TrainingData) -> None:
        self.settings, self.mesh, self.data = settings, mesh, data
        self.table = table_of(settings)
        self.engine = Engine(build_model(settings, mesh), mesh, settings.parallel)
        self.optimizer = make_optimizer(
            settings.optimizer, self.engine.trained, self.engine.rows, self.table, mesh.group(*WITHIN_STAGE)
        )
        self.masks = Masks(settings, self.engine, self.optimizer)
        self.progress = Progress()
        self.batch_plan = BatchPlan(settings, mesh.layout.dp)
        self.skipped = self.skipped_in_a_row = self.rewinds = 0
        self.spikes = Spikes(settings.resilience)
        self.slow: set[int] = set()  # ranks that hold up others, as told
        self.saved_at = -1  # step
        self.loss_scale = LossScale(FIRST_SCALE if settings.train.dtype == "float16" else 1.0)
        self.wandb_id = new_id()
        self.store = checkpoint.Store(self.folder, settings.checkpoint)
        self.forget_noise()

    @property
    def folder(self) -> Path:
        return self.settings.directory / "checkpoints"

    @property
    def is_outgrown(self) -> bool:
        """Whether the batch has grown to where the run goes on on more ranks."""
        return 0 < self.settings.resilience.stop_at_batch <= self.batch_plan.batch

    def save(self, validation_loss: float | None) -> None:
        """Begin to write a checkpoint of this moment, from all ranks. Raises UserError when that before it could not be
        written."""
        state = {
            "progress": asdict(self.progress),
            "skipped": self.skipped,
            "updates": self.optimizer.updates,
            "noise_scale": self.noise.state(),
            "batch_plan": self.batch_plan.state(),
            "loss_scale": vars(self.loss_scale),
            "spikes": self.spikes.state(),
            "wandb_id": self.wandb_id,
            "data": self.data.fingerprint,
            "data_order": self.data.state(self.progress.samples),
            "table": self.table.to_dict(),
            "layout": asdict(self.mesh.layout),
            "config": config.to_dict(self.settings),
            "versions": {"torch": torch.__version__},
            "validation_loss": validation_loss,
        }
        self.saved_at, self.rewinds = self.progress.step, 0
        check_copies(self.engine.weights, self.engine.rows, self.mesh)
        self.store.begin(self.progress.step, self._tensors(), state)

    def restore(self, path: checkpoint.Place) -> Taken:
        """Become what was saved, on this layout. Raises UserError."""
        state = self._load(path)
        if state["data"] != self.data.fingerprint:
            raise UserError(
                f"the data of {', '.join(self.settings.data.train)} is not what {path} was trained on; "
                "restore those files, or start a new run under another log.name"
            )
        self.data.restore(state["data_order"])
        self.skipped, self.wandb_id = state["skipped"], state["wandb_id"]
        return Taken(state["config"], state["batch_plan"], self.batch_plan.go_on(state["batch_plan"], self.progress))

    def branch(self, path: checkpoint.Place) -> Taken:
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
            self.forget_noise()
        plan = plan_to_go_on(self.settings, saved, state, self.batch_plan)
        return Taken(state["config"], plan, self.batch_plan.go_on(plan, self.progress), anew)

    def enter_stage(self, plan: Plan) -> bool:
        """Whether this step is the first of another stage of the data, which is then entered."""
        if plan.stage == self.data.stage:
            return False
        if plan.length != self.data.length:
            self.forget_noise()
        self.data.enter(plan.stage, plan.first_sample)
        return True

    def forget_noise(self) -> None:
        """Begin the averages again: an example has become another thing."""
        self.noise = NoiseScale(self.settings.train.noise_half_life * self.settings.train.tokens)

    def _load(self, path: checkpoint.Place) -> dict[str, Any]:
        """Weights, moments, progress and averages of a checkpoint. Returns its JSON state."""
        state = as_the_first_sees(lambda: checkpoint.read_state(path))
        if state["table"] != self.table.to_dict():
            raise UserError(
                f"the parameterization table of this megahp differs from the one in {path}; "
                "go on with the version that wrote it"
            )
        before = resolve.from_dict(state["config"], str(path)).train.weights
        # AdamW corrects all moments by one count of updates, so all are of as many
        updates = state["updates"] if self.settings.train.weights == before else 0
        # before the first update moments are 0, and what comes from elsewhere has none
        checkpoint.load(path, self._tensors() if updates else self.engine.saved | self.masks.state())
        self.masks.measure()
        self.progress = Progress(**state["progress"])
        self.saved_at = self.progress.step
        self.optimizer.updates = updates
        self.loss_scale = LossScale(**state["loss_scale"])
        self.spikes.restore(state["spikes"])
        if self.settings.train.noise_scale:
            self.noise.restore(state["noise_scale"])
        return state

    def _tensors(self) -> dict[str, torch.Tensor]:
        return self.engine.saved | self.optimizer.state() | self.masks.state()


def state_of_weights(settings: Config) -> dict[str, Any]:
    """The JSON part of a checkpoint that holds weights, and masks, and nothing of a run: one before its first step,
    that has seen no data."""
    return {
        "progress": asdict(Progress()),
        "skipped": 0,
        "updates": 0,
        "noise_scale": NoiseScale(1.0).state(),
        "batch_plan": BatchPlan(settings, 1).state(),
        "loss_scale": vars(LossScale(FIRST_SCALE if settings.train.dtype == "float16" else 1.0)),
        "spikes": Spikes(settings.resilience).state(),
        "wandb_id": new_id(),
        "data": None,
        "data_order": {"stage": 0, "first_sample": 0, "length": 0, "begins": {}, "taken": {}},
        "table": table_of(settings).to_dict(),
        "layout": asdict(Layout()),
        "config": config.to_dict(settings),
        "versions": {"torch": torch.__version__},
        "validation_loss": None,
    }


def as_the_first_sees(look: Callable[[], T]) -> T:
    """What the first rank finds, or its UserError, on every rank: a shared file system may show them different
    things."""
    found: list[Any] = [None]
    if is_first():
        try:
            found = [look()]
        except UserError as error:
            found = [error]
    dist.broadcast_object_list(found)
    if isinstance(found[0], UserError):
        raise found[0]
    return found[0]


def is_first() -> bool:
    """Whether this is the rank that writes and speaks."""
    return dist.get_rank() == 0


def read_config(directory: Path) -> Config:
    """The resolved settings in a run directory. Raises UserError."""
    path = directory / "config.toml"
    try:
        return resolve.from_dict(tomllib.loads(path.read_text(encoding="utf-8")), str(path))
    except (OSError, tomllib.TOMLDecodeError) as error:
        raise UserError(f"{path} cannot be read ({error}); name a run directory, such as runs/quickstart") from None
