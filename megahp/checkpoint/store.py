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

VERSION = 2
STATE = {"progress", "skipped", "updates", "noise_scale", "batch_plan", "wandb_id", "loss_scale"}
STATE |= {"data", "data_order", "table", "layout", "config"}


def save(folder: Path, step: int, tensors: Mapping[str, Tensor], state: Mapping[str, Any], keep: int) -> Path:
    """Write one checkpoint, publish it, then drop all but the `keep` newest up to it. Every rank must call this.

    Returns its path. Raises UserError, on every rank, when it cannot be written; those before it are untouched.
    """
    final, partial = path(folder, step), folder / f".partial-{step:08d}"
    first = dist.get_rank() == 0
    if first:
        for unfinished in folder.glob(".partial-*"):
            shutil.rmtree(unfinished)
        partial.mkdir(parents=True)
    dist.barrier()
    try:
        dcp.save(dict(tensors), storage_writer=dcp.FileSystemWriter(partial, sync_files=True))
    except (OSError, dcp.CheckpointException) as error:
        if isinstance(_first_failure(error), KeyboardInterrupt):
            raise KeyboardInterrupt from None
        raise UserError(f"checkpoint {final} cannot be written ({_cause(error)}); make room in {folder}") from None
    if first:
        _write_synced(partial / "state.json", json.dumps({"version": VERSION, **state}, indent=1))
        partial.rename(final)
        _sync(folder)
        for old in [older for older in _complete(folder) if older <= final][:-keep]:
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


def find(place: Path) -> Path:
    """A checkpoint that was named itself, or by its run directory: then the newest. Raises UserError."""
    found = place if (place / "state.json").exists() else latest(place / "checkpoints")
    if found is None:
        raise UserError(f"{place} is neither a checkpoint nor a run directory that has one; name one that is")
    return found


def read_state(checkpoint: Path) -> dict[str, Any]:
    """The JSON part. Raises UserError if it cannot be read, is not whole or is of another version."""
    file = checkpoint / "state.json"
    try:
        state = json.loads(file.read_text())
        version = state["version"]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"checkpoint {file} cannot be read ({error!r}); {_remedy(checkpoint)}") from None
    if version != VERSION:
        raise UserError(f"checkpoint {file} has version {version} and this megahp reads {VERSION}")
    if missing := STATE - state.keys():
        raise UserError(f"checkpoint {file} lacks {', '.join(sorted(missing))}; {_remedy(checkpoint)}")
    return state


def load(checkpoint: Path, tensors: Mapping[str, Tensor]) -> None:
    """Fill the tensors, in place and on whatever layout they have. Raises UserError naming the checkpoint."""
    reader = dcp.FileSystemReader(checkpoint)
    try:
        reader.read_metadata()  # here, since dcp.load would print tracebacks before it gives up
        dcp.load(dict(tensors), storage_reader=reader)
    except (Exception, dcp.CheckpointException) as error:  # DCP raises many kinds, depending on what is damaged
        raise UserError(f"checkpoint {checkpoint} cannot be loaded ({_cause(error)}); {_remedy(checkpoint)}") from None


def _first_failure(error: BaseException) -> BaseException:
    """The first rank's own exception, out of what DCP gathered from all."""
    if isinstance(error, dcp.CheckpointException) and error.failures:
        return next(iter(error.failures.values()))[0]
    return error


def _cause(error: BaseException) -> str:
    """Why it failed, in one line."""
    lines = str(_first_failure(error)).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def _remedy(checkpoint: Path) -> str:
    return f"if it is damaged, remove {checkpoint}: the one before it then serves"


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
