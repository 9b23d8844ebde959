"""Measure what a checkpoint costs: how long training stands still, and how much of the disk's speed is used.

    megahp benchmark checkpoint [RUN.toml] [--ranks N] [--saves 15] [--folder DIR] [--json FILE]
        [--settings section.key=value ...]

The model is the run file's (default: the quick start's, with a vocabulary of 4,096), with random weights, the
optimizer's moments and no data. You see medians over the saves; the first, a warm-up, does not count:

    stall   what training waits for: copies of all tensors, and the start of the background save
    save    the same until every byte is on disk, listed and published: what a synchronous save would take
    load    check all files and fill all tensors, from the page cache and with the cache dropped first
    verify  `megahp checkpoint verify`, in processor time of one core
    disk    the same bytes written to one file per rank and synced; and read back, from the cache and without it

Speeds are in MB/s of the tensors' bytes, of all ranks together; a share is of the disk's own. Save, load and disk take
turns, so that other load on the machine slows them alike. The cache is dropped by posix_fadvise, as far as the system
obeys it. Exit code 2: invalid input.
"""

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist

import megahp
from megahp import checkpoint, launch
from megahp.benchmark.machine import machine_of
from megahp.commands.arguments import check_minimum, must_spawn
from megahp.commands.output import write_json
from megahp.config import CheckpointConfig, Config, resolve, with_values
from megahp.parallel.device import claim_device, uses_cuda, with_fast_dtype
from megahp.parallel.layout import Layout, fit
from megahp.parallel.mesh import make_mesh
from megahp.parallel.messages import on_rank0
from megahp.train.prepare import check_batch
from megahp.train.run import state_of_weights
from megahp.train.trainer import Trainer

QUICKSTART = Path(megahp.__file__).parents[1] / "examples/quickstart/run.toml"  # of a checkout
VOCABULARY = 4096  # the quick start's tokenizer's
TARGET = 0.1  # of the time of a synchronous save
OF_DISK = {"save": "disk write", "load": "disk read", "load, cache dropped": "disk read, cache dropped"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("run", type=Path, nargs="?", default=QUICKSTART, metavar="RUN.toml")
    add("--ranks", type=int, default=1, help="on this machine")
    add("--saves", type=int, default=15, help="turns")
    add("--folder", type=Path, help="on the disk to be measured (default: that of temporary files)")
    add("--json", type=Path, metavar="FILE", help="also write all results here")
    add("--settings", nargs="+", default=[], metavar="section.key=value", help="the model's")


def run(arguments: argparse.Namespace, words: Sequence[str]) -> int:
    check_minimum(arguments, ranks=1, saves=2)
    config = resolve.load(arguments.run, arguments.settings).config
    if not config.model.vocab_size:
        config = with_values(config, {"model.vocab_size": VOCABULARY})
    layout, world = fit(config.parallel, arguments.ranks), launch.world()
    check_batch(config, layout, config.batch.global_batch)
    if must_spawn(arguments.ranks, world.size):
        return launch.spawn(words, arguments.ranks)
    launch.join(world, uses_cuda(config))
    with tempfile.TemporaryDirectory(dir=arguments.folder) as local_folder:
        folder = Path(on_rank0(lambda: local_folder))  # all ranks use rank 0's
        results = benchmark(config, layout, world, folder, arguments.saves)
        dist.barrier()
    if world.rank == 0:
        show(results)
        write_json(arguments.json, {**results, "command": ["megahp", *words]})
    return 0


def benchmark(config: Config, layout: Layout, world: launch.World, folder: Path, saves: int) -> dict[str, Any]:
    """Return all results, as one of the ranks."""
    device = claim_device(config, world)
    config = with_fast_dtype(config, device)
    trainer = Trainer(config, make_mesh(layout, device))
    tensors = trainer.engine.saved | trainer.optimizer.state()
    size = sum(value.numel() * value.element_size() for value in tensors.values())
    store = checkpoint.Store(folder / "checkpoints", CheckpointConfig(keep=1))
    state = state_of_weights(config)
    file, data = folder / "plain" / str(world.rank), os.urandom(size // world.size)
    file.parent.mkdir(exist_ok=True)
    turns: dict[str, list[float]] = {}

    def timed(name: str, work: Callable[[], object], clock: Callable[[], float] = time.perf_counter) -> None:
        dist.barrier()
        began = clock()
        work()
        turns.setdefault(name, []).append(clock() - began)

    for step in range(saves + 1):
        saved = checkpoint.path(folder / "checkpoints", step)
        timed("stall", partial(store.begin, step, tensors, state))
        timed("rest of save", store.wait)
        timed("disk write", partial(write, file, data))
        timed("load", partial(checkpoint.load, saved, tensors))
        timed("disk read", file.read_bytes)
        drop_cache(saved)
        timed("load, cache dropped", partial(checkpoint.load, saved, tensors))
        drop_cache(file.parent)
        timed("disk read, cache dropped", file.read_bytes)
        timed("verify", partial(checkpoint.problems, saved), time.process_time)
    turns["save"] = [sum(parts) for parts in zip(turns["stall"], turns.pop("rest of save"), strict=True)]
    medians = {name: statistics.median(seconds[1:]) for name, seconds in turns.items()}
    machine = {**machine_of(device), "ranks": world.size, "load": round(os.getloadavg()[0], 1)}
    return {"machine": machine, "bytes": size, "tensors": len(tensors), "seconds": medians, "turns": turns}


def write(target: Path, data: bytes) -> None:
    with target.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def drop_cache(folder: Path) -> None:
    """Ask the system to drop a folder's files, which are synced, from the page cache."""
    for file in folder.iterdir():
        descriptor = os.open(file, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def show(results: Mapping[str, Any]) -> None:
    """Print medians, speeds, shares and whether the target is met."""
    seconds, turns, megabytes = results["seconds"], results["turns"], results["bytes"] / 1e6
    print(", ".join(f"{key} {value}" for key, value in results["machine"].items()))
    print(f"{megabytes:,.1f} MB in {results['tensors']} tensors")
    print(f"{'':<26}{'ms':>9}{'MB/s':>9}{'of the disk':>13}")
    for name, median in seconds.items():
        share = f"{seconds[OF_DISK[name]] / median:.0%}" if name in OF_DISK else ""
        print(f"{name:<26}{1e3 * median:>9.1f}{megabytes / median:>9,.0f}{share:>13}")
    ratio = statistics.median(stall / save for stall, save in list(zip(turns["stall"], turns["save"], strict=True))[1:])
    met = "met" if ratio <= TARGET else "not met"
    print(f"stall / synchronous save, median of the turns: {ratio:.3f}; target {TARGET}, {met}")
