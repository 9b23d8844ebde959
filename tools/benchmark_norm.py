"""Time of the norm ops against torch.nn.functional, eager and compiled, and the kernels of others that are installed.

    python tools/benchmark_norm.py [--device cuda] [--shape 8x512x256 ...] [--dtype bfloat16 ...] [--json F] [--plot F]

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
import json
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from megahp.errors import UserError
from megahp.ops import add_and_normalize, normalize
from megahp.ops.engines import norm_of

Norm = Callable[..., Tensor | tuple[Tensor, Tensor]]  # of x, and of the branch where one is added
OPS = ("rms_norm", "layer_norm", "add_rms_norm", "add_layer_norm")
TENSORS = {"rms_norm": (2, 3), "layer_norm": (2, 3), "add_rms_norm": (4, 4), "add_layer_norm": (4, 4)}
EPS = 1e-5


def ours(op: str, weight: Tensor, bias: Tensor, probe: Tensor | None) -> Norm:
    centered = op.endswith("layer_norm")
    shift = bias if centered else None
    if op.startswith("add"):
        return lambda x, branch: add_and_normalize(x, branch, 1.0, weight, shift, probe, centered=centered, eps=EPS)
    return lambda x: normalize(x, weight, shift, probe, centered=centered, eps=EPS)


def adding(norm: Callable[[Tensor], Tensor]) -> Norm:
    """The addition, then the norm: what there is without a fused op."""

    def both(x: Tensor, branch: Tensor) -> tuple[Tensor, Tensor]:
        stream = x + branch
        return stream, norm(stream)

    return both


def of_torch(op: str, weight: Tensor, bias: Tensor) -> Norm:
    shape = weight.shape
    if op.endswith("rms_norm"):
        norm = lambda x: F.rms_norm(x, shape, weight, EPS)  # noqa: E731
    else:
        norm = lambda x: F.layer_norm(x, shape, weight, bias, EPS)  # noqa: E731
    return adding(norm) if op.startswith("add") else norm


def compiled(op: str, weight: Tensor, bias: Tensor) -> Norm:
    torch._dynamo.reset()
    return torch.compile(of_torch(op, weight, bias), fullgraph=True, dynamic=False)


def of_liger(op: str, weight: Tensor, bias: Tensor) -> Norm:
    from liger_kernel.transformers import functional

    norms: dict[str, Norm] = {
        "rms_norm": lambda x: functional.liger_rms_norm(x, weight, EPS),
        "layer_norm": lambda x: functional.liger_layer_norm(x, weight, bias, EPS),
        "add_rms_norm": lambda x, branch: functional.liger_fused_add_rms_norm(x, branch, weight, EPS)[::-1],
        "add_layer_norm": adding(lambda x: functional.liger_layer_norm(x, weight, bias, EPS)),
    }
    return norms[op]


def of_quack(op: str, weight: Tensor, bias: Tensor) -> Norm:
    from quack.rmsnorm import rmsnorm

    if not op.endswith("rms_norm"):
        raise ImportError("quack's layer_norm has no backward")
    norm = lambda x: rmsnorm(x, weight, eps=EPS)  # noqa: E731
    return adding(norm) if op.startswith("add") else norm


def of_engine(engine: str, op: str, weight: Tensor, bias: Tensor) -> Norm:
    """As megahp's `compute.norms` calls it."""
    theirs = norm_of(engine, "rmsnorm" if op.endswith("rms_norm") else "layernorm")
    norm = lambda x: theirs(x, weight, bias, EPS)  # noqa: E731
    return adding(norm) if op.startswith("add") else norm


PEERS: dict[str, Callable[[str, Tensor, Tensor], Norm]] = {
    "torch": of_torch,
    "compiled": compiled,
    "liger": of_liger,
    "quack": of_quack,
    "apex": partial(of_engine, "apex"),
    "te": partial(of_engine, "transformer-engine"),
}


def seconds(work: Callable[[], object], device: str) -> float:
    """Time of one call; of several on a GPU, whose launches are not to be seen, and of a tiny op."""
    synchronize = torch.cuda.synchronize if device == "cuda" else lambda: None
    work()
    synchronize()
    start = time.perf_counter()
    for _ in range(5):
        work()
    synchronize()
    return (time.perf_counter() - start) / 5


def in_turns(works: dict[str, Callable[[], object]], device: str, turns: int) -> dict[str, float]:
    """The median time of each work in milliseconds; the first turn, a warm-up, is not counted."""
    times: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(turns + 1):
        for name, work in works.items():
            times[name].append(seconds(work, device))
    return {name: 1e3 * statistics.median(several[1:]) for name, several in times.items()}


def candidates(op: str, weight: Tensor, bias: Tensor, probe: Tensor, peers: list[str]) -> dict[str, Norm]:
    norms = {"ours": ours(op, weight, bias, None), "measured": ours(op, weight, bias, probe)}
    for name in peers:
        try:
            norms[name] = PEERS[name](op, weight, bias)
        except (ImportError, UserError):
            continue
    return norms


def forward(norm: Norm, inputs: list[Tensor]) -> Callable[[], object]:
    return lambda: norm(*inputs)


def backward(norm: Norm, inputs: list[Tensor], parameters: list[Tensor], dys: list[Tensor]) -> Callable[[], object]:
    y = norm(*inputs)
    outputs = [y] if isinstance(y, Tensor) else list(y)
    wanted = [*inputs, *parameters]
    return lambda: torch.autograd.grad(outputs, wanted, dys, retain_graph=True, allow_unused=True)


def measure(
    op: str, shape: tuple[int, ...], dtype: torch.dtype, device: str, turns: int, peers: list[str]
) -> Iterator[dict]:
    """A row of results for the forward and one for the backward."""

    def draw(*size: int) -> Tensor:
        return torch.randn(size, dtype=dtype, device=device)

    count = 2 if op.startswith("add") else 1
    inputs, dys = [draw(*shape).requires_grad_() for _ in range(count)], [draw(*shape) for _ in range(count)]
    weight, bias = (draw(shape[-1]).requires_grad_() for _ in range(2))
    probe = torch.zeros((), device=device, requires_grad=True)
    parameters = [weight] if op.endswith("rms_norm") else [weight, bias]
    norms = candidates(op, weight, bias, probe, peers)
    backwards = {
        name: backward(norm, inputs, parameters + [probe] * (name == "measured"), dys) for name, norm in norms.items()
    }
    forwards = {name: forward(norm, inputs) for name, norm in norms.items() if name != "measured"}
    source = torch.randn(max(inputs[0].numel(), 2**28 // dtype.itemsize), device=device).to(dtype)
    target = torch.empty_like(source)
    copied = 2 * source.numel() * dtype.itemsize
    for direction, works, tensors in zip(("forward", "backward"), (forwards, backwards), TENSORS[op], strict=True):
        milliseconds = in_turns({**works, "copy": lambda: target.copy_(source)}, device, turns)
        copy = copied / milliseconds.pop("copy") / 1e6
        moved = tensors * inputs[0].numel() * dtype.itemsize
        speeds = {name: moved / time / 1e6 for name, time in milliseconds.items()}
        yield {
            "op": op,
            "pass": direction,
            "shape": "x".join(map(str, shape)),
            "dtype": str(dtype).removeprefix("torch."),
            "bytes": moved,
            "ms": milliseconds,
            "GB/s": speeds,
            "copy GB/s": copy,
            "share of copy": {name: speed / copy for name, speed in speeds.items()},
        }


def table_row(row: dict) -> str:
    best = "measured" if row["pass"] == "backward" else "ours"
    times = "  ".join(f"{name} {time:.3f}" for name, time in row["ms"].items())
    ratios = ", ".join(
        f"{row['ms'][best] / time:.2f} of {name}"
        for name, time in row["ms"].items()
        if name not in ("ours", "measured")
    )
    speed, share = row["GB/s"][best], row["share of copy"][best]
    what = f"{row['op']:<14} {row['pass']:<8} {row['shape']:<12} {row['dtype']:<8}"
    return f"{what} {times} ms | {speed:.1f} GB/s, copy {share:.0%} | {ratios}"


def machine(device: str) -> dict[str, object]:
    packages = ("liger-kernel", "quack-kernels", "apex", "transformer-engine", "triton")
    versions = {}
    for package in packages:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    name = torch.cuda.get_device_name() if device == "cuda" else platform.processor() or platform.machine()
    capability = torch.backends.cpu.get_cpu_capability()
    threads = torch.get_num_threads()
    return {"device": name, "cpu": capability, "threads": threads, "torch": torch.__version__} | versions


def keep_freed_memory() -> None:
    """glibc: no memory by mmap, none given back (M_MMAP_MAX and M_TRIM_THRESHOLD of malloc.h)."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(-4, 0)
        libc.mallopt(-1, 2**31 - 1)


def plot(rows: list[dict], path: Path) -> None:
    """Share of the copy's bandwidth, a group of bars for each row."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = list(dict.fromkeys(name for row in rows for name in row["ms"]))
    figure, axes = pyplot.subplots(figsize=(9, 1 + 0.14 * len(rows) * len(names)))
    for k, name in enumerate(names):
        there = [i for i, row in enumerate(rows) if name in row["ms"]]
        shares = [rows[i]["share of copy"][name] for i in there]
        axes.barh([i + (k + 0.5) / len(names) * 0.8 for i in there], shares, 0.8 / len(names), label=name)
    labels = [f"{row['op']} {row['pass']} {row['shape']} {row['dtype']}" for row in rows]
    axes.set_yticks([i + 0.4 for i in range(len(rows))], labels, fontsize=6)
    axes.invert_yaxis()
    axes.axvline(1, color="black", linewidth=0.5)
    axes.set_xlabel("share of a large copy's bandwidth")
    axes.legend()
    figure.tight_layout()
    figure.savefig(path)


def main() -> None:
    plain = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=plain)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    parser.add_argument("--op", nargs="+", default=OPS, choices=OPS)
    parser.add_argument("--shape", nargs="+", default=["1x33x7", "8x512x256", "8x1024x1024", "4x2048x4096"])
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--peer", nargs="*", default=list(PEERS), choices=list(PEERS))
    parser.add_argument("--threads", type=int, help="of the CPU; torch's own choice by default")
    parser.add_argument("--turns", type=int, default=11)
    parser.add_argument("--json", type=Path, help="write the rows and the machine here too")
    parser.add_argument("--plot", type=Path, help="draw the shares of the copy's bandwidth here")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    if arguments.device == "cpu":
        keep_freed_memory()

    about, rows = machine(arguments.device), []
    print(about)
    for shape in arguments.shape:
        size = tuple(map(int, shape.split("x")))
        for dtype in arguments.dtype:
            for op in arguments.op:
                kind = getattr(torch, dtype)
                for row in measure(op, size, kind, arguments.device, arguments.turns, arguments.peer):
                    rows.append(row)
                    print(table_row(row), flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps({"machine": about, "rows": rows}, indent=2) + "\n")
    if arguments.plot:
        plot(rows, arguments.plot)


if __name__ == "__main__":
    main()
