"""What a model loses in formats that have no place for it, beside them: settings and parameterization table in
megahp.json; masks, and the rows that pad the vocabulary, in megahp.safetensors. And safetensors files as Hugging Face
lays them out, read and written a tensor at a time.
"""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from megahp.checkpoint.shards import ByName, in_files
from megahp.config import Config, config_to_dict, resolve
from megahp.convert.huggingface import Tensors, with_multipliers, without_multipliers
from megahp.errors import UserError
from megahp.files import is_plain, read_json, refuse_irregular
from megahp.model.build import longest
from megahp.scaling.parameterization import table_of

MODELS = "a model's folder has it"  # remedy where one of its files is missing or wrong
OURS = "megahp.json"
VOCABULARY = ("embedding.weight", "unembedding.weight")


class Files(ByName):
    """The tensors in a folder's NAME.safetensors, or in the several that an index lists, by name, each read when it is
    asked for. Raises UserError for files that are missing or damaged."""

    def __init__(self, folder: Path, name: str) -> None:
        self.folder, listing = folder, folder / f"{name}.safetensors.index.json"
        if listing.exists():
            found = read_json(listing, "list of tensors", MODELS).get("weight_map")
            if not isinstance(found, dict) or not all(isinstance(file, str) for file in found.values()):
                raise UserError(f"{listing} has no weight_map of tensors' names to files' names; get it again")
            if outside := [file for file in found.values() if not is_plain(file)]:
                raise UserError(f"{listing} names {outside[0]!r}, which is no file of this folder; get it again")
            self.index = found
        else:
            file = f"{name}.safetensors"
            self.index = dict.fromkeys(_opened(folder / file).keys(), file)

    def __getitem__(self, name: str) -> Tensor:
        path = self.folder / self.index[name]
        try:
            return _opened(path).get_tensor(name)
        except SafetensorError as error:
            raise UserError(f"{path} is damaged ({error}); get it again") from None


class Weights(ByName):
    """The weights among a checkpoint's tensors, by their names in the model."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.tensors = tensors
        self.index = {name.removeprefix("model."): name for name in tensors if name.startswith("model.")}

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[self.index[name]]


def write(folder: Path, config: Config, tensors: Mapping[str, Tensor], limit: int) -> None:
    """Write what other formats lack of a checkpoint whose tensors have these names, in files of `limit` bytes."""
    write_files(folder, "megahp", _without_place(config, tensors), limit)
    more = {"table": table_of(config).to_dict(), "tensors": sorted(Files(folder, "megahp"))}
    write_json(folder / OURS, {"config": config_to_dict(config), **more})


def restored(
    folder: Path, layer: Mapping[str, Mapping[str, Any]], weights: Tensors
) -> tuple[Mapping[str, Mapping[str, Any]], Tensors]:
    """Settings, as a layer for `resolve`, and the tensors of a checkpoint by name: those that were written, where there
    is a megahp.json; else what another format says, in SP. Raises UserError where the two disagree."""
    if not (folder / OURS).exists():
        return layer, ((f"model.{name}", weight) for name, weight in weights)
    ours, more = read_json(folder / OURS, "what megahp wrote beside the model,", MODELS), Files(folder, "megahp")
    kinds = {"config": dict, "table": dict, "tensors": list}
    if wrong := [key for key, kind in kinds.items() if not isinstance(ours.get(key), kind)]:
        raise UserError(f"{folder / OURS} has no {wrong[0]}, or one of another type; {_remedy(folder)}")
    config = resolve.from_dict(ours["config"], str(folder / OURS))
    if table_of(config).to_dict() != ours["table"]:
        raise UserError(f"{folder / OURS} has another parameterization table than this megahp; {_remedy(folder)}")
    if lacking := {str(name) for name in ours["tensors"]} - set(more):
        raise UserError(f"{folder}/megahp.safetensors lacks {min(lacking)}; restore it, or {_remedy(folder)}")
    theirs, (written, _) = resolve.resolve([(str(folder), layer)]).config, without_multipliers(config, {})
    pairs = {key: (getattr(theirs.model, key), getattr(written, key)) for key in layer["model"] if key != "bias"}
    pairs["sequence_length"] = theirs.data.sequence_length, longest(config)
    for key, (here, before) in pairs.items():
        if here != before:  # it may have more biases
            raise UserError(f"{folder}: {key} is {here!r} and was {before!r}; {_remedy(folder)}")
    return ours["config"], _restored(config, weights, more, folder)


def write_files(folder: Path, name: str, tensors: Iterable[tuple[str, Tensor]], limit: int) -> None:
    """Write NAME.safetensors, or several of `limit` bytes and their index."""
    files: list[Path] = []
    weight_map: dict[str, int] = {}
    size = 0
    for number, together in enumerate(in_files(tensors, limit), 1):
        files.append(folder / f"{name}-{number:05d}.safetensors")
        save_file(together, files[-1], metadata={"format": "pt"})
        weight_map |= dict.fromkeys(together, number)
        size += sum(tensor.nbytes for tensor in together.values())
    if len(files) == 1:
        files[0].rename(folder / f"{name}.safetensors")
        return
    names = [f"{name}-{number:05d}-of-{len(files):05d}.safetensors" for number in range(1, len(files) + 1)]
    for file, final in zip(files, names, strict=True):
        file.rename(folder / final)
    listing = {key: names[number - 1] for key, number in weight_map.items()}
    write_json(folder / f"{name}.safetensors.index.json", {"metadata": {"total_size": size}, "weight_map": listing})


def _without_place(config: Config, tensors: Mapping[str, Tensor]) -> Tensors:
    """What an architecture of theirs does not have: masks, and the rows that pad the vocabulary."""
    for name in (f"model.{each}" for each in VOCABULARY):
        if name in tensors:
            yield f"padding.{name}", tensors[name][config.model.vocab_size :].clone()
    yield from ((name, tensors[name]) for name in tensors if name.startswith("mask."))


def _restored(config: Config, weights: Tensors, more: Files, folder: Path) -> Tensors:
    """The tensors of a checkpoint, from weights without multipliers and from what had no place beside them."""
    try:
        for short, weight in with_multipliers(config, weights):
            name, mask = f"model.{short}", f"mask.{short}"
            if f"padding.{name}" in more:
                weight = torch.cat((weight[: config.model.vocab_size], more[f"padding.{name}"]))
            if mask in more:
                if weight[~more[mask]].any():
                    raise UserError(f"{name} is not 0 where it is masked")
                yield mask, more[mask]
            yield name, weight
    except (UserError, RuntimeError, IndexError) as error:  # the latter two of shapes that do not fit
        raise UserError(f"{folder}: {error}; {_remedy(folder)}") from None


def _remedy(folder: Path) -> str:
    return f"remove {folder / OURS} to import the model as it is"


def _opened(path: Path) -> Any:
    remedy = "a model's folder has it, or an index of several"
    try:
        refuse_irregular(path, "file", remedy)
        return safe_open(path, "pt")
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} cannot be read ({error}); {remedy}") from None


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
