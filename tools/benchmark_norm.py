"""Time of the norm ops against torch.nn.functional's and their own PyTorch references.

    python tools/benchmark_norm.py [--device cuda] [--shape 8x512x256 ...] [--dtype bfloat16 ...] [--json F]

`ours` measures the per-example gradient norm as it goes, torch's does not. GB/s counts what an op must move
if each tensor is touched once: forward 2 N D b (x, y), backward 3 N D b (dy, x, dx), for N rows of D elements
of b bytes. The candidates take turns, so that a busy machine slows them alike; the median of the turns is
printed. On a device without a kernel of ours, `ours` is the reference.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from megahp.ops import layer_norm, rms_norm
from megahp.ops.norm import references_only

LINE = "{op:<11}{pass:<9} {shape:<12} {dtype:<9}{ours:>9.3f}{torch:>10.3f}{reference:>9.3f}{GB/s:>8.1f}"
Norm = Callable[[Tensor], Tensor]
Kernels = Callable[[], AbstractContextManager]  # opens the choice of kernels to time under


def candidates(kind: str, width: int, probe: Tensor, weight: Tensor, bias: Tensor) -> tuple[Norm, Norm]:
    """Our norm and torch's, as functions of x."""
    if kind == "rms_norm":
        return lambda x: rms_norm(x, weight, probe), lambda x: F.rms_norm(x, (width,), weight, 1e-6)
    return lambda x: layer_norm(x, weight, bias, probe), lambda x: F.layer_norm(x, (width,), weight, bias)


def seconds(work: Callable[[], object], device: str, repeats: int) -> float:
    """Time of one call, averaged over `repeats`."""
    synchronize = torch.cuda.synchronize if device == "cuda" else lambda: None
    synchronize()
    start = time.perf_counter()
    for _ in range(repeats):
        work()
    synchronize()
    return (time.perf_counter() - start) / repeats


def in_turns(works: Mapping[str, tuple[Kernels, Callable]], device: str, turns: int) -> dict[str, float]:
    """The median time of each work in milliseconds; the first turn, a warm-up, is not counted."""
    times: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(turns + 1):
        for name, (kernels, work) in works.items():
            with kernels():
                work()
                times[name].append(seconds(work, device, repeats=3))
    return {name: 1e3 * statistics.median(several[1:]) for name, several in times.items()}


def measure(kind: str, shape: tuple[int, ...], dtype: torch.dtype, device: str, turns: int) -> Iterable[dict]:
    """One row of results for the forward and one for the backward."""
    x, dy = (torch.randn(shape, dtype=dtype, device=device) for _ in range(2))
    weight, bias = (torch.randn(shape[-1], dtype=dtype, device=device, requires_grad=True) for _ in range(2))
    probe = torch.zeros((), device=device, requires_grad=True)
    x.requires_grad_()
    ours, theirs = candidates(kind, shape[-1], probe, weight, bias)
    parameters = [weight] if kind == "rms_norm" else [weight, bias]

    def backward(y: Tensor, inputs: list[Tensor]) -> tuple[Tensor, ...]:
        return torch.autograd.grad(y, inputs, dy, retain_graph=True)

    works: dict[str, tuple[Callable, Callable]] = {
        "forward": (partial(ours, x), partial(theirs, x)),
        "backward": (
            partial(backward, ours(x), [x, *parameters, probe]),
            partial(backward, theirs(x), [x, *parameters]),
        ),
    }
    for passes, (direction, (mine, other)) in enumerate(works.items(), start=2):
        as_built, reference = nullcontext, references_only if device == "cpu" else nullcontext
        turn = {"ours": (as_built, mine), "torch": (as_built, other), "reference": (reference, mine)}
        milliseconds = in_turns(turn, device, turns)
        moved = passes * x.numel() * x.element_size()
        yield {
            "op": kind,
            "pass": direction,
            "shape": "x".join(map(str, shape)),
            "dtype": str(dtype).removeprefix("torch."),
            **milliseconds,
            "GB/s": moved / milliseconds["ours"] / 1e6,
        }


def main() -> None:
    plain = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=plain)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--shape", nargs="+", default=["8x512x256", "8x1024x1024"])
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--turns", type=int, default=15)
    parser.add_argument("--json", type=Path, help="write the rows and the machine here too")
    arguments = parser.parse_args()

    rows = []
    print("op         pass      shape        dtype      ours ms  torch ms   ref ms    GB/s")
    for shape in arguments.shape:
        for dtype in arguments.dtype:
            for kind in ("rms_norm", "layer_norm"):
                size = tuple(map(int, shape.split("x")))
                for row in measure(kind, size, getattr(torch, dtype), arguments.device, arguments.turns):
                    rows.append(row)
                    print(LINE.format(**row), flush=True)
    if arguments.json:
        cpu = torch.backends.cpu.get_cpu_capability()
        name = torch.cuda.get_device_name() if arguments.device == "cuda" else cpu
        machine = {"device": name, "threads": torch.get_num_threads(), "torch": torch.__version__}
        arguments.json.write_text(json.dumps({"machine": machine, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
