"""Write a run directory that holds a converted model, or a changed one of ours, and that training can continue from."""

import argparse
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megahp import checkpoint
from megahp.config import AUTO, Config, ParallelConfig, config_to_toml, fixed_when, resolve, setting_names, with_values
from megahp.data.tokenizer import Tokenizer, load_tokenizer
from megahp.errors import UserError
from megahp.files import LARGEST, refuse_irregular
from megahp.model.build import skeleton
from megahp.parallel.mesh import single_rank_mesh
from megahp.parallel.parameters import model_state
from megahp.train.prepare import with_vocabulary
from megahp.train.run import state_of_weights

# settings of a converted model that its next run cannot change
FIXED = [key for key in setting_names() if fixed_when(key) in ("always", "unless dense")]
KEPT = (
    *FIXED,
    "model",
    "data.sequence_length",
    "data.lengths",
    "data.eos",
    "data.bos",
    "data.begin",
    "data.mask_documents",
)


def find_checkpoint(location: Path) -> tuple[Path, Config]:
    """Return a checkpoint, or a run's newest, and the config it was written under."""
    path = checkpoint.find(location)
    return path, checkpoint.settings_of(path)


def write_run(
    arguments: argparse.Namespace,
    partial: Path,
    settings: Mapping[str, Mapping[str, Any]],
    overrides: Mapping[str, Mapping[str, Any]],
    tokenizer_name: str,
    tensors: Iterable[tuple[str, Tensor]],
) -> Tokenizer:
    """Write a run directory with these tensors and a copy of the tokenizer, which is returned. Raises UserError.

    Of the settings only those are kept that its next run cannot change; overrides are kept as they are.
    """
    layer = {
        section: {key: value for key, value in values.items() if f"{section}.{key}".startswith(KEPT)}
        for section, values in settings.items()
    }
    recorded, before = layer.get("data", {}), settings.get("data", {}).get("tokenizer", "")
    if Path(before).suffix != Path(tokenizer_name).suffix:  # exported in another format, which has another fingerprint
        recorded.pop("tokenizer_fingerprint", None)
    tokenizer = load_tokenizer(tokenizer_name, recorded.get("eos", ""), recorded.get("bos", ""))
    partial.mkdir(parents=True)
    if tokenizer_name != "bytes":  # a copy, so that the run does not depend on files elsewhere
        file = f"tokenizer{Path(tokenizer_name).suffix}"
        shutil.copyfile(tokenizer_name, partial / file)
        tokenizer_name = f"{resolve.HERE}/{file}"
    origin, data = str(arguments.source), {"data": {"tokenizer": tokenizer_name}}
    resolved = resolve.resolve([(origin, layer), (origin, data), ("command line", overrides)])
    config = with_vocabulary(resolved.config, tokenizer)
    if config.train.dtype == AUTO:
        raise UserError("train.dtype = 'auto' is decided where a run begins; name the dtype of runs from this model")
    one_rank = with_values(replace(config, parallel=ParallelConfig()), {"train.device": "cpu"})
    model = skeleton(one_rank, single_rank_mesh(one_rank))  # has shapes, but no memory
    master = torch.float64 if config.train.dtype == "float64" else torch.float32  # as training keeps weights
    checked = (
        (name, tensor.to(master) if name.startswith("model.") else tensor)
        for name, tensor in check_shapes(tensors, {name: weight.shape for name, weight in model_state(model).items()})
    )
    path = checkpoint.path(partial / "checkpoints", 0)
    checkpoint.write(path, checked, state_of_weights(config), int(1e9 * arguments.file_size))
    # moments and progress start anew: the next run branches from this checkpoint, rather than resuming it
    config = with_values(config, {"train.start_from": resolve.HERE})
    (partial / "config.toml").write_text(config_to_toml(config, resolved.origins), encoding="utf-8")
    return tokenizer


def check_shapes(
    tensors: Iterable[tuple[str, Tensor]], shapes: Mapping[str, torch.Size]
) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors, masks included. Raises UserError unless the weights are exactly those with these shapes."""
    missing = dict(shapes)
    for name, tensor in tensors:
        if name.startswith("model.") and missing.pop(name, None) != tensor.shape:
            expected = f"its {list(shapes[name])}" if name in shapes else "the model's"
            raise UserError(f"{name} of shape {list(tensor.shape)} is not {expected}; give the sizes the weights have")
        yield name, tensor
    if missing:
        raise UserError(f"{len(missing)} tensors are missing, such as {min(missing)}; give the sizes the weights have")


def check_files(arguments: argparse.Namespace) -> None:
    """Raise UserError for invalid files and folders on the command line of a tool that writes a run directory."""
    if arguments.target.exists() or arguments.target.is_symlink():
        raise UserError(f"{arguments.target} exists; name a new folder, or remove it")
    if not 0 < arguments.file_size < float("inf"):
        raise UserError(f"--file-size {arguments.file_size:g} must be above 0; 1 is usual")
    if arguments.text and not (arguments.text.is_file() and arguments.text.stat().st_size):
        raise UserError(f"--text {arguments.text} is not a file with text; name another")
    if arguments.text:
        refuse_irregular(arguments.text, "--text", "name another", LARGEST)
