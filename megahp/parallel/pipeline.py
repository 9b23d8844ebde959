"""Pipeline parallelism: which blocks make a stage, which stages are whose, and PyTorch's schedules over them."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import (
    PipelineStage,
    Schedule1F1B,
    ScheduleInterleaved1F1B,
    ScheduleInterleavedZeroBubble,
    ScheduleZBVZeroBubble,
)

from megahp.config import ParallelConfig
from megahp.parallel.mesh import Mesh

SCHEDULES: dict[str, Any] = {
    "1f1b": Schedule1F1B,
    "interleaved": ScheduleInterleaved1F1B,
    "zero-bubble": ScheduleInterleavedZeroBubble,
    "zbv": ScheduleZBVZeroBubble,
}


def split(costs: Sequence[float], parts: int) -> list[range]:
    """Consecutive items in so many non-empty parts, whose costliest is as cheap as can be. Raises ValueError for more
    parts than items."""
    if parts > len(costs):
        raise ValueError(f"{len(costs)} items cannot make {parts} parts")
    sums = [0.0]
    for cost in costs:
        sums.append(sums[-1] + cost)
    best = {0: (0.0, [0])}  # items dealt -> the costliest part so far, and where the parts end
    for part in range(parts):
        best = {
            end: min(
                (max(worst, sums[end] - sums[start]), [*ends, end])
                for start, (worst, ends) in best.items()
                if start < end
            )
            for end in range(part + 1, len(costs) - parts + part + 2)
        }
    _, ends = best[len(costs)]
    return [range(start, end) for start, end in zip(ends, ends[1:], strict=False)]


def owner(stage: int, parallel: ParallelConfig) -> int:
    """The pipeline rank of a stage: in turn, or for zbv down and back up again."""
    lap, rank = divmod(stage, parallel.pp)
    return parallel.pp - 1 - rank if parallel.schedule == "zbv" and lap % 2 else rank


def stages_of(rank: int, parallel: ParallelConfig) -> list[int]:
    """The stages of a pipeline rank, ascending."""
    return [stage for stage in range(parallel.pp * parallel.local_stages) if owner(stage, parallel) == rank]


class Pipeline:
    """This rank's stages, run by a schedule. What goes from stage to stage is one tensor: the residual stream.

    A stage is called with the tokens, if it is the first, or the stream, and with `targets` and what else a microbatch
    has; the last returns the losses of its tokens. stream: the shape a microbatch of tokens has between stages.
    """

    def __init__(
        self, stages: Mapping[int, nn.Module], parallel: ParallelConfig, mesh: Mesh, stream: Callable[[Tensor], Tensor]
    ) -> None:
        self.stages, self.parallel, self.mesh, self.stream = stages, parallel, mesh, stream
        self.last = parallel.pp * parallel.local_stages - 1
        self.weight = 1.0  # of a token's loss in the step's
        self.shape: tuple[int, torch.Size] | None = None  # what the schedule at hand is for
        self.schedule: Any = None

    def forward_backward(self, tokens: Tensor, weight: float, count: int, **others: Tensor) -> Tensor:
        """Add up the gradients of `weight` times the sum of all tokens' losses over `count` microbatches.

        tokens, and `targets` among the others: int64 [count * micro batch, length]. Returns that sum where the last
        stage is, 0 elsewhere, in fp64.
        """
        self.weight = weight
        losses: list[Tensor] = []
        first = [tokens] if 0 in self.stages else []
        schedule = self._schedule(count, tokens)
        schedule.step(*first, target=others["targets"], losses=losses, return_outputs=False, **others)
        return sum(
            (loss.detach().double() for loss in losses), torch.zeros((), dtype=torch.float64, device=tokens.device)
        )

    @torch.no_grad()
    def forward(self, tokens: Tensor, **others: Tensor) -> Tensor | None:
        """The last stage's losses of one microbatch, where it is; None elsewhere."""
        x, group, mine = tokens, self.mesh.group("pp"), self.mesh.rank("pp")
        for number, stage in self.stages.items():
            if number > 0 and (source := owner(number - 1, self.parallel)) != mine:
                x = torch.empty_like(self.stream(tokens), device=tokens.device)
                dist.recv(x, group=group, group_src=source)
            x = stage(x, **others)
            if number < self.last and (target := owner(number + 1, self.parallel)) != mine:
                dist.send(x.contiguous(), group=group, group_dst=target)
        return x if self.last in self.stages else None

    def _schedule(self, count: int, tokens: Tensor) -> Any:
        """PyTorch's schedule for so many microbatches of this shape; it can serve no other."""
        one = tokens.chunk(count)[0].to("meta")
        if self.shape != (count, one.shape):
            stream = self.stream(one).requires_grad_()
            losses = torch.empty_like(one, dtype=torch.promote_types(stream.dtype, torch.float32), requires_grad=True)
            made = [
                PipelineStage(
                    stage,
                    number,
                    self.last + 1,
                    self.mesh.device,
                    input_args=one if number == 0 else stream,
                    output_args=losses if number == self.last else stream,
                    group=self.mesh.group("pp"),
                )
                for number, stage in self.stages.items()
            ]
            kind = SCHEDULES[self.parallel.schedule]
            of = made[0] if kind is Schedule1F1B else made
            self.schedule = kind(of, count, loss_fn=lambda losses, _: losses.sum() * self.weight, scale_grads=False)
            self.shape = count, one.shape
        return self.schedule
