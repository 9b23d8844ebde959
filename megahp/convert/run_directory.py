"""A run directory that holds a model of others, or one of ours that was changed, and trains on from it."""

import argparse
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megahp import checkpoint
from megahp.config import Config, ParallelConfig, config_to_toml, fixed_when, resolve, setting_names, with_values
from megahp.data.tokenizer import Tokenizer, load_tokenizer
from megahp.errors import UserError
from megahp.files import LARGEST, refuse_irregular
from megahp.model.build import skeleton
from megahp.parallel.mesh import single_rank_mesh
from megahp.parallel.parameters import model_state
from megahp.train.prepare import with_vocabulary
from megahp.train.run import state_of_weights

# what of a converted model's settings its next run cannot choose
FIXED = [key for key in setting_names() if fixed_when(key) in ("always", "unless dense")]
KEPT = (*FIXED, "model", "data.sequence_length", "data.lengths")


def of_checkpoint(place: Path) -> tuple[Path, Config]:
    """A checkpoint, and the settings it was written under."""
    path = checkpoint.find(place)
    return path, checkpoint.settings_of(path)


def write_run(
    arguments: argparse.Namespace,
    partial: Path,
    tree: Mapping[str, Mapping[str, Any]],
    said: Mapping[str, Mapping[str, Any]],
    named: str,
    tensors: Iterable[tuple[str, Tensor]],
) -> Tokenizer:
    """Write a run directory, the named tokenizer in it, that has these tensors and, of the tree's settings, those its
    next run cannot choose. said: further settings. Returns the tokenizer. Raises UserError."""
    layer = {
        section: {key: value for key, value in values.items() if f"{section}.{key}".startswith(KEPT)}
        for section, values in tree.items()
    }
    tokenizer = load_tokenizer(named)
    partial.mkdir(parents=True)
    if named != "bytes":
        name = f"tokenizer{Path(named).suffix}"
        shutil.copyfile(named, partial / name)
        named = str(arguments.target / name)
    origin = str(arguments.source)
    resolved = resolve.resolve([(origin, layer), (origin, {"data": {"tokenizer": named}}), ("command line", said)])
    config = with_vocabulary(resolved.config, tokenizer)
    place = checkpoint.path(partial / "checkpoints", 0)
    fitted = fitting(tensors, shapes_of(config))
    checkpoint.write(place, fitted, state_of_weights(config), limit(arguments))
    config = with_values(config, {"train.start_from": str(arguments.target)})
    (partial / "config.toml").write_text(config_to_toml(config, resolved.origins), encoding="utf-8")
    return tokenizer


def shapes_of(config: Config) -> dict[str, torch.Size]:
    """Of the weights by name, of a model that is not made."""
    config = with_values(replace(config, parallel=ParallelConfig()), {"train.device": "cpu"})
    model = skeleton(config, single_rank_mesh(config))
    return {name: weight.shape for name, weight in model_state(model).items()}


def fitting(tensors: Iterable[tuple[str, Tensor]], shapes: Mapping[str, torch.Size]) -> Iterator[tuple[str, Tensor]]:
    """The tensors, masks among them. Raises UserError unless the weights are those of a model of these shapes."""
    lacking = dict(shapes)
    for name, tensor in tensors:
        if name.startswith("model.") and lacking.pop(name, None) != tensor.shape:
            wanted = f"its {list(shapes[name])}" if name in shapes else "the model's"
            raise UserError(f"{name} of shape {list(tensor.shape)} is not {wanted}; give the sizes the weights have")
        yield name, tensor
    if lacking:
        raise UserError(f"{len(lacking)} tensors are missing, such as {min(lacking)}; give the sizes the weights have")


def refuse_files(arguments: argparse.Namespace) -> None:
    """Raise UserError for files and folders that cannot be meant, of any tool that writes a run directory."""
    if arguments.target.exists():
        raise UserError(f"{arguments.target} exists; name a new folder, or remove it")
    if not 0 < arguments.file_size < float("inf"):
        raise UserError(f"--file-size {arguments.file_size:g} must be above 0; 1 is usual")
    if arguments.text and not (arguments.text.is_file() and arguments.text.stat().st_size):
        raise UserError(f"--text {arguments.text} is no file that holds text; name another")
    if arguments.text:
        refuse_irregular(arguments.text, "--text", "name another", LARGEST)


def limit(arguments: argparse.Namespace) -> int:
    return int(arguments.file_size * 1e9)
