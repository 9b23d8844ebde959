"""Time the norm ops against torch.nn.functional, eager and compiled, and the norm kernels of installed engines.

    megahp benchmark norm [--device cuda] [--shape 8x512x256 ...] [--dtype bfloat16 ...] [--json F] [--plot F]

You see a line per op and pass: each candidate's ms, GB/s, and ours over each peer's time. Passes: `forward`;
`backward`, in which `measured` also computes the per-example gradient norms, which the peers do not. The `add_` ops are
the fused residual addition; peers, which have no such op, add first. GB/s counts what an op must move if each tensor is
touched once, for N rows of D elements of b bytes:

    forward 2 N D b (x, y), backward 3 N D b (dy, x, dx);
    with the addition 4 N D b (x, branch, stream, y) and 4 N D b (dy, dstream, stream, dx).

`copy` is the share of the bandwidth of a copy (2 bytes moved per byte) as large as the op's tensors, and at least a
quarter of a GiB, in the same turns. All candidates take turns, so that other load on the machine slows them alike, and
the median of the turns counts. On the CPU freed memory is kept in the process: page faults, which cost all of them the
same, would hide the kernels. apex and te (Transformer Engine) run on CUDA only and are skipped where not installed.
"""

import argparse
import contextlib
import ctypes
import importlib.metadata
import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megahp.benchmark.machine import machine_of, synchronize
from megahp.commands.arguments import DTYPES, add_outputs, check_minimum, parse_shape
from megahp.commands.output import plot_bars, write_json
from megahp.errors import UserError
from megahp.ops import add_and_normalize, normalize
from megahp.ops.engines import norm_of

Norm = Callable[..., Any]  # x -> y; with the addition x, branch -> stream, y
Work = Callable[[], object]
OPS = ("rms_norm", "layer_norm", "add_rms_norm", "add_layer_norm")
EPS = 1e-5
ENGINES = {"apex": "apex", "te": "transformer-engine"}  # peer -> its name in compute.norms
PEERS = ("torch", "compiled", *ENGINES)
PACKAGES = ("apex", "transformer-engine", "triton")
CALLS = 5  # per timing, so that the launch of a GPU's kernels, or of a tiny op, is hidden
COPY_BYTES = 2**28  # at least: more than any cache


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    add("--op", nargs="+", default=OPS, choices=OPS)
    add("--shape", nargs="+", default=["1x33x7", "8x512x256", "8x1024x1024", "4x2048x4096"])
    add("--dtype", nargs="+", default=["float32", "bfloat16"], choices=DTYPES)
    add("--peer", nargs="*", default=list(PEERS), choices=PEERS)
    add("--threads", type=int, help="of the CPU (default: torch's)")
    add("--turns", type=int, default=11)
    add_outputs(parser, "the shares of the copy's bandwidth")


def run(arguments: argparse.Namespace, words: Sequence[str]) -> int:
    shapes = [parse_shape(shape) for shape in arguments.shape]
    check_minimum(arguments, turns=1, threads=1)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    if arguments.device == "cpu" and hasattr(libc := ctypes.CDLL(None), "mallopt"):  # glibc only
        libc.mallopt(-4, 0)  # M_MMAP_MAX of malloc.h: map no memory for large tensors
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: and return none

    machine = machine_of(torch.device(arguments.device)) | {"cpu": torch.backends.cpu.get_cpu_capability()}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            machine[name] = importlib.metadata.version(name)
    print(machine)
    rows = []
    for shape, dtype, op in itertools.product(shapes, arguments.dtype, arguments.op):
        for row in measure(op, shape, dtype, arguments):
            rows.append(row)
            print(table_row(row), flush=True)
    write_json(arguments.json, {"machine": machine, "rows": rows})
    if arguments.plot:
        groups = ["{op} {pass} {shape} {dtype}".format(**row) for row in rows]
        names = dict.fromkeys(name for row in rows for name in row["ms"])
        series = {
            name: {index: row["share of copy"][name] for index, row in enumerate(rows) if name in row["ms"]}
            for name in names
        }
        plot_bars(arguments.plot, groups, series, "share of a large copy's bandwidth", line=1)
    return 0


def our_norm(added: bool, weight: Tensor, bias: Tensor | None, probe: Tensor | None) -> Norm:
    options: dict[str, Any] = {"bias": bias, "probe": probe, "centered": bias is not None, "eps": EPS}
    if added:
        return lambda x, branch: add_and_normalize(x, branch, 1.0, weight, **options)
    return lambda x: normalize(x, weight, **options)


def peer_norm(peer: str, added: bool, weight: Tensor, bias: Tensor | None) -> Norm:
    """Return a peer's op. Raises ImportError or UserError where it is not installed."""
    engine = norm_of(ENGINES[peer], "rmsnorm" if bias is None else "layernorm") if peer in ENGINES else None

    def norm(x: Tensor) -> Tensor:
        if engine:
            return engine(x, weight, bias, EPS)
        if bias is None:
            return F.rms_norm(x, weight.shape, weight, EPS)
        return F.layer_norm(x, weight.shape, weight, bias, EPS)

    def add_then_norm(x: Tensor, branch: Tensor) -> tuple[Tensor, Tensor]:
        stream = x + branch
        return stream, norm(stream)

    op: Norm = add_then_norm if added else norm
    return torch.compile(op, fullgraph=True, dynamic=False) if peer == "compiled" else op


def measure(op: str, shape: tuple[int, ...], dtype: str, arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yield a row for the forward pass and one for the backward pass."""
    added = op.startswith("add")
    device = torch.device(arguments.device)
    draw = partial(torch.randn, dtype=getattr(torch, dtype), device=device)
    inputs, dys = ([draw(shape, requires_grad=needed) for _ in range(1 + added)] for needed in (True, False))
    weight = draw(shape[-1], requires_grad=True)
    bias = None if op.endswith("rms_norm") else draw(shape[-1], requires_grad=True)
    probe = torch.zeros((), device=device, requires_grad=True)
    parameters = [*inputs, weight] + ([] if bias is None else [bias])

    torch._dynamo.reset()  # cases share a code object, of which dynamo compiles no more than recompile_limit versions
    norms = {"ours": our_norm(added, weight, bias, None), "measured": our_norm(added, weight, bias, probe)}
    for peer in arguments.peer:
        try:
            norms[peer] = peer_norm(peer, added, weight, bias)
        except (ImportError, UserError):
            continue

    size_of_x = inputs[0].nbytes
    source = draw(max(size_of_x, COPY_BYTES) // inputs[0].itemsize)
    target = torch.empty_like(source)
    passes: dict[str, dict[str, Work]] = {
        "forward": {name: partial(norm, *inputs) for name, norm in norms.items() if name != "measured"},
        "backward": {
            name: backward(norm, inputs, parameters + [probe] * (name == "measured"), dys)
            for name, norm in norms.items()
        },
    }
    for direction, works in passes.items():
        milliseconds = time_in_turns({**works, "copy": lambda: target.copy_(source)}, device, arguments.turns)
        copy = 2 * source.nbytes / milliseconds.pop("copy") / 1e6
        moved = size_of_x * (4 if added else 2 if direction == "forward" else 3)
        speeds = {name: moved / ms / 1e6 for name, ms in milliseconds.items()}
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


def backward(norm: Norm, inputs: list[Tensor], parameters: list[Tensor], dys: list[Tensor]) -> Work:
    y = norm(*inputs)
    outputs = [y] if isinstance(y, Tensor) else list(y)
    return lambda: torch.autograd.grad(outputs, parameters, dys, retain_graph=True, allow_unused=True)


def time_in_turns(works: dict[str, Work], device: torch.device, turns: int) -> dict[str, float]:
    """Return the median time of one call of each work in milliseconds; the first turn, a warm-up, does not count."""
    times: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(turns + 1):
        for name, work in works.items():
            work()
            synchronize(device)
            start = time.perf_counter()
            for _ in range(CALLS):
                work()
            synchronize(device)
            times[name].append((time.perf_counter() - start) / CALLS)
    return {name: 1e3 * statistics.median(seconds[1:]) for name, seconds in times.items()}


def table_row(row: dict[str, Any]) -> str:
    """Format a row; in the backward pass, ours is the measured one."""
    ours = "measured" if row["pass"] == "backward" else "ours"
    milliseconds = row["ms"]
    times = "  ".join(f"{name} {ms:.3f}" for name, ms in milliseconds.items())
    ratios = ", ".join(f"{milliseconds[ours] / ms:.2f} of {name}" for name, ms in milliseconds.items() if name in PEERS)
    labels = "{op:<14} {pass:<8} {shape:<12} {dtype:<8}".format(**row)
    return f"{labels} {times} ms | {row['GB/s'][ours]:.1f} GB/s, copy {row['share of copy'][ours]:.0%} | {ratios}"
