"""The optimizer step as training, verification and benchmarks share it: compute gradients, update weights, advance."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from megahp.config import AUTO, Config
from megahp.data.loader import Batch, Loader, rank_samples
from megahp.model.build import build_model
from megahp.parallel.mesh import Mesh
from megahp.parallel.owners import Owners
from megahp.scaling.batch import BatchScheduler, Change, Progress, StepPlan
from megahp.scaling.noise_scale import NoiseScale
from megahp.scaling.parameterization import Table, table_of
from megahp.train.engine import Engine, Measurement, clip, initial_loss_scale
from megahp.train.masks import MaskChange, Masks
from megahp.train.optimizer import Optimizer, make_optimizer
from megahp.train.teachers import TeacherModels


@dataclass(frozen=True)
class Step:
    """This rank's parts of one step's gradients, in the order of the trained weights, and what was measured of them."""

    grads: list[Tensor]
    measured: Measurement


def make_engine(config: Config, mesh: Mesh, table: Table) -> tuple[Engine, Optimizer]:
    """Return what computes gradients, and what updates weights by them. Raises UserError."""
    model, parallel = build_model(config, mesh), config.parallel
    if parallel.engine == "deepspeed":
        from megahp.train.deepspeed import DeepSpeedEngine, PartitionedAdamW

        engine = DeepSpeedEngine(model, mesh, parallel, table)
        return engine, PartitionedAdamW(engine)
    plain = Engine(model, mesh, parallel)
    return plain, make_optimizer(config.optimizer, plain.trained, plain.rows, table, Owners(mesh))


class Trainer:
    """A model and everything that decides its next step: optimizer, masks, batch scheduler, averages, progress.

    while plan := trainer.next_step():
        step = trainer.compute(batches, plan)
        trainer.update(step, plan)
        trainer.advance(plan, step.measured)
    """

    def __init__(self, config: Config, mesh: Mesh) -> None:
        self.config, self.mesh = config, mesh
        self.table = table_of(config)
        self.engine, self.optimizer = make_engine(config, mesh, self.table)
        self.engine.teachers = TeacherModels(config, mesh) if config.distill.teachers else None
        self.masks = Masks(config, self.engine, self.optimizer)
        self.progress = Progress()
        self.batch_scheduler = BatchScheduler(config, mesh.layout.dp)
        self.loss_scale = initial_loss_scale(config.train.dtype)
        self.reset_noise()

    def reset_noise(self) -> None:
        """Start the averages of the noise scale anew, as needed where the sequence length changes: an example is a
        sequence, so the noise scales of two lengths must not be averaged."""
        half_life = self.config.train.noise_half_life * self.config.train.tokens
        self.noise = NoiseScale(half_life, self.config.batch.noise_to_total)

    def next_step(self) -> StepPlan | None:
        """Return the plan of the next step, or None when the run is over."""
        return self.batch_scheduler.step(self.progress)

    def compute(self, batches: Iterable[Batch], plan: StepPlan, stop_requested: bool = False) -> Step:
        """Compute one step's gradients from this rank's microbatches, and measure them over all ranks.

        stop_requested: whether this rank was asked to stop, which the same all-reduce makes known to all.
        """
        scale = self.loss_scale.value
        wrong: list[str] = []

        def noted() -> Iterator[Batch]:
            for batch in batches:
                wrong.extend(batch.wrong)
                yield batch

        loss = self.engine.forward_backward(noted(), plan.num_microbatches(self.mesh.layout.dp), plan.tokens, scale)
        grads = self.engine.gradients()
        self.masks.mask_step_gradients(grads, plan)  # before norms are measured: those of masked weights do not count
        return Step(grads, self.engine.measure(loss, grads, plan.global_batch, scale, stop_requested, bool(wrong)))

    def update(self, step: Step, plan: StepPlan) -> None:
        """Clip the gradients, in place, and make one update of the weights."""
        measured = step.measured
        squares = measured.grad_sq_example, measured.grad_sq_batch
        self.noise.update(*squares, measured.grad_norm, plan.global_batch, plan.tokens)
        clip(step.grads, measured.grad_norm, self.config.optimizer.clip, self.loss_scale.value)
        self.optimizer.step(step.grads, plan)
        self.engine.rebalance(measured.load)

    def calibrate(self, example: Batch, plan: StepPlan) -> None:
        """Measure, after the step of this plan, one example's gradient in the whole model and in its norm layers.
        example: a microbatch of copies of it, the same on all ranks.

        The mean gradient of copies of an example is its own, so what a step measures is then this example's, on every
        layout.
        """
        dp, scale = self.mesh.layout.dp, self.loss_scale.value
        # a pipeline's schedule is built for a step's microbatches
        count = plan.num_microbatches(dp) if self.mesh.layout.pp > 1 else 1
        copies = count * len(example.ids) * dp
        self.engine.zero()
        loss = self.engine.forward_backward([example] * count, count, copies * plan.length, scale)
        grads = self.engine.gradients()
        self.masks.mask_gradients(grads)
        measured = self.engine.measure(loss, grads, copies, scale)
        self.engine.zero()
        self.noise.calibrate(measured.grad_norm**2, sum(measured.grad_sq_example.values()))

    def advance(
        self, plan: StepPlan, measured: Measurement, updated: bool = True
    ) -> tuple[Change | None, MaskChange | None]:
        """Count the step, and decide the next one's batch and masks. Returns the changes."""
        if self.config.train.dtype == "float16":
            self.loss_scale.update(measured.finite)
        self.engine.zero()
        self.progress = self.progress.after(plan)
        # policies that measure are given the noise scale at decision steps alone: only those are sure to be logged, and
        # `megahp replay` makes each decision again from the log
        is_decision_step = self.batch_scheduler.is_decision_step(self.progress.step)
        noise_scale = self.noise.numbers()[self.batch_scheduler.noise_key] if is_decision_step else None
        change = self.batch_scheduler.update(self.progress, noise_scale)
        return change, self.masks.update(plan, self.progress) if updated else None

    def microbatches(self, loader: Loader, plan: StepPlan) -> Iterator[Batch]:
        """Yield this rank's microbatches of one step; while each computes, the next one is read."""
        ids = self.samples(plan)
        # the next step's first microbatch is read ahead too; should the batch grow, that read is wasted
        next_plan = self.batch_scheduler.step(self.progress.after(plan))
        if next_plan and next_plan.phase != plan.phase:
            next_plan = None  # its data is entered only after this step
        ahead = [*ids[1:], self.samples(next_plan)[0] if next_plan else None]
        for current, following in zip(ids, ahead, strict=True):
            yield loader.take(current, following)

    def example(self, loader: Loader, plan: StepPlan) -> Batch | None:
        """Return a microbatch of copies of the first sample after the step of this plan; None where the phase ends.

        It has the shape that every step's has, for compiled blocks and pipelines; but where that follows the batch,
        and may be the whole of it, it has two copies: of one a compiler would make a special case.
        """
        next_plan = self.batch_scheduler.step(self.progress.after(plan))
        if next_plan is None or next_plan.phase != plan.phase:
            return None
        copies = plan.micro_batch if self.config.batch.micro_batch != AUTO else min(2, plan.micro_batch)
        return loader.take(np.full(copies, next_plan.first_sample), self.samples(next_plan)[0])

    def samples(self, plan: StepPlan) -> list[np.ndarray]:
        """Return the ids of this rank's samples, an int64 array a microbatch."""
        ranks = self.mesh.data_rank, self.mesh.layout.dp
        return rank_samples(plan.first_sample, plan.global_batch, plan.micro_batch, *ranks)
