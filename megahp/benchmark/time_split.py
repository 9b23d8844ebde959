"""Where the time of a step goes, from torch.profiler: compute, communication, data, host.

On a CPU: data = the loader is waited for; compute = an operator runs, its dispatch and allocations with it;
communication = gloo is at work, waiting for other ranks too, and no operator runs; host = the rest, which is Python and
autograd. On CUDA: compute = a kernel or copy runs; communication = only NCCL's kernels do, waiting for other ranks too;
data = the device is idle or receives a batch, and the loader is waited for; host = it is idle for another reason.
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


def profiled(
    run: Callable[[], float], steps: int, device: torch.device
) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """Shares of the time of so many steps, and the costliest operators (on CUDA kernels), by the time that is their
    own. run: makes the steps and returns the seconds of one."""
    cuda = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * cuda) as seen:
        seconds = run() * steps
    events: Sequence[Any] = seen.events() or ()
    split = split_of(cuda_spans(events) if cuda else cpu_spans(events), 1e6 * seconds)
    own_time = "self_device_time_total" if cuda else "self_cpu_time_total"
    averages = [(getattr(each, own_time), each) for each in seen.key_averages() if is_on(each, cuda)]
    averages.sort(key=lambda pair: pair[0], reverse=True)
    return split, [
        {"name": each.key[:100], "calls": each.count / steps, "ms": own / 1e3 / steps, "share": own / 1e6 / seconds}
        for own, each in averages[:COSTLIEST]
    ]


def is_on(event: Any, cuda: bool) -> bool:
    """Whether an event took place on the device, and is no range that encloses others."""
    return (event.device_type == DeviceType.CUDA) == cuda and not event.is_user_annotation


def cpu_spans(events: Sequence[Any]) -> dict[str, Spans]:
    """When what was going on; where several things were, the first named counts. gloo runs behind the main thread."""
    return {
        "data": spans_of(event for event in events if event.name == DATA),
        "compute": spans_of(event for event in events if event.name.startswith(OPERATORS)),
        "communication": spans_of(event for event in events if event.name.startswith(COMMUNICATION)),
    }


def cuda_spans(events: Sequence[Any]) -> dict[str, Spans]:
    """The same of a device, whose kernels run behind the host."""
    kernels = [event for event in events if is_on(event, cuda=True)]
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
    """The share of a total time that each kind of spans covers and none named before it does; host is the rest."""
    shares: dict[str, float] = {}
    together: Spans = []
    for name, these in spans.items():
        before = covered(together)
        together = together + these
        shares[name] = (covered(together) - before) / total
    return {**shares, "host": max(0.0, 1 - covered(together) / total)}


def covered(spans: Spans) -> float:
    """Length of the union."""
    length, reached = 0.0, -math.inf
    for begin, end in sorted(spans):
        length += max(0.0, end - max(begin, reached))
        reached = max(reached, end)
    return length
