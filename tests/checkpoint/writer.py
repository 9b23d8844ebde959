"""A tiny training that saves after every step, in a process of its own that may be killed; light to import, since a
fresh one is forked for every kill."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing import get_context
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megahp import checkpoint
from megahp.config import CheckpointConfig

KEEP = 2


def untrained() -> dict[str, torch.Tensor]:
    return {"weight": torch.zeros(7, 5), "half": torch.zeros(6, dtype=torch.bfloat16), "loss": torch.zeros(())}


def advance(weights: dict[str, torch.Tensor], step: int) -> dict[str, torch.Tensor]:
    """One step of SGD on the step's own sample, so that every bit of the weights depends on every step before."""
    x = torch.randn(5, generator=torch.Generator().manual_seed(step))
    error = weights["weight"] @ x - x.sum()
    weight, half = weights["weight"] - 0.1 * torch.outer(error, x), weights["half"] + error[:6].bfloat16()
    return {"weight": weight, "half": half, "loss": error.square().mean()}


def train(folder: str, steps: int, told: Connection | None = None, fatal: int | None = None) -> None:
    """Go on from the newest checkpoint up to so many steps. A step is told once its save has begun, when those before
    it must be published. The process kills itself at the fatal-th operation on a file there."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    weights, newest, step = untrained(), checkpoint.latest(Path(folder)), 0
    if newest:
        checkpoint.load(newest, weights)
        step = int(newest.name.removeprefix("step-"))
    store = checkpoint.Store(Path(folder), CheckpointConfig(keep=KEEP))
    if fatal is not None:
        sync = os.fsync

        def told_sync(fd: Any) -> None:
            sys.audit("os.fsync", fd)  # which Python does not tell by itself
            sync(fd)

        os.fsync = told_sync
        sys.addaudithook(killer(folder, fatal))
    while step < steps:
        step += 1
        weights = advance(weights, step)
        store.begin(step, weights, {})
        if told:
            told.send(step)
    store.wait()
    os._exit(0)  # gloo's threads race with an orderly teardown


def killer(folder: str, fatal: int) -> Callable[[str, tuple[Any, ...]], None]:
    """What ends the process when Python is about to open, make, sync, rename or remove something in the folder for the
    fatal-th time, counted from 0."""
    left = fatal

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal left
        unnamed = event in ("os.remove", "os.rmdir", "os.fsync")  # by names alone, relative to an open folder
        if unnamed or event in ("open", "os.mkdir", "os.rename") and folder in str(arguments[0]):
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            left -= 1

    return hook


@contextmanager
def started(*arguments: Any) -> Iterator[BaseProcess]:
    """train(*arguments) in a fresh process, forked from one that has imported torch and has no threads."""
    context = get_context("forkserver")
    context.set_forkserver_preload(["__main__", "megahp.checkpoint"])
    process = context.Process(target=train, args=arguments)
    process.start()
    yield process
    process.kill()
    process.join()
