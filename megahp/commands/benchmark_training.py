"""Measure the tokens per second of megahp's training step, beside a plain PyTorch baseline on the same tokens.

    megahp benchmark training [--shape 4x256 llama-2-7b ...] [--sequence 256] [--micro-batch 8]
        [--global-batch N] [--vocabulary N] [--dtype float32 bfloat16 ...] [--ranks N] [--tp 1 2 ...] [--device cuda]
        [--contestants megahp nanogpt ...] [--turns 7] [--steps 3] [--warm-up 2] [--peak-tflops T] [--profile]
        [--json FILE] [--plot FILE] [--settings section.key=value ...]

A shape is LAYERSxWIDTH or a preset; the ranks that tp does not use are data parallel; --settings are megahp's, as for
`megahp train`. Contestants: megahp, which measures the noise scale; megahp-without-noise; megahp-dense, beside settings
that make weights sparse; and baselines, on one rank only: nanogpt (megahp/benchmark/nanogpt.py), eager, and
nanogpt-compiled, by torch.compile; huggingface, huggingface-compiled and megatron-core (megahp/benchmark/peers.py), if
their packages are installed. You see a row per contestant, then megahp's speed over each baseline's.

A step is everything that training does between two log lines: a batch from the loader, forward and backward,
reductions, clipping, the update, the noise scale; not the log itself, checkpoints or validation. After a warm-up the
contestants take turns of some steps each, so that other load on the machine slows them alike. Seconds are the median of
the turns; a ratio is the median of the turns' ratios, [between their quartiles]; the last line is of the fastest one.
Processor time is that of rank 0's process, all threads: with OMP_NUM_THREADS=1 it is what a step takes even on a
machine with other load; with several threads it includes their waiting for each other.

MFU: model FLOPs (megahp/scaling/flops.py, attention counted causally, by half) over the peak of all ranks' devices.
The JSON also has mfu_full_attention, with all of attention as nanoGPT, PaLM and torchtitan count it, and hfu, with the
layers that megahp recomputes (compute.recompute=full). The peak is NVIDIA's for dense bf16, where known, or
--peak-tflops; without one there is no MFU.

On a CPU the heap is kept as `megahp train` keeps it, for every contestant; compute.keep_heap=false for none.

Peak memory: on CUDA this contestant's own, on rank 0's device; on a CPU that of rank 0's process with all contestants
in it, so it is one contestant's only if that ran alone.

The split of a step's time (megahp/benchmark/time_split.py) is of steps under the profiler, which slows them. It cannot
separate an operator's dispatch and allocations from its work on a CPU, nor waiting for other ranks from communication;
data preparation and communication that overlap with compute count as compute.

Exit code 2: invalid input.
"""

import argparse
import gc
import importlib.util
import itertools
import math
import os
import resource
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

import numpy as np
import torch
import torch.distributed as dist
from torch.profiler import record_function

from megahp import launch
from megahp.benchmark import nanogpt, peers
from megahp.benchmark.machine import machine_of, synchronize
from megahp.benchmark.time_split import DATA, profile_steps
from megahp.commands.arguments import add_outputs, check_minimum, must_spawn
from megahp.commands.output import plot_bars, write_json
from megahp.config import AUTO, Config, SparsityConfig, config_to_dict, get_setting, resolve
from megahp.config.presets import PRESETS
from megahp.data.loader import Batch, Loader, TrainingData
from megahp.errors import UserError
from megahp.parallel.device import check_devices, claim_device, fast_dtype, keep_heap, uses_cuda
from megahp.parallel.layout import Layout, fit
from megahp.parallel.mesh import Mesh, make_mesh
from megahp.scaling.batch import largest_micro_batch
from megahp.scaling.flops import parameters, training_flops
from megahp.train.prepare import check_batch
from megahp.train.trainer import Trainer

MEGAHP = ("megahp", "megahp-without-noise")
COSTS = {"noise_scale": "megahp-without-noise", "masks": "megahp-dense"}  # a feature -> the contestant without it
NANOGPT = ("nanogpt", "nanogpt-compiled")
PEERS = {  # -> module and package
    "huggingface": ("transformers", "transformers"),
    "huggingface-compiled": ("transformers", "transformers"),
    "megatron-core": ("megatron", "megatron-core psutil"),
}
BASELINES = (*NANOGPT, *PEERS)
PEAKS = {"H200": 989.0}  # dense bf16 TFLOP/s by a part of the device's name (NVIDIA's data sheet)
BASELINE = {  # all that the baseline's code can do
    "model.activation": "swiglu",
    "model.norm": "rmsnorm",
    "model.positions": "rope",
    "model.bias": False,
    "model.qk_norm": False,
    "model.tied_embeddings": False,
    "optimizer.name": "adamw",
    "sparsity.method": "none",
}
VOCABULARY = 4096
POOL = 256  # distinct random samples, which are repeated
PROFILED_STEPS = 2
LABELS = "{shape:<12}{dtype:<9} {layout:<8}"
HEADER = (
    f"{'':<30}{'a step takes':<21}{'tokens/s':>9}{'ms':>9}{'cpu ms':>9}{'MFU':>9}{'GiB':>9}"
    f"{'compute':>9}{'communication':>14}{'data':>9}{'host':>9}"
)
LINE = (
    LABELS + "{contestant:<21}{tokens_per_second:>9,.0f}{ms:>9,.1f}{cpu_ms:>9,.1f}{mfu:>9}{gib:>9.1f}"
    "{compute:>9.1%}{communication:>14.1%}{data:>9.1%}{host:>9.1%}"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--shape", nargs="+", default=["4x256"], help="LAYERSxWIDTH or preset")
    add("--sequence", type=int, default=256, help="tokens")
    add("--micro-batch", type=int, default=8, help="sequences per forward pass of a rank")
    add("--global-batch", type=int, help="sequences per step (default: one microbatch per data-parallel rank)")
    add("--vocabulary", type=int, help=f"token ids (default: the preset's, or {VOCABULARY})")
    add("--dtype", nargs="+", help="default: float32, and bfloat16 where the device has instructions for it")
    add("--ranks", type=int, default=1, help="on this machine")
    add("--tp", type=int, nargs="+", default=[1], help="tensor-parallel ranks, one layout each")
    add("--device", default="auto", choices=["auto", "cpu", "cuda"])
    add("--contestants", nargs="+", choices=[*MEGAHP, "megahp-dense", *BASELINES])
    add("--turns", type=int, default=7)
    add("--steps", type=int, default=3, help="per turn")
    add("--warm-up", type=int, default=2, help="steps before the first turn")
    add("--peak-tflops", type=float, help="of one device, in the dtype")
    add("--profile", action="store_true", help="print the ten costliest operators, or kernels")
    add_outputs(parser, "tokens per second")
    add("--settings", nargs="+", default=[], metavar="section.key=value", help="megahp's")


@dataclass(frozen=True)
class Case:
    """One measurement: a shape in a dtype on a layout."""

    shape: str
    dtype: str
    layout: Layout
    config: Config  # measures the noise scale
    quiet: Config  # does not

    @property
    def labels(self) -> dict[str, Any]:
        return {"shape": self.shape, "dtype": self.dtype, "layout": f"tp{self.layout.tp}dp{self.layout.dp}"}


class RandomData:
    """Uniformly random tokens, in place of a run's TrainingData."""

    stage = 0

    def __init__(self, config: Config) -> None:
        self.length = config.data.sequence_length
        shape = (POOL, self.length + 1)
        self.tokens = np.random.default_rng(0).integers(0, config.model.vocab_size, shape)

    def batch(self, ids: np.ndarray, documents: bool) -> Batch:
        one_document = torch.zeros(len(ids), self.length, dtype=torch.int32) if documents else None
        return Batch(torch.from_numpy(self.tokens[ids % POOL]), one_document, ids)


class Megahp:
    """megahp's own step."""

    def __init__(self, config: Config, mesh: Mesh) -> None:
        self.trainer = Trainer(config, mesh)
        self.loader = Loader(cast(TrainingData, RandomData(config)), mesh.device, config.data.mask_documents)

    def step(self) -> None:
        trainer = self.trainer
        plan = trainer.next_step()
        assert plan is not None
        step = trainer.compute(mark_waiting(trainer.microbatches(self.loader, plan)), plan)
        if not step.measured.finite:
            raise UserError(f"the gradient is not finite at step {plan.step}; lower optimizer.lr")
        trainer.update(step, plan)
        trainer.advance(plan, step.measured)


def mark_waiting(batches: Iterator[Batch]) -> Iterator[Batch]:
    """Yield the batches, and mark the time spent waiting for each in the profile."""
    while True:
        with record_function(DATA):
            batch = next(batches, None)
        if batch is None:
            return
        yield batch


class Baseline:
    """A baseline's step: autocast where its weights are float32, fused AdamW, gradients clipped."""

    def __init__(self, name: str, config: Config, device: torch.device) -> None:
        self.dtype, self.length, self.device = getattr(torch, config.train.dtype), config.data.sequence_length, device
        with device:
            match name.removesuffix("-compiled"):
                case "nanogpt":
                    model: torch.nn.Module = nanogpt.GPT(config.model, self.length)
                case "huggingface":
                    model = peers.HuggingFaceLlama(config.model, self.length)
                case _:
                    model = peers.MegatronGPT(config.model, self.length, self.dtype)
        self.loss: Callable[..., torch.Tensor] = torch.compile(model) if name.endswith("-compiled") else model
        self.weights = list(model.parameters())
        self.optimized = [
            w if w.dtype == torch.float32 else torch.nn.Parameter(w.detach().float()) for w in self.weights
        ]
        self.optimizer = nanogpt.make_optimizer(self.optimized, config.optimizer)
        self.autocast = self.dtype != torch.float32 and self.weights[0].dtype == torch.float32
        self.clip, self.size = config.optimizer.clip, largest_micro_batch(config, self.length)
        self.microbatches = config.batch.global_batch // self.size
        self.data, self.sample = RandomData(config), 0

    def step(self) -> None:
        for _ in range(self.microbatches):
            with record_function(DATA):
                tokens = self.data.batch(np.arange(self.sample, self.sample + self.size), documents=False).tokens
                if self.device.type == "cuda":
                    tokens = tokens.pin_memory().to(self.device, non_blocking=True)
                self.sample += self.size
            with torch.autocast(self.device.type, self.dtype, enabled=self.autocast):
                loss = self.loss(tokens[:, :-1], tokens[:, 1:]) / self.microbatches
            loss.backward()
        copied = [(w, copy) for w, copy in zip(self.weights, self.optimized, strict=True) if w is not copy]
        for weight, copy in copied:
            assert weight.grad is not None
            copy.grad, weight.grad = weight.grad.float(), None
        torch.nn.utils.clip_grad_norm_(self.optimized, self.clip)
        self.optimizer.step()
        with torch.no_grad():
            for weight, copy in copied:
                weight.copy_(copy)
        self.optimizer.zero_grad(set_to_none=True)


@dataclass
class Measurement:
    """One contestant and its timings."""

    contestant: Megahp | Baseline
    allocated: int  # bytes that building it took on the device
    seconds: list[float] = field(default_factory=list)  # per step, one value per turn
    processor_seconds: list[float] = field(default_factory=list)
    peak: int = 0  # bytes of its own


def run(arguments: argparse.Namespace, words: Sequence[str]) -> int:
    counts = ("ranks", "turns", "steps", "warm_up", "micro_batch", "sequence", "global_batch", "vocabulary")
    check_minimum(arguments, **dict.fromkeys(counts, 1))
    if arguments.peak_tflops is not None and not 0 < arguments.peak_tflops < math.inf:
        raise UserError(f"--peak-tflops {arguments.peak_tflops:g} must be above 0")
    if not arguments.dtype:
        is_cuda = arguments.device == "cuda" or arguments.device == "auto" and torch.cuda.is_available()
        arguments.dtype = list(dict.fromkeys(("float32", fast_dtype(torch.device("cuda" if is_cuda else "cpu")))))
    if AUTO in arguments.dtype:
        raise UserError("--dtype auto is decided where a run begins; name float32 or bfloat16, or omit --dtype")
    if arguments.peak_tflops and len(arguments.dtype) > 1:
        raise UserError("--peak-tflops is the peak in one dtype; give one --dtype with it")
    if arguments.contestants is None:
        arguments.contestants = MEGAHP if arguments.ranks > 1 else (*MEGAHP, *NANOGPT)
    if arguments.ranks > 1 and set(arguments.contestants) & set(BASELINES):
        raise UserError(f"--ranks {arguments.ranks}: the baseline runs on one rank; omit it from --contestants")
    for name in set(arguments.contestants) & set(PEERS):
        module, package = PEERS[name]
        if importlib.util.find_spec(module) is None:
            raise UserError(f"--contestants {name} needs {module}; pip install {package}, or omit it")
    combinations = itertools.product(arguments.shape, arguments.tp, arguments.dtype)
    cases = [resolve_case(arguments, *combination) for combination in combinations]
    world = launch.world()
    if must_spawn(arguments.ranks, world.size):
        return launch.spawn(words, arguments.ranks)
    if all(case.config.compute.keep_heap and not uses_cuda(case.config) for case in cases):
        keep_heap()  # as `megahp train` does, for every contestant
    launch.join(world, uses_cuda(cases[0].config))
    benchmark(arguments, cases, world, words)
    return 0


def resolve_case(arguments: argparse.Namespace, shape: str, tp: int, dtype: str) -> Case:
    """Return a shape on a layout in a dtype, checked. Raises UserError."""
    settings = resolve.parse_overrides(arguments.settings)
    parallel = resolve.from_dict({"parallel": {**settings.get("parallel", {}), "tp": tp}}, "--tp").parallel
    layout = fit(parallel, arguments.ranks)
    options: dict[str, dict[str, Any]] = {
        "model": model_settings(shape, arguments.vocabulary),
        "parallel": {"tp": tp},
        "data": {"sequence_length": arguments.sequence},
        "batch": {
            "micro_batch": arguments.micro_batch,
            "global_batch": arguments.global_batch or arguments.micro_batch * layout.dp,
        },
        "train": {"dtype": dtype, "device": arguments.device, "tokens": 10**15},
    }
    by_options = {f"{section}.{key}" for section, keys in options.items() for key in keys} | {"train.noise_scale"}
    by_settings = {f"{section}.{key}" for section, keys in settings.items() for key in keys}
    if double := by_options & by_settings - {"model.heads"}:
        raise UserError(f"--settings: {min(double)} is set by another option; omit it")
    layers = [("options", options), ("command line", settings)]
    config, quiet = (
        resolve.resolve([*layers, ("tool", {"train": {"noise_scale": measured}})]).config for measured in (True, False)
    )
    check_batch(config, layout, config.batch.global_batch)
    check_devices(config, arguments.ranks)
    if set(arguments.contestants) & set(BASELINES):
        for key, value in {**BASELINE, "model.kv_heads": config.model.heads}.items():
            if get_setting(config, key) != value:
                differs = f"{key} = {get_setting(config, key)!r} and the baseline has {value!r}"
                raise UserError(f"{differs}; compare others with --contestants {' '.join(MEGAHP)}")
    if "megahp-dense" in arguments.contestants and config.sparsity.method == "none":
        remedy = "make that sparse: --settings sparsity.method=static"
        raise UserError(f"--contestants megahp-dense is megahp itself; {remedy}")
    return Case(shape, dtype, layout, config, quiet)


def model_settings(shape: str, vocabulary: int | None) -> dict[str, Any]:
    """Return the [model] of LAYERSxWIDTH, with heads of 64 or 128, or of a preset. Raises UserError."""
    vocab_size = {"vocab_size": vocabulary or VOCABULARY}
    if shape in PRESETS:
        return {"preset": shape} | ({} if "vocab_size" in PRESETS[shape] and not vocabulary else vocab_size)
    layers, _, width = shape.partition("x")
    if not (layers.isdecimal() and width.isdecimal()):
        raise UserError(f"--shape {shape} is neither LAYERSxWIDTH, such as 4x256, nor one of: {', '.join(PRESETS)}")
    heads = max(1, int(width) // (64 if int(width) <= 1024 else 128))
    return {"layers": int(layers), "width": int(width), "heads": heads} | vocab_size


def benchmark(arguments: argparse.Namespace, cases: Sequence[Case], world: launch.World, words: Sequence[str]) -> None:
    """Measure every case; rank 0 prints and writes."""
    rows, comparisons, device = [], [], claim_device(cases[0].config, world)
    machine = {**machine_of(device), "ranks": world.size, "load": round(os.getloadavg()[0], 1)}

    def report(line: str) -> None:
        if world.rank == 0:
            print(line, flush=True)

    report(", ".join(f"{key} {value}" for key, value in machine.items()))
    report(HEADER)
    for case in cases:
        gc.collect()  # the last case's trainers, before memory is measured
        if device.type == "cuda":
            torch.cuda.empty_cache()
        try:
            case_rows = measure(case, arguments, device)
        except torch.OutOfMemoryError:
            if arguments.ranks > 1:  # end all ranks: the others would wait for this one
                raise
            report(LABELS.format(**case.labels) + "out of memory")
            continue
        for row in case_rows:
            columns = {
                "ms": 1e3 * row["seconds"],
                "cpu_ms": 1e3 * row["processor_seconds"],
                "mfu": "-" if row["mfu"] is None else f"{row['mfu']:.1%}",
                "gib": row["peak_memory"] / 2**30,
            }
            report(LINE.format(**row | row["split"] | columns))
            for event in row["costliest"]:
                report("    {share:>6.1%} {ms:>9.2f} ms {calls:>6.0f} x  {name}".format(**event))
        comparisons.append(compare(case, case_rows))
        if lines := format_comparison(comparisons[-1]):
            report(lines)
        rows += case_rows
    if compared := [comparison for comparison in comparisons if "speedup" in comparison]:
        wall, processor = (
            statistics.geometric_mean(comparison[key]["median"] for comparison in compared)
            for key in ("speedup", "processor_speedup")
        )
        means = f"{wall:.3f} times the fastest baseline; processor time: {processor:.3f}"
        report(f"geometric mean of {len(compared)}: {means}")
    if world.rank == 0:
        results = {
            "machine": machine,
            "command": ["megahp", *words],
            "flops": "matrix products, attention causal (half)",
            "rows": rows,
            "comparisons": comparisons,
            "settings": [{**case.labels, **config_to_dict(case.config)} for case in cases],
        }
        write_json(arguments.json, results)
        if arguments.plot:
            groups = list(dict.fromkeys(LABELS.format(**row) for row in rows))
            series: dict[str, dict[int, float]] = {row["contestant"]: {} for row in rows}
            for row in rows:
                series[row["contestant"]][groups.index(LABELS.format(**row))] = row["tokens_per_second"]
            plot_bars(arguments.plot, groups, series, "tokens per second")


def measure(case: Case, arguments: argparse.Namespace, device: torch.device) -> list[dict[str, Any]]:
    """Return a row for each contestant."""
    mesh = make_mesh(case.layout, device)
    make: dict[str, Callable[[], Megahp]] = {
        "megahp": lambda: Megahp(case.config, mesh),
        "megahp-without-noise": lambda: Megahp(case.quiet, mesh),
        "megahp-dense": lambda: Megahp(replace(case.config, sparsity=SparsityConfig()), mesh),
    }
    measurements = {}
    for name in arguments.contestants:
        before = allocated(device)
        contestant = Baseline(name, case.config, device) if name in BASELINES else make[name]()
        for _ in range(arguments.warm_up):
            contestant.step()
        measurements[name] = Measurement(contestant, allocated(device) - before)
    for measurement in list(measurements.values()) * arguments.turns:
        others = allocated(device) - measurement.allocated  # the other contestants' memory does not count
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        seconds, processor_seconds = time_step(measurement.contestant, arguments.steps, device)
        measurement.seconds.append(seconds)
        measurement.processor_seconds.append(processor_seconds)
        measurement.peak = max(measurement.peak, peak_memory(device) - others)
    return [make_row(case, arguments, name, measurement, device) for name, measurement in measurements.items()]


def time_step(contestant: Megahp | Baseline, steps: int, device: torch.device) -> tuple[float, float]:
    """Return the wall and processor seconds of one step, averaged over some."""
    dist.barrier()
    synchronize(device)
    began, processor_began = time.perf_counter(), time.process_time()
    for _ in range(steps):
        contestant.step()
    synchronize(device)
    return (time.perf_counter() - began) / steps, (time.process_time() - processor_began) / steps


def allocated(device: torch.device) -> int:
    """Return the bytes of tensors on the device; 0 on a CPU, where torch does not count them."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def peak_memory(device: torch.device) -> int:
    """Return the peak bytes of tensors on the device since the last reset; on a CPU this process's peak ever."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts KiB


def make_row(
    case: Case, arguments: argparse.Namespace, name: str, measurement: Measurement, device: torch.device
) -> dict[str, Any]:
    """Return all results of one contestant, after some more steps under the profiler."""
    config, seconds = case.config, statistics.median(measurement.seconds)
    shape = config.model, config.data.sequence_length
    tokens = config.step_tokens
    recomputed = 0 if name in BASELINES else recomputed_layers(config)
    causal, full = training_flops(*shape, True, 0), training_flops(*shape, False, 0)
    hardware = training_flops(*shape, True, recomputed)
    peak = (arguments.peak_tflops or 0.0) * 1e12 * arguments.ranks
    if not peak and device.type == "cuda" and case.dtype == "bfloat16":
        known = (tflops for part, tflops in PEAKS.items() if part in torch.cuda.get_device_name(device))
        peak = next(known, 0.0) * 1e12 * arguments.ranks
    split, costliest = profile_steps(
        lambda: time_step(measurement.contestant, PROFILED_STEPS, device)[0], PROFILED_STEPS, device
    )
    return {
        **case.labels,
        "contestant": name,
        "parameters": parameters(*shape),
        "ranks": arguments.ranks,
        "tokens_per_step": tokens,
        "seconds": seconds,
        "processor_seconds": statistics.median(measurement.processor_seconds),
        "turns": measurement.seconds,
        "processor_turns": measurement.processor_seconds,
        "tokens_per_second": tokens / seconds,
        "model_flops_per_token": causal,
        "mfu": tokens * causal / seconds / peak if peak else None,
        "mfu_full_attention": tokens * full / seconds / peak if peak else None,
        "hfu": tokens * hardware / seconds / peak if peak else None,
        "peak_memory": measurement.peak,
        "split": split,
        "costliest": costliest if arguments.profile else [],
    }


def recomputed_layers(config: Config) -> int:
    """Return the layers whose matrix products the backward pass repeats; selective recomputation keeps them."""
    compute = config.compute
    return -(-config.model.layers // compute.recompute_every) if compute.recompute == "full" else 0


def compare(case: Case, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return megahp's speed over each baseline's, and its time over that without a feature."""
    comparison: dict[str, Any] = {**case.labels}
    for clock, prefix in (("turns", ""), ("processor_turns", "processor_")):
        turns = {row["contestant"]: row[clock] for row in rows}
        baselines = [name for name in BASELINES if name in turns]
        if "megahp" in turns and baselines:
            fastest = min(baselines, key=lambda name: statistics.median(turns[name]))
            ratios = {name: ratio(turns[name], turns["megahp"]) for name in baselines}
            comparison |= {f"{prefix}{key}": value for key, value in (("baseline", fastest), ("speedups", ratios))}
            comparison[f"{prefix}speedup"] = ratios[fastest]
        for feature, without in COSTS.items():
            if {"megahp", without} <= set(turns):
                comparison[f"{prefix}{feature}"] = ratio(turns["megahp"], turns[without])
    return comparison


def ratio(numerators: Sequence[float], denominators: Sequence[float]) -> dict[str, float]:
    """Return the median and quartiles of the turns' ratios."""
    ratios = [a / b for a, b in zip(numerators, denominators, strict=True)]
    low, median, high = np.quantile(ratios, (0.25, 0.5, 0.75)).tolist()
    return {"low": low, "median": median, "high": high}


def format_comparison(comparison: Mapping[str, Any]) -> str:
    """Return a line for each baseline, and one for what features cost; wall time, then processor time."""
    lines, clocks = [], (("", ""), ("; processor time ", "processor_"))
    for name in comparison.get("speedups", {}):
        ratios = (
            "{}{median:.3f} [{low:.3f}, {high:.3f}]".format(clock, **comparison[f"{prefix}speedups"][name])
            for clock, prefix in clocks
        )
        lines.append(f"{''.join(ratios)} times {name}")
    for feature in COSTS:
        costs = [
            "{}{:+.1f} % [{:+.1f}, {:+.1f}]".format(
                clock, *(100 * (comparison[f"{prefix}{feature}"][key] - 1) for key in ("median", "low", "high"))
            )
            for clock, prefix in clocks
            if f"{prefix}{feature}" in comparison
        ]
        if costs:
            lines.append(f"{feature.replace('_', ' ')} {''.join(costs)}")
    return "\n".join(LABELS.format(**comparison) + line for line in lines)
