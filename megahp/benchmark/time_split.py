"""Split the time of a step, from torch.profiler: compute, communication, data, host.

On a CPU: data = waiting for the loader; compute = an operator runs, with its dispatch and allocations; communication =
gloo works, or waits for other ranks, and no operator runs; host = the rest: Python and autograd. On CUDA: compute = a
kernel or copy runs; communication = only NCCL's kernels run, or wait for other ranks; data = the device only
receives a batch, or is idle while the loader is waited for; host = it is idle for another reason.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

DATA = "waiting for data"  # the range in which a step waits for its loader, marked with record_function
OPERATORS = ("aten::", "megahp::", "Torch-Compiled Region", "CompiledFxGraph")
COMMUNICATION = ("c10d::", "gloo:", "nccl")  # nccl: kernels
COSTLIEST = 10
Spans = list[tuple[float, float]]  # begin and end, microseconds


def profile_steps(
    run: Callable[[], float], steps: int, device: torch.device
) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """Return the split of some steps' time, and their costliest operators (on CUDA kernels) by self time.

    run: takes these steps and returns the mean seconds of one.
    """
    cuda = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * cuda) as profiler:
        seconds = run() * steps
    events: Sequence[Any] = profiler.events() or ()
    split = split_of(cuda_spans(events) if cuda else cpu_spans(events), 1e6 * seconds)
    self_time = "self_device_time_total" if cuda else "self_cpu_time_total"
    operators = [(getattr(event, self_time), event) for event in profiler.key_averages() if is_on_device(event, cuda)]
    operators.sort(key=lambda pair: pair[0], reverse=True)
    return split, [
        {"name": event.key[:100], "calls": event.count / steps, "ms": us / 1e3 / steps, "share": us / 1e6 / seconds}
        for us, event in operators[:COSTLIEST]
    ]


def is_on_device(event: Any, cuda: bool) -> bool:
    """Return whether an event ran on the device; ranges, which enclose other events, do not count."""
    return (event.device_type == DeviceType.CUDA) == cuda and not event.is_user_annotation


def cpu_spans(events: Sequence[Any]) -> dict[str, Spans]:
    """Return the spans of each kind of work; where they overlap, the first kind counts, since gloo runs in threads
    behind the main one."""
    return {
        "data": spans_of(event for event in events if event.name == DATA),
        "compute": spans_of(event for event in events if event.name.startswith(OPERATORS)),
        "communication": spans_of(event for event in events if event.name.startswith(COMMUNICATION)),
    }


def cuda_spans(events: Sequence[Any]) -> dict[str, Spans]:
    """Return the same for a GPU, whose kernels run behind the host: waiting for data only counts while it is idle."""
    kernels = [event for event in events if is_on_device(event, cuda=True)]
    batches = [event for event in kernels if event.name.startswith("Memcpy HtoD")]
    nccl = [event for event in kernels if event.name.startswith(COMMUNICATION)]
    waiting = [event for event in events if event.device_type == DeviceType.CPU and event.name == DATA]
    others = {id(event) for event in (*batches, *nccl)}
    return {
        "compute": spans_of(event for event in kernels if id(event) not in others),
        "communication": spans_of(nccl),
        "data": spans_of((*batches, *waiting)),
    }


def spans_of(events: Iterable[Any]) -> Spans:
    return [(event.time_range.start, event.time_range.end) for event in events]


def split_of(spans: Mapping[str, Spans], total: float) -> dict[str, float]:
    """Return the share of a total time that each kind covers and no kind before it does; host is the rest."""
    shares: dict[str, float] = {}
    union: Spans = []
    for kind, kind_spans in spans.items():
        before = covered(union)
        union = union + kind_spans
        shares[kind] = (covered(union) - before) / total
    return {**shares, "host": max(0.0, 1 - covered(union) / total)}


def covered(spans: Spans) -> float:
    """Return the length of the union of spans."""
    length, reached = 0.0, -math.inf
    for begin, end in sorted(spans):
        length += max(0.0, end - max(begin, reached))
        reached = max(reached, end)
    return length
