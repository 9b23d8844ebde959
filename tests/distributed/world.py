"""Real ranks for tests: one spawned gloo world runs many cases, since starting a rank costs seconds."""

from __future__ import annotations

import os
import pickle
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def run(ranks: int, function: Callable[..., Any], *arguments: Any, timeout: float = 300) -> list[Any]:
    """What `function(*arguments)` returned on each of so many fresh ranks. A rank's exception fails the test."""
    with tempfile.TemporaryDirectory() as folder:
        context = mp.get_context("spawn")
        processes = [
            context.Process(target=_rank, args=(folder, rank, ranks, function, arguments)) for rank in range(ranks)
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join(timeout)
        hung = [process for process in processes if process.is_alive()]
        for process in hung:
            process.kill()
        outcomes = [_read(Path(folder) / str(rank)) for rank in range(ranks)]
    errors = [f"rank {rank}: {error}" for rank, (error, _) in enumerate(outcomes) if error]
    assert not errors and not hung, "\n".join(errors) or "a rank hung"
    return [value for _, value in outcomes]


def _rank(folder: str, rank: int, ranks: int, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", ranks)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks)
    error, value = None, None
    try:
        value = function(*arguments)
        dist.barrier()
    except Exception:
        error = traceback.format_exc()
    Path(folder, str(rank)).write_bytes(pickle.dumps((error, value)))
    os._exit(0)  # gloo's threads race with an orderly teardown


def _read(path: Path) -> tuple[str | None, Any]:
    return pickle.loads(path.read_bytes()) if path.exists() else ("it left no result", None)
