"""Pipeline parallelism: PyTorch's schedules over the stages of each rank.

A tied embedding is on the first and on the last stage: Transformer.keep leaves both a copy, and
parameters.sum_gradients adds their gradients.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megahp.config import ParallelConfig
from megahp.parallel.mesh import Mesh
from megahp.parallel.stages import owner

SCHEDULES = {  # their names in torch.distributed.pipelining
    "1f1b": "Schedule1F1B",
    "interleaved": "ScheduleInterleaved1F1B",
    "zero-bubble": "ScheduleInterleavedZeroBubble",
    "zbv": "ScheduleZBVZeroBubble",
}


class Pipeline:
    """Run this rank's stages by a schedule. Stages exchange one tensor: the residual stream.

    A stage is called with the tokens, if it is the first, else the stream; with `targets` and the other inputs of a
    microbatch; and in training with `loss_weight`, that of a token's loss. The last returns the losses of its tokens.
    stream: maps a microbatch of tokens to a `meta` tensor of the shape and dtype that the stream has between stages.
    """

    def __init__(
        self, stages: Mapping[int, nn.Module], parallel: ParallelConfig, mesh: Mesh, stream: Callable[[Tensor], Tensor]
    ) -> None:
        self.stages, self.parallel, self.mesh, self.stream = stages, parallel, mesh, stream
        self.last = parallel.pp * parallel.local_stages - 1
        self.schedules: dict[tuple[int, torch.Size], Any] = {}  # the newest alone, by microbatches and their shape

    def forward_backward(self, tokens: Tensor, weight: float, count: int, **others: Any) -> Tensor:
        """Add up the gradients of `weight` times the sum of all tokens' losses over `count` microbatches.

        tokens, and `targets` among the others: int64 [count * micro batch, length]. Returns that sum on the rank of the
        last stage, 0 elsewhere, in fp64.
        """
        losses: list[Tensor] = []
        self._schedule(count, tokens).step(
            *([tokens] if 0 in self.stages else []),
            # A schedule hands its loss function a part of `target` for every microbatch. The stages compute the losses
            # from `targets` themselves; what the loss function lacks is the weight, which a growing batch changes.
            target=torch.full((count,), weight, dtype=torch.float64),
            losses=losses,
            return_outputs=False,
            loss_weight=weight,
            **others,
        )
        return sum(
            (loss.detach().double() for loss in losses), torch.zeros((), dtype=torch.float64, device=tokens.device)
        )

    @torch.no_grad()
    def forward(self, tokens: Tensor, **others: Tensor) -> Tensor | None:
        """Return the losses of one microbatch on the rank of the last stage, None elsewhere."""
        x, group, rank = tokens, self.mesh.group("pp"), self.mesh.rank("pp")
        for number, stage in self.stages.items():
            if number > 0 and (source := owner(number - 1, self.parallel)) != rank:
                x = torch.empty_like(self.stream(tokens), device=tokens.device)
                dist.recv(x, group=group, group_src=source)
            x = stage(x, **others)
            if number < self.last and (target := owner(number + 1, self.parallel)) != rank:
                dist.send(x.contiguous(), group=group, group_dst=target)
        return x if self.last in self.stages else None

    def _schedule(self, count: int, tokens: Tensor) -> Any:
        """Return PyTorch's schedule for this many microbatches of this shape, which are fixed when it is built."""
        from torch.distributed import pipelining  # here: it imports torch._dynamo, which takes half a second

        microbatch = tokens.chunk(count)[0].to("meta")
        key = (count, microbatch.shape)
        if key not in self.schedules:
            # with the shapes of inputs and outputs given, stages need no trial run to infer them
            stream = self.stream(microbatch).requires_grad_()
            dtype = torch.promote_types(stream.dtype, torch.float32)
            losses = torch.empty_like(microbatch, dtype=dtype, requires_grad=True)
            stages = [
                pipelining.PipelineStage(
                    stage,
                    number,
                    self.last + 1,
                    self.mesh.device,
                    input_args=microbatch if number == 0 else stream,
                    output_args=losses if number == self.last else stream,
                    group=self.mesh.group("pp"),
                )
                for number, stage in self.stages.items()
            ]
            kind: Any = getattr(pipelining, SCHEDULES[self.parallel.schedule])
            schedule = kind(
                stages[0] if kind is pipelining.Schedule1F1B else stages,
                count,
                loss_fn=lambda losses, weight: losses.sum() * weight.item(),
                scale_grads=False,  # torch would divide by the microbatches; the weight has done it
            )
            self.schedules = {key: schedule}  # the old one goes, and with it its receive buffers
        return self.schedules[key]
