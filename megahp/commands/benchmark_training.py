"""Tokens per second of megahp's training step, beside a plain PyTorch baseline on the same tokens.

    megahp benchmark training [--shape 4x256 llama-2-7b ...] [--sequence 256] [--micro-batch 8]
        [--global-batch N] [--vocabulary N] [--dtype float32 bfloat16] [--ranks N] [--tp 1 2 ...] [--device cuda]
        [--contestants megahp nanogpt ...] [--turns 7] [--steps 3] [--warm-up 2] [--peak-tflops T] [--profile]
        [--json FILE] [--plot FILE] [--settings section.key=value ...]

A shape is LAYERSxWIDTH or a preset; data parallelism takes the ranks that tp leaves; further settings, of megahp alone,
are given as to `megahp train`. Contestants: megahp, which measures the noise scale as it goes;
megahp-without-noise; megahp-dense, beside settings that make weights sparse; nanogpt, eager; nanogpt-compiled, by
torch.compile. The baseline, megahp/benchmark/nanogpt.py, is one rank's.

A step is all that training does between two lines of its log: a batch through the loader, forward and backward,
reductions, clipping, the update, the noise scale; not the log itself, checkpoints or validation. After a warm-up the
contestants take turns of some steps each, so that a busy machine slows them alike. Seconds are the median of the
turns; a ratio is the median of the turns' ratios, [between their quartiles], and is to the faster baseline. Processor
time is that of rank 0's process, all threads: with OMP_NUM_THREADS=1 it is what a step takes even on a machine that
others use too; with several threads it also counts their waiting for each other.

MFU: model FLOPs (megahp/scaling/flops.py, attention counted causally, by half) over the peak of all ranks' devices.
The JSON holds mfu_full_attention, with all of attention as nanoGPT, PaLM and torchtitan count it, and hfu, with the
layers that megahp computes again (compute.recompute=full). The peak is NVIDIA's for dense bf16, where known, or
--peak-tflops; without one there is no MFU.

Peak memory: on CUDA this contestant's own, of rank 0's device; on a CPU that of rank 0's process, with every
contestant in it, so that it tells of one only if that ran alone.

The split of a step's time (megahp/benchmark/time_split.py) is of steps under the profiler, which slows them. What
cannot be told apart: an operator's dispatch and allocations from its work on a CPU; waiting for other ranks from
communication; and data that is prepared, or communication that goes on, behind compute is counted as compute.

Exit code 2 means a mistake in what was given.
"""

import argparse
import gc
import itertools
import math
import os
import resource
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.distributed as dist
from torch.profiler import record_function

from megahp import launch
from megahp.benchmark import nanogpt
from megahp.benchmark.machine import machine_of, synchronize
from megahp.benchmark.time_split import DATA, profiled
from megahp.commands.arguments import add_outputs, check_minimum, must_spawn
from megahp.commands.output import write_json
from megahp.config import Config, SparsityConfig, config_to_dict, get_setting, resolve
from megahp.config.presets import PRESETS
from megahp.data.loader import Batch, Loader, TrainingData
from megahp.errors import UserError
from megahp.parallel.device import check_devices, cuda_wanted, device_of
from megahp.parallel.layout import Layout, fit
from megahp.parallel.mesh import Mesh, make_mesh
from megahp.scaling.flops import parameters, training_flops
from megahp.train.prepare import check_batch
from megahp.train.trainer import Trainer

MEGAHP = ("megahp", "megahp-without-noise")
COSTS = {"noise_scale": "megahp-without-noise", "masks": "megahp-dense"}  # what costs time: who goes without it
BASELINES = ("nanogpt", "nanogpt-compiled")
PEAKS = {"H200": 989.0}  # TFLOP/s in bf16, dense, by a part of the device's name (NVIDIA's data sheet)
# What the baseline is. Other models, and Muon, have none.
BASELINE = {
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
POOL = 256  # made-up samples, dealt again and again
PROFILED_STEPS = 2
LABELS = "{shape:<12}{dtype:<9} {layout:<8}"
NAMES = ("tokens/s", "ms", "cpu ms", "MFU", "GiB", "compute", "communication", "data", "host")
COLUMNS = [f"{name:>{max(8, len(name)) + 1}}" for name in NAMES]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--shape", nargs="+", default=["4x256"], help="LAYERSxWIDTH or preset")
    add("--sequence", type=int, default=256, help="tokens")
    add("--micro-batch", type=int, default=8, help="sequences of one rank's forward pass")
    add("--global-batch", type=int, help="sequences a step (default: one microbatch a rank)")
    add("--vocabulary", type=int, help=f"token ids (default: the preset's, or {VOCABULARY})")
    add("--dtype", nargs="+", default=["float32", "bfloat16"])
    add("--ranks", type=int, default=1, help="on this machine")
    add("--tp", type=int, nargs="+", default=[1], help="tensor-parallel ranks, one layout each")
    add("--device", default="auto", choices=["auto", "cpu", "cuda"])
    add("--contestants", nargs="+", choices=[*MEGAHP, "megahp-dense", *BASELINES])
    add("--turns", type=int, default=7)
    add("--steps", type=int, default=3, help="of one turn")
    add("--warm-up", type=int, default=2, help="steps before the first turn")
    add("--peak-tflops", type=float, help="of one device, in the dtype")
    add("--profile", action="store_true", help="name the ten costliest operators, or kernels")
    add_outputs(parser, "tokens per second")
    add("--settings", nargs="+", default=[], metavar="section.key=value", help="of megahp")


@dataclass(frozen=True)
class Case:
    """What is measured in one go: a shape in a dtype on a layout."""

    shape: str
    dtype: str
    layout: Layout
    config: Config  # with the noise scale measured
    quiet: Config  # without

    @property
    def labels(self) -> dict[str, Any]:
        return {"shape": self.shape, "dtype": self.dtype, "layout": f"tp{self.layout.tp}dp{self.layout.dp}"}


class MadeUp:
    """Uniformly random tokens, where megahp's loader expects a run's data."""

    stage = 0

    def __init__(self, config: Config) -> None:
        self.length = config.data.sequence_length
        shape = (POOL, self.length + 1)
        self.tokens = np.random.default_rng(0).integers(0, config.model.vocab_size, shape)

    def batch(self, ids: np.ndarray, documents: bool) -> Batch:
        places = torch.zeros(len(ids), self.length, dtype=torch.int32) if documents else None
        return Batch(torch.from_numpy(self.tokens[ids % POOL]), places, ids)


class Megahp:
    """megahp's own step."""

    def __init__(self, config: Config, mesh: Mesh) -> None:
        self.trainer = Trainer(config, mesh)
        self.loader = Loader(cast(TrainingData, MadeUp(config)), mesh.device, config.data.mask_documents)

    def step(self) -> None:
        trainer = self.trainer
        plan = trainer.next_step()
        assert plan is not None
        step = trainer.compute(recorded(trainer.microbatches(self.loader, plan)), plan)
        if not step.measured.finite:
            raise UserError(f"the gradient is not finite at step {plan.step}; lower optimizer.lr")
        trainer.update(step, plan)
        trainer.advance(plan, step.measured)


def recorded(batches: Iterator[Batch]) -> Iterator[Batch]:
    """The same, with the time it takes to get each marked in the profile."""
    while True:
        with record_function(DATA):
            batch = next(batches, None)
        if batch is None:
            return
        yield batch


class NanoGPT:
    """The baseline's step."""

    def __init__(self, config: Config, device: torch.device, compiled: bool) -> None:
        with device:
            self.model = nanogpt.GPT(config.model, config.data.sequence_length)
        self.forward: Callable[..., torch.Tensor] = torch.compile(self.model) if compiled else self.model
        self.optimizer = nanogpt.make_optimizer(self.model, config.optimizer)
        self.device, self.clip, self.size = device, config.optimizer.clip, config.batch.micro_batch
        self.microbatches = config.batch.global_batch // self.size
        self.dtype = getattr(torch, config.train.dtype)
        self.data, self.sample = MadeUp(config), 0

    def step(self) -> None:
        for _ in range(self.microbatches):
            with record_function(DATA):
                tokens = self.data.batch(np.arange(self.sample, self.sample + self.size), documents=False).tokens
                if self.device.type == "cuda":
                    tokens = tokens.pin_memory().to(self.device, non_blocking=True)
                self.sample += self.size
            with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
                loss = self.forward(tokens[:, :-1], tokens[:, 1:]) / self.microbatches
            loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


@dataclass
class Lane:
    """One contestant and what was measured of it."""

    contestant: Megahp | NanoGPT
    held: int  # bytes that were allocated on the device to build it
    seconds: list[float] = field(default_factory=list)  # a step, one value a turn
    processor_seconds: list[float] = field(default_factory=list)
    peak: int = 0  # bytes of its own at most


def run(arguments: argparse.Namespace, words: Sequence[str]) -> int:
    numbers = ("ranks", "turns", "steps", "warm_up", "micro_batch", "sequence", "global_batch", "vocabulary")
    check_minimum(arguments, **dict.fromkeys(numbers, 1))
    if arguments.peak_tflops is not None and not 0 < arguments.peak_tflops < math.inf:
        raise UserError(f"--peak-tflops {arguments.peak_tflops:g} must be above 0")
    if arguments.peak_tflops and len(arguments.dtype) > 1:
        raise UserError("--peak-tflops is the peak in one dtype; give one --dtype with it")
    if arguments.contestants is None:
        arguments.contestants = MEGAHP if arguments.ranks > 1 else (*MEGAHP, *BASELINES)
    if arguments.ranks > 1 and set(arguments.contestants) & set(BASELINES):
        raise UserError(f"--ranks {arguments.ranks}: the baseline is one rank's; leave it out of --contestants")
    each = itertools.product(arguments.shape, arguments.tp, arguments.dtype)
    cases = [case_of(arguments, *names) for names in each]
    place = launch.world()
    if must_spawn(arguments.ranks, place.size):
        return launch.spawn(words, arguments.ranks)
    launch.join(place, cuda_wanted(cases[0].config))
    benchmark(arguments, cases, place, words)
    return 0


def case_of(arguments: argparse.Namespace, shape: str, tp: int, dtype: str) -> Case:
    """A shape on a layout in a dtype, checked. Raises UserError."""
    layout = fit(resolve.from_dict({"parallel": {"tp": tp}}, "--tp").parallel, arguments.ranks)
    global_batch = arguments.global_batch or arguments.micro_batch * layout.dp
    tree: dict[str, dict[str, Any]] = {
        "model": model_of(shape, arguments.vocabulary),
        "parallel": {"tp": tp},
        "data": {"sequence_length": arguments.sequence},
        "batch": {"micro_batch": arguments.micro_batch, "global_batch": global_batch},
        "train": {"dtype": dtype, "device": arguments.device, "tokens": 10**15},
    }
    further = resolve.parse_overrides(arguments.settings)
    decided = {f"{section}.{key}" for section, keys in tree.items() for key in keys} | {"train.noise_scale"}
    asked = {f"{section}.{key}" for section, keys in further.items() for key in keys}
    if double := decided & asked - {"model.heads"}:
        raise UserError(f"--settings: {min(double)} is what another option decides; leave it out")
    noise, quiet = (
        resolve.resolve([("options", tree), ("command line", further), ("tool", {"train": {"noise_scale": on}})]).config
        for on in (True, False)
    )
    check_batch(noise, layout, noise.batch.global_batch)
    check_devices(noise, arguments.ranks)
    if set(arguments.contestants) & set(BASELINES):
        for key, value in {**BASELINE, "model.kv_heads": noise.model.heads}.items():
            if get_setting(noise, key) != value:
                unlike = f"{key} = {get_setting(noise, key)!r} and the baseline has {value!r}"
                raise UserError(f"{unlike}; compare others with --contestants {' '.join(MEGAHP)}")
    if "megahp-dense" in arguments.contestants and noise.sparsity.method == "none":
        remedy = "make that sparse: --settings sparsity.method=static"
        raise UserError(f"--contestants megahp-dense is megahp itself; {remedy}")
    return Case(shape, dtype, layout, noise, quiet)


def model_of(shape: str, vocabulary: int | None) -> dict[str, Any]:
    """Settings of LAYERSxWIDTH, with heads of 64 or 128, or of a preset. Raises UserError."""
    vocab_size = {"vocab_size": vocabulary or VOCABULARY}
    if shape in PRESETS:
        return {"preset": shape} | ({} if "vocab_size" in PRESETS[shape] and not vocabulary else vocab_size)
    layers, _, width = shape.partition("x")
    if not (layers.isdecimal() and width.isdecimal()):
        raise UserError(f"--shape {shape} is neither LAYERSxWIDTH, such as 4x256, nor one of: {', '.join(PRESETS)}")
    heads = max(1, int(width) // (64 if int(width) <= 1024 else 128))
    return {"layers": int(layers), "width": int(width), "heads": heads} | vocab_size


def benchmark(arguments: argparse.Namespace, cases: Sequence[Case], place: launch.World, words: Sequence[str]) -> None:
    """Measure every case as one of the ranks; the first one prints and writes."""
    first, rows, verdicts, device = place.rank == 0, [], [], device_of(cases[0].config, place)
    machine = {**machine_of(device), "ranks": place.size, "load": round(os.getloadavg()[0], 1)}
    tell = print if first else lambda *_, **__: None
    tell(", ".join(f"{key} {value}" for key, value in machine.items()), flush=True)
    tell(f"{'':<30}{'a step takes':<21}" + "".join(COLUMNS), flush=True)
    for case in cases:
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
        try:
            found = measure(case, arguments, device)
        except torch.OutOfMemoryError:
            if arguments.ranks > 1:  # all end, since the others would wait for this one
                raise
            tell(LABELS.format(**case.labels) + "out of memory", flush=True)
            continue
        for row in found:
            tell(LABELS.format(**row) + f"{row['contestant']:<21}" + numbers(row), flush=True)
            for event in row["costliest"]:
                tell("    {share:>6.1%} {ms:>9.2f} ms {calls:>6.0f} x  {name}".format(**event), flush=True)
        verdicts.append(compare(case, found))
        tell(sentence(verdicts[-1]), flush=True)
        rows += found
    if compared := [verdict for verdict in verdicts if "speedup" in verdict]:
        mean = statistics.geometric_mean(verdict["speedup"]["median"] for verdict in compared)
        of_processor = statistics.geometric_mean(verdict["processor_speedup"]["median"] for verdict in compared)
        said = f"{mean:.3f} times the faster baseline; processor time: {of_processor:.3f}"
        tell(f"geometric mean of {len(compared)}: {said}", flush=True)
    if first:
        everything = {
            "machine": machine,
            "command": ["megahp", *words],
            "flops": "matrix products, attention causal (half)",
            "rows": rows,
            "comparisons": verdicts,
            "settings": [{**case.labels, **config_to_dict(case.config)} for case in cases],
        }
        write_json(arguments.json, everything)
    if first and arguments.plot:
        plot(arguments.plot, rows)


def measure(case: Case, arguments: argparse.Namespace, device: torch.device) -> list[dict[str, Any]]:
    """One row of results for each contestant."""
    mesh = make_mesh(case.layout, device)
    make: dict[str, Callable[[], Megahp | NanoGPT]] = {
        "megahp": lambda: Megahp(case.config, mesh),
        "megahp-without-noise": lambda: Megahp(case.quiet, mesh),
        "megahp-dense": lambda: Megahp(replace(case.config, sparsity=SparsityConfig()), mesh),
        "nanogpt": lambda: NanoGPT(case.config, device, compiled=False),
        "nanogpt-compiled": lambda: NanoGPT(case.config, device, compiled=True),
    }
    lanes = {}
    for name in arguments.contestants:
        before = allocated(device)
        contestant = make[name]()
        for _ in range(arguments.warm_up):
            contestant.step()
        lanes[name] = Lane(contestant, allocated(device) - before)
    for lane in list(lanes.values()) * arguments.turns:
        others = allocated(device) - lane.held  # whose memory is not counted
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        seconds, processor_seconds = time_of(lane.contestant, arguments.steps, device)
        lane.seconds.append(seconds)
        lane.processor_seconds.append(processor_seconds)
        lane.peak = max(lane.peak, peak_memory(device) - others)
    return [row_of(case, arguments, name, lane, device) for name, lane in lanes.items()]


def time_of(contestant: Megahp | NanoGPT, steps: int, device: torch.device) -> tuple[float, float]:
    """Seconds of one step, averaged over some, and those its process ran."""
    dist.barrier()
    synchronize(device)
    began, processor_began = time.perf_counter(), time.process_time()
    for _ in range(steps):
        contestant.step()
    synchronize(device)
    return (time.perf_counter() - began) / steps, (time.process_time() - processor_began) / steps


def allocated(device: torch.device) -> int:
    """Bytes of tensors on the device; 0 on a CPU, where nobody counts."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def peak_memory(device: torch.device) -> int:
    """Most bytes of tensors on the device since it was last asked; on a CPU the most this process ever had."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def row_of(case: Case, arguments: argparse.Namespace, name: str, lane: Lane, device: torch.device) -> dict[str, Any]:
    """Everything known of one contestant."""
    config, seconds = case.config, statistics.median(lane.seconds)
    tokens = config.batch.global_batch * config.data.sequence_length
    again = 0 if name in BASELINES else recomputed_layers(config)
    shape = config.model, config.data.sequence_length
    flops, full, hardware = (training_flops(*shape, *counted) for counted in ((True, 0), (False, 0), (True, again)))
    peak = (arguments.peak_tflops or 0.0) * 1e12 * arguments.ranks
    if not peak and device.type == "cuda" and case.dtype == "bfloat16":
        known = (tflops for name, tflops in PEAKS.items() if name in torch.cuda.get_device_name(device))
        peak = next(known, 0.0) * 1e12 * arguments.ranks
    split, costliest = profiled(lambda: time_of(lane.contestant, PROFILED_STEPS, device)[0], PROFILED_STEPS, device)
    return {
        **case.labels,
        "contestant": name,
        "parameters": parameters(config.model, config.data.sequence_length),
        "ranks": arguments.ranks,
        "tokens_per_step": tokens,
        "seconds": seconds,
        "processor_seconds": statistics.median(lane.processor_seconds),
        "turns": lane.seconds,
        "processor_turns": lane.processor_seconds,
        "tokens_per_second": tokens / seconds,
        "model_flops_per_token": flops,
        "mfu": tokens * flops / seconds / peak if peak else None,
        "mfu_full_attention": tokens * full / seconds / peak if peak else None,
        "hfu": tokens * hardware / seconds / peak if peak else None,
        "peak_memory": lane.peak,
        "split": split,
        "costliest": costliest if arguments.profile else [],
    }


def recomputed_layers(config: Config) -> int:
    """Layers whose matrix products are made again in the backward pass; selective recomputation keeps them."""
    compute = config.compute
    return -(-config.model.layers // compute.recompute_every) if compute.recompute == "full" else 0


def compare(case: Case, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """megahp's speed over the faster baseline's, and what the noise scale and masks cost of its time."""
    verdict: dict[str, Any] = {**case.labels}
    for clock, prefix in (("turns", ""), ("processor_turns", "processor_")):
        turns = {row["contestant"]: row[clock] for row in rows}
        baselines = [name for name in BASELINES if name in turns]
        if "megahp" in turns and baselines:
            fastest = min(baselines, key=lambda name: statistics.median(turns[name]))
            verdict |= {f"{prefix}baseline": fastest, f"{prefix}speedup": ratio(turns[fastest], turns["megahp"])}
        for what, without in COSTS.items():
            if {"megahp", without} <= set(turns):
                verdict[f"{prefix}{what}"] = ratio(turns["megahp"], turns[without])
    return verdict


def ratio(numerators: Sequence[float], denominators: Sequence[float]) -> dict[str, float]:
    """Median and quartiles of the turns' ratios."""
    ratios = [a / b for a, b in zip(numerators, denominators, strict=True)]
    low, median, high = np.quantile(ratios, (0.25, 0.5, 0.75)).tolist()
    return {"low": low, "median": median, "high": high}


def sentence(verdict: Mapping[str, Any]) -> str:
    """The comparison, in a line."""
    parts = []
    for clock, prefix in (("", ""), ("processor time: ", "processor_")):
        if speed := verdict.get(f"{prefix}speedup"):
            numbers = "{median:.3f} [{low:.3f}, {high:.3f}]".format(**speed)
            parts.append(f"{clock}{numbers} times {verdict[f'{prefix}baseline']}")
        for what in [what for what in COSTS if f"{prefix}{what}" in verdict]:
            cost, low, high = (100 * (verdict[f"{prefix}{what}"][key] - 1) for key in ("median", "low", "high"))
            parts.append(f"{clock}{what.replace('_', ' ')} {cost:+.1f} % [{low:+.1f}, {high:+.1f}]")
    return LABELS.format(**verdict) + "; ".join(parts)


def numbers(row: Mapping[str, Any]) -> str:
    """A row's values under COLUMNS."""
    values = (
        f"{row['tokens_per_second']:,.0f}",
        f"{1e3 * row['seconds']:,.1f}",
        f"{1e3 * row['processor_seconds']:,.1f}",
        "-" if row["mfu"] is None else f"{row['mfu']:.1%}",
        f"{row['peak_memory'] / 2**30:.1f}",
        *(f"{row['split'][name]:.1%}" for name in ("compute", "communication", "data", "host")),
    )
    return "".join(f"{value:>{len(name)}}" for name, value in zip(COLUMNS, values, strict=True))


def plot(file: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Draw tokens per second, one group of bars a case. Raises UserError."""
    from megahp.report.figures import PALETTE, colour, plot_in

    cases = list(dict.fromkeys(LABELS.format(**row) for row in rows))
    names = list(dict.fromkeys(row["contestant"] for row in rows))
    with plot_in(file, 6, 1 + 0.25 * len(rows)) as figure:
        axes = figure.add_subplot()
        for number, name in enumerate(names):
            mine = [row for row in rows if row["contestant"] == name]
            places = [cases.index(LABELS.format(**row)) + 0.8 * number / len(names) for row in mine]
            speeds = [row["tokens_per_second"] for row in mine]
            axes.barh(places, speeds, 0.7 / len(names), align="edge", color=PALETTE[colour(number)], label=name)
        axes.set_yticks([place + 0.4 for place in range(len(cases))], cases)
        axes.invert_yaxis()
        axes.set_xlabel("tokens per second")
        axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
