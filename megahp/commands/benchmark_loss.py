"""Time and peak memory of the loss in slices of the vocabulary, against the loss from whole logits.

    megahp benchmark loss [--device cuda] [--shape 8x512x256x50304 ...] [--dtype bfloat16 ...] [--json F]

A shape is batch x length x width x vocabulary; weights are fp32. `plain` is F.cross_entropy of F.linear. The two take
turns, so that other load on the machine slows them alike; you see the medians of the turns, and the median of the ratio
to plain within each turn. With one thread on the CPU (OMP_NUM_THREADS=1) it is CPU time, which other load hardly
affects. `peak` is the most that forward and backward allocate beyond their inputs, gradients included, as torch's
allocators count it.
"""

import argparse
import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from megahp.benchmark.machine import machine_of, synchronize
from megahp.commands.arguments import DTYPES, check_minimum, parse_shape
from megahp.commands.output import write_json
from megahp.parallel.cross_entropy import linear_cross_entropy
from megahp.parallel.mesh import Axis

ALONE = Axis(1, 0, None)  # type: ignore[arg-type]
LINE = "{loss:<6} {shape:<17} {dtype:<9}{forward ms:>11.0f}{backward ms:>12.0f}{both, of plain:>15.2f}{peak MiB:>10.0f}"
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--device", default="cpu", choices=["cpu", "cuda"])
    add("--shape", nargs="+", default=["8x512x256x50304"])
    add("--dtype", nargs="+", default=["float32", "bfloat16"], choices=DTYPES)
    add("--turns", type=int, default=7)
    add("--json", type=Path, help="also write the rows and the machine here")


def plain_loss(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    logits = F.linear(x, weight.to(x.dtype)).float()
    return F.cross_entropy(logits.flatten(0, -2), targets.flatten(), reduction="none").view_as(targets)


LOSSES: dict[str, Loss] = {"ours": partial(linear_cross_entropy, axis=ALONE), "plain": plain_loss}


def timed(loss: Loss, x: Tensor, weight: Tensor, targets: Tensor) -> tuple[float, float]:
    """Return the seconds of one forward and one backward pass."""
    clock = time.perf_counter if x.is_cuda or torch.get_num_threads() > 1 else time.process_time
    x.grad = weight.grad = None
    synchronize(x.device)
    start = clock()
    mean = loss(x, weight, targets).mean()
    synchronize(x.device)
    middle = clock()
    mean.backward()
    synchronize(x.device)
    return middle - start, clock() - middle


def peak(loss: Loss, x: Tensor, weight: Tensor, targets: Tensor) -> int:
    """Return the most bytes that one forward and backward pass allocate."""
    x.grad = weight.grad = None
    if x.is_cuda:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        timed(loss, x, weight, targets)
        return torch.cuda.max_memory_allocated() - before
    # the CPU has no allocator statistics: add up the allocations and frees that the profiler records
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        timed(loss, x, weight, targets)
    events = sorted(record.profiler.kineto_results.events(), key=lambda event: event.start_ns())
    return max(itertools.accumulate(event.nbytes() for event in events if event.name() == "[memory]"))


def run(arguments: argparse.Namespace, words: Sequence[str]) -> int:
    check_minimum(arguments, turns=1)
    shapes = {shape: parse_shape(shape, 4) for shape in arguments.shape}
    rows = []
    print("loss   shape            dtype     forward ms backward ms both, of plain  peak MiB")
    for shape, dtype in itertools.product(arguments.shape, arguments.dtype):
        batch, length, width, vocabulary = shapes[shape]
        x = torch.randn(batch, length, width, device=arguments.device).to(getattr(torch, dtype)).requires_grad_()
        weight = (torch.randn(vocabulary, width, device=arguments.device) / width**0.5).requires_grad_()
        targets = torch.randint(vocabulary, (batch, length), device=arguments.device)
        times: dict[str, list[tuple[float, float]]] = {name: [] for name in LOSSES}
        for _ in range(arguments.turns + 1):
            for name, loss in LOSSES.items():
                times[name].append(timed(loss, x, weight, targets))
        for name, loss in LOSSES.items():
            turns = list(zip(times[name], times["plain"], strict=True))[1:]  # the first turn is a warm-up
            row = {
                "loss": name,
                "shape": shape,
                "dtype": dtype,
                "forward ms": 1e3 * statistics.median(forward for (forward, _), _ in turns),
                "backward ms": 1e3 * statistics.median(backward for (_, backward), _ in turns),
                "both, of plain": statistics.median(sum(seconds) / sum(plain) for seconds, plain in turns),
                "peak MiB": peak(loss, x, weight, targets) / 2**20,
            }
            rows.append(row)
            print(LINE.format(**row), flush=True)
    write_json(arguments.json, {"machine": machine_of(torch.device(arguments.device)), "rows": rows})
    return 0
