"""Real ranks for tests. Starting one costs three seconds of CPU, so worlds of gloo live on: one of each size serves all
files of tests."""

from __future__ import annotations

import atexit
import contextlib
import functools
import os
import pickle
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed import device_mesh


def run(ranks: int, function: Callable[..., Any], *arguments: Any, timeout: float = 300) -> list[Any]:
    """Return what `function(*arguments)` returned on each rank. A rank's exception fails the test."""
    world = _lasting(ranks)
    if world.broken:
        _lasting.cache_clear()
        world = _lasting(ranks)
    return world.run(function, *arguments, timeout=timeout)


def run_afresh(ranks: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """The same on ranks that nobody has used, or will, for what leaves traces in a process: compilers, environment."""
    with contextlib.closing(World(ranks, daemon=False)) as world:  # daemons may have no children
        return world.run(function, *arguments)


class World:
    """So many ranks, each a process that waits for its next function."""

    def __init__(self, ranks: int, daemon: bool = True) -> None:
        context, self.broken = mp.get_context("spawn"), False
        self.folder = tempfile.TemporaryDirectory()
        pipes = [context.Pipe() for _ in range(ranks)]
        self.connections = [own for own, _ in pipes]
        self.processes = [
            context.Process(target=_rank, args=(self.folder.name, rank, ranks, theirs), daemon=daemon)
            for rank, (_, theirs) in enumerate(pipes)
        ]
        for process, (_, theirs) in zip(self.processes, pipes, strict=True):
            process.start()
            theirs.close()

    def run(self, function: Callable[..., Any], *arguments: Any, timeout: float = 300) -> list[Any]:
        job = pickle.dumps((function, arguments))
        for connection in self.connections:
            connection.send((sys.path, dict(os.environ), os.getcwd(), job))
        end, outcomes = time.monotonic() + timeout, []
        for connection in self.connections:
            try:
                there = connection.poll(max(0.0, end - time.monotonic()))
                outcomes.append(pickle.loads(connection.recv_bytes()) if there else ("it hung", None))
            except EOFError:
                outcomes.append(("it left no result", None))
            if outcomes[-1][0]:
                end = min(end, time.monotonic() + 5)  # the others may wait for it
        errors = [f"rank {rank}: {error}" for rank, (error, _) in enumerate(outcomes) if error]
        if errors:
            self.close()
        assert not errors, "\n".join(errors)
        return [value for _, value in outcomes]

    def close(self) -> None:
        self.broken = True
        for process in self.processes:
            process.kill()
            process.join()
        self.folder.cleanup()


@functools.cache
def _lasting(ranks: int) -> World:
    world = World(ranks)
    atexit.register(world.close)
    return world


def _rank(folder: str, rank: int, ranks: int, connection: Connection) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", ranks)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks)
    with mock.patch.object(device_mesh, "new_group", _shared(device_mesh.new_group)):
        for job in _jobs(connection):
            error, value = None, None
            try:
                function, arguments = pickle.loads(job)
                value = function(*arguments)
                dist.barrier()
            except Exception:
                error = traceback.format_exc()
            connection.send_bytes(pickle.dumps((error, value)))
    os._exit(0)  # gloo's threads race with an orderly teardown


def _shared(new_group: Callable[..., Any]) -> Callable[..., Any]:
    """One group of the same ranks for all meshes, as PyTorch has it for all ranks: each of gloo's has three threads
    that wake a hundred times a second, so that those of forty layouts, idle, take a core."""
    groups: dict[Any, Any] = {}

    def group_of(ranks: list[int], backend: Any = None, **options: Any) -> Any:
        key = tuple(ranks), backend
        if key not in groups:
            groups[key] = new_group(ranks=ranks, backend=backend, **options)
        return groups[key]

    return group_of


def _jobs(connection: Connection) -> Iterator[bytes]:
    """One after the other, in the place and with the environment they were sent from, until nobody sends any more."""
    with contextlib.suppress(EOFError):
        while True:
            sys.path[:], environment, folder, job = connection.recv()
            os.environ.clear()
            os.environ.update(environment)
            os.chdir(folder)
            yield job
