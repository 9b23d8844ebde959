"""Runs of `megahp train` on ranks that live on, which spares starting them for each."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path

import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store

from distributed import world
from megahp import cli
from megahp.config import Config, resolve
from megahp.launch import World
from megahp.parallel.layout import fit
from megahp.train import loop
from megahp.train.prepare import prepare


def train(folder: Path, name: str, *words: str) -> None:
    """What `megahp train run.toml log.name=NAME WORDS` does in a folder, --ranks and --resume included."""
    _, options = cli.parse(["train", "run.toml", f"log.name={name}", *words])
    world.run(options.ranks or 1, as_rank, folder, options.overrides, options.resume is not None)


def as_rank(folder: Path, words: list[str], resume: bool) -> None:
    with contextlib.chdir(folder):
        go(resolve.load(Path("run.toml"), words).config, resume)


def go(config: Config, resume: bool = False) -> Config:
    """Train these settings on the ranks there are, all of them on this machine. Returns them as they were prepared."""
    place = World(dist.get_rank(), dist.get_world_size(), dist.get_rank(), dist.get_world_size())
    layout = fit(config.parallel, place.size)
    config = prepare(config, layout, place.size, resume)
    with contextlib.redirect_stdout(io.StringIO()):
        assert loop.train(config, place, _get_default_store(), layout, resume)
    return config
