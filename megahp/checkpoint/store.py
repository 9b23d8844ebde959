"""Checkpoints: PyTorch's DCP for tensors on any layout, JSON for the rest, visible by one rename when complete.

checkpoints/step-00000100/{state.json, .metadata, __0_0.distcp, ...}
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor

from megahp.errors import UserError

VERSION = 1


def save(folder: Path, step: int, tensors: Mapping[str, Tensor], state: Mapping[str, Any], keep: int) -> Path:
    """Write one checkpoint from all ranks, publish it, then drop all but the last `keep`. Returns its path."""
    final, partial = path(folder, step), folder / f".partial-{step:08d}"
    first = dist.get_rank() == 0
    if first:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    dist.barrier()
    dcp.save(dict(tensors), storage_writer=dcp.FileSystemWriter(partial, sync_files=True))
    if first:
        _write_synced(partial / "state.json", json.dumps({"version": VERSION, **state}, indent=1))
        shutil.rmtree(final, ignore_errors=True)  # the same step again, after a resume from before it
        partial.rename(final)
        _sync(folder)
        for old in _complete(folder)[:-keep]:
            shutil.rmtree(old)
    dist.barrier()
    return final


def path(folder: Path, step: int) -> Path:
    """Where the checkpoint after this step lies, once complete."""
    return folder / f"step-{step:08d}"


def latest(folder: Path) -> Path | None:
    """The newest complete checkpoint of a run, if any."""
    complete = _complete(folder)
    return complete[-1] if complete else None


def read_state(checkpoint: Path) -> dict[str, Any]:
    """The JSON part. Raises UserError if it cannot be read or is of another version."""
    file = checkpoint / "state.json"
    try:
        state = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"checkpoint {file} cannot be read ({error}); {_remedy(checkpoint)}") from None
    if state.get("version") != VERSION:
        raise UserError(f"checkpoint {file} has version {state.get('version')} and this megahp reads {VERSION}")
    return state


def load(checkpoint: Path, tensors: Mapping[str, Tensor]) -> None:
    """Fill the tensors, in place and on whatever layout they have. Raises UserError naming the checkpoint."""
    reader = dcp.FileSystemReader(checkpoint)
    try:
        reader.read_metadata()  # here, since dcp.load would print tracebacks before it gives up
        dcp.load(dict(tensors), storage_reader=reader)
    except (Exception, dcp.CheckpointException) as error:  # DCP raises many kinds, depending on what is damaged
        raise UserError(f"checkpoint {checkpoint} cannot be loaded ({_cause(error)}); {_remedy(checkpoint)}") from None


def _cause(error: BaseException) -> str:
    """In one line, the first rank's reason out of what DCP gathered from all."""
    if isinstance(error, dcp.CheckpointException) and error.failures:
        error = next(iter(error.failures.values()))[0]
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def _remedy(checkpoint: Path) -> str:
    return f"remove {checkpoint} to go on from the one before it"


def _complete(folder: Path) -> list[Path]:
    return sorted(folder.glob("step-*"))


def _write_synced(target: Path, text: str) -> None:
    with target.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    _sync(target.parent)


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)
