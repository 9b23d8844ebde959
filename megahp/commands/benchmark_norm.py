"""Time of the norm ops against torch.nn.functional, eager and compiled, and the kernels of others that are installed.

    megahp benchmark norm [--device cuda] [--shape 8x512x256 ...] [--dtype bfloat16 ...] [--json F] [--plot F]

Passes: `forward`; `backward`; `measured`, the backward that gives the per-example gradient norms too, which the peers
do not. The `add_` ops are the fused residual addition; those without such an op add first. GB/s counts what an op must
move if each tensor is touched once, for N rows of D elements of b bytes:

    forward 2 N D b (x, y), backward 3 N D b (dy, x, dx);
    with the addition 4 N D b (x, branch, stream, y) and 4 N D b (dy, dstream, stream, dx).

`copy` is the share of the bandwidth of a copy (2 bytes moved for each byte) as large as the op's tensors, or a quarter
of a GiB if that is larger, in the same turns. All candidates take turns, so that a busy machine slows them alike, and
the median of the turns counts. On the CPU freed memory is kept in the process: page faults, which all pay alike, would
hide the kernels. Liger, quack, apex and Transformer Engine run on CUDA alone and are left out where not importable.
"""

import argparse
import ctypes
import importlib.metadata
import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megahp.benchmark.machine import machine_of, synchronize
from megahp.commands.arguments import DTYPES, add_outputs, check_minimum, parse_shape
from megahp.commands.output import check_writable, write_json
from megahp.errors import UserError
from megahp.ops import add_and_normalize, normalize
from megahp.ops.engines import norm_of

Norm = Callable[..., Any]  # x -> y; where a branch is added, x, branch -> stream, y
Work = Callable[[], object]
OPS = ("rms_norm", "layer_norm", "add_rms_norm", "add_layer_norm")
EPS = 1e-5
PACKAGES = ("liger-kernel", "quack-kernels", "apex", "transformer-engine", "triton")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    add("--op", nargs="+", default=OPS, choices=OPS)
    add("--shape", nargs="+", default=["1x33x7", "8x512x256", "8x1024x1024", "4x2048x4096"])
    add("--dtype", nargs="+", default=["float32", "bfloat16"], choices=DTYPES)
    add("--peer", nargs="*", default=list(PEERS), choices=list(PEERS))
    add("--threads", type=int, help="of the CPU; torch's own choice by default")
    add("--turns", type=int, default=11)
    add_outputs(parser, "the shares of the copy's bandwidth")


def ours(added: bool, weight: Tensor, bias: Tensor | None, probe: Tensor | None) -> Norm:
    how: dict[str, Any] = {"bias": bias, "probe": probe, "centered": bias is not None, "eps": EPS}
    if added:
        return lambda x, branch: add_and_normalize(x, branch, 1.0, weight, **how)
    return lambda x: normalize(x, weight, **how)


def of_torch(weight: Tensor, bias: Tensor | None) -> Norm:
    if bias is None:
        return lambda x: F.rms_norm(x, weight.shape, weight, EPS)
    return lambda x: F.layer_norm(x, weight.shape, weight, bias, EPS)


def of_liger(weight: Tensor, bias: Tensor | None) -> Norm:
    from liger_kernel.transformers import functional

    if bias is None:
        return lambda x: functional.liger_rms_norm(x, weight, EPS)
    return lambda x: functional.liger_layer_norm(x, weight, bias, EPS)


def of_quack(weight: Tensor, bias: Tensor | None) -> Norm:
    from quack.rmsnorm import rmsnorm

    if bias is not None:
        raise ImportError("quack's layer_norm has no backward")
    return lambda x: rmsnorm(x, weight, eps=EPS)


def of_engine(engine: str, weight: Tensor, bias: Tensor | None) -> Norm:
    """As megahp's `compute.norms` calls it."""
    norm = norm_of(engine, "rmsnorm" if bias is None else "layernorm")
    return lambda x: norm(x, weight, bias, EPS)


PEERS: dict[str, Callable[[Tensor, Tensor | None], Norm]] = {
    "torch": of_torch,
    "compiled": of_torch,
    "liger": of_liger,
    "quack": of_quack,
    "apex": partial(of_engine, "apex"),
    "te": partial(of_engine, "transformer-engine"),
}


def theirs(peer: str, added: bool, weight: Tensor, bias: Tensor | None) -> Norm:
    """A peer's op. Raises ImportError or UserError where it is not installed."""
    norm = PEERS[peer](weight, bias)
    if peer == "liger" and added and bias is None:
        from liger_kernel.transformers import functional

        return lambda x, branch: functional.liger_fused_add_rms_norm(x, branch, weight, EPS)[::-1]

    def both(x: Tensor, branch: Tensor) -> tuple[Tensor, Tensor]:
        stream = x + branch
        return stream, norm(stream)

    op = both if added else norm
    return torch.compile(op, fullgraph=True, dynamic=False) if peer == "compiled" else op


def candidates(added: bool, weight: Tensor, bias: Tensor | None, probe: Tensor, peers: list[str]) -> dict[str, Norm]:
    torch._dynamo.reset()
    norms = {"ours": ours(added, weight, bias, None), "measured": ours(added, weight, bias, probe)}
    for peer in peers:
        try:
            norms[peer] = theirs(peer, added, weight, bias)
        except (ImportError, UserError):
            continue
    return norms


def backward(norm: Norm, inputs: list[Tensor], wanted: list[Tensor], dys: list[Tensor]) -> Work:
    y = norm(*inputs)
    outputs = [y] if isinstance(y, Tensor) else list(y)
    return lambda: torch.autograd.grad(outputs, wanted, dys, retain_graph=True, allow_unused=True)


def seconds(work: Work, device: torch.device) -> float:
    """Time of one call; of several on a GPU, whose launches are not to be seen, and of a tiny op."""
    work()
    synchronize(device)
    start = time.perf_counter()
    for _ in range(5):
        work()
    synchronize(device)
    return (time.perf_counter() - start) / 5


def in_turns(works: dict[str, Work], device: torch.device, turns: int) -> dict[str, float]:
    """The median time of each work in milliseconds; the first turn, a warm-up, is not counted."""
    times: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(turns + 1):
        for name, work in works.items():
            times[name].append(seconds(work, device))
    return {name: 1e3 * statistics.median(several[1:]) for name, several in times.items()}


def measure(op: str, shape: tuple[int, ...], dtype: str, arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """A row of results for the forward and one for the backward."""
    added = op.startswith("add")
    draw = partial(torch.randn, dtype=getattr(torch, dtype), device=arguments.device)
    inputs, dys = ([draw(shape, requires_grad=needed) for _ in range(1 + added)] for needed in (True, False))
    weight = draw(shape[-1], requires_grad=True)
    bias = None if op.endswith("rms_norm") else draw(shape[-1], requires_grad=True)
    probe = torch.zeros((), device=arguments.device, requires_grad=True)
    wanted = [*inputs, weight] + ([] if bias is None else [bias])
    norms = candidates(added, weight, bias, probe, arguments.peer)
    size_of_x = inputs[0].nbytes
    source = draw(max(size_of_x, 2**28) // inputs[0].itemsize)
    target = torch.empty_like(source)
    works: dict[str, dict[str, Work]] = {
        "forward": {name: partial(norm, *inputs) for name, norm in norms.items() if name != "measured"},
        "backward": {
            name: backward(norm, inputs, wanted + [probe] * (name == "measured"), dys) for name, norm in norms.items()
        },
    }
    for direction, several in works.items():
        milliseconds = in_turns(
            {**several, "copy": lambda: target.copy_(source)}, torch.device(arguments.device), arguments.turns
        )
        copy = 2 * source.nbytes / milliseconds.pop("copy") / 1e6
        moved = size_of_x * (4 if added else 2 if direction == "forward" else 3)
        speeds = {name: moved / time / 1e6 for name, time in milliseconds.items()}
        yield {
            "op": op,
            "pass": direction,
            "shape": "x".join(map(str, shape)),
            "dtype": dtype,
            "bytes": moved,
            "ms": milliseconds,
            "GB/s": speeds,
            "copy GB/s": copy,
            "share of copy": {name: speed / copy for name, speed in speeds.items()},
        }


def table_row(row: dict[str, Any]) -> str:
    best = "measured" if row["pass"] == "backward" else "ours"
    milliseconds, speed, share = row["ms"], row["GB/s"][best], row["share of copy"][best]
    times = "  ".join(f"{name} {time:.3f}" for name, time in milliseconds.items())
    peers = {name: time for name, time in milliseconds.items() if name in PEERS}
    ratios = ", ".join(f"{milliseconds[best] / time:.2f} of {name}" for name, time in peers.items())
    what = "{op:<14} {pass:<8} {shape:<12} {dtype:<8}".format(**row)
    return f"{what} {times} ms | {speed:.1f} GB/s, copy {share:.0%} | {ratios}"


def machine(device: str) -> dict[str, Any]:
    installed = {found.name.lower().replace("_", "-"): found.version for found in importlib.metadata.distributions()}
    versions = {name: installed[name] for name in PACKAGES if name in installed}
    return {**machine_of(torch.device(device)), "cpu": torch.backends.cpu.get_cpu_capability(), **versions}


def keep_freed_memory() -> None:
    """glibc: no memory by mmap, none given back (M_MMAP_MAX and M_TRIM_THRESHOLD of malloc.h)."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(-4, 0)
        libc.mallopt(-1, 2**31 - 1)


def plot(file: Path, rows: list[dict[str, Any]]) -> None:
    """Draw the share of the copy's bandwidth, a group of bars for each row. Raises UserError."""
    from megahp.report.figures import PALETTE, colour, plot_in

    names = list(dict.fromkeys(name for row in rows for name in row["ms"]))
    with plot_in(file, 9, 1 + 0.14 * len(rows) * len(names)) as figure:
        axes = figure.add_subplot()
        for number, name in enumerate(names):
            there = [place for place, row in enumerate(rows) if name in row["ms"]]
            places = [place + 0.8 * number / len(names) for place in there]
            shares = [rows[place]["share of copy"][name] for place in there]
            bars: dict[str, Any] = {"color": PALETTE[colour(number)], "hatch": "//" if number > 5 else None}
            axes.barh(places, shares, 0.8 / len(names), align="edge", label=name, **bars)
        labels = ["{op} {pass} {shape} {dtype}".format(**row) for row in rows]
        axes.set_yticks([place + 0.4 for place in range(len(rows))], labels)
        axes.invert_yaxis()
        axes.axvline(1, color=PALETTE["ink"], linewidth=0.5)
        axes.set_xlabel("share of a large copy's bandwidth")
        axes.legend(frameon=False)


def run(arguments: argparse.Namespace, words: Sequence[str]) -> int:
    shapes = [parse_shape(shape) for shape in arguments.shape]
    check_writable(arguments.json, plot=arguments.plot)
    check_minimum(arguments, turns=1, threads=1)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    if arguments.device == "cpu":
        keep_freed_memory()

    about, rows = machine(arguments.device), []
    print(about)
    for shape, dtype, op in itertools.product(shapes, arguments.dtype, arguments.op):
        for row in measure(op, shape, dtype, arguments):
            rows.append(row)
            print(table_row(row), flush=True)
    write_json(arguments.json, {"machine": about, "rows": rows})
    if arguments.plot:
        plot(arguments.plot, rows)
    return 0
