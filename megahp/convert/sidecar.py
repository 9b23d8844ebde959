"""Files beside an exported model that hold what its format cannot: megahp.json has settings and parameterization table;
megahp.safetensors has masks and the rows that pad the vocabulary. Also reads and writes safetensors files as Hugging
Face lays them out, a tensor at a time.
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
from megahp.config import Config, config_to_dict, longest, resolve
from megahp.convert.huggingface import Tensors, fold_multipliers, unfold_multipliers
from megahp.errors import UserError
from megahp.files import is_plain, read_json, refuse_irregular
from megahp.scaling.parameterization import table_of

REMEDY = "name a model's folder that has it"  # where one of its files is missing or wrong
AGAIN = "get the files again"
SETTINGS = "megahp.json"
VOCABULARY = ("embedding.weight", "unembedding.weight")


class SafetensorsFiles(ByName):
    """The tensors of a folder's NAME.safetensors, or of the files that its index lists, each loaded on access.

    dtypes, shapes: of all tensors, in the files' words (BF16). Raises UserError for files that are missing, damaged, or
    contradict each other.
    """

    def __init__(self, folder: Path, name: str) -> None:
        self.folder, self.dtypes, self.shapes = folder, dict[str, str](), dict[str, list[int]]()
        self.index = self._listed(folder / f"{name}.safetensors.index.json", f"{name}.safetensors")
        for file in sorted(set(self.index.values())):
            tensors = _open(folder / file)
            for tensor in set(tensors.keys()):
                if self.index.setdefault(tensor, "") != file:
                    elsewhere = self.index[tensor] or "no file"
                    raise UserError(f"{folder / file} holds {tensor}, which its index has in {elsewhere}; {AGAIN}")
                described = tensors.get_slice(tensor)
                self.dtypes[tensor], self.shapes[tensor] = described.get_dtype(), described.get_shape()
        if lost := self.index.keys() - self.dtypes.keys():
            raise UserError(f"{folder / self.index[min(lost)]} lacks {min(lost)}, which its index has in it; {AGAIN}")

    def _listed(self, index: Path, single: str) -> dict[str, str]:
        """Return the files by their tensors' names. Raises UserError."""
        if not index.exists():
            return dict.fromkeys(_open(self.folder / single).keys(), single)
        weight_map = read_json(index, "list of tensors", REMEDY).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
            raise UserError(f"{index} has no weight_map of tensors' names to files' names; get it again")
        if outside := [file for file in weight_map.values() if not is_plain(file)]:
            raise UserError(f"{index} names {outside[0]!r}, which is no file of this folder; get it again")
        if (self.folder / single).exists() and set(weight_map.values()) != {single}:  # which of them is out of date?
            raise UserError(
                f"{self.folder} has {single} and {index.name}, of other files; remove the one that is older"
            )
        return weight_map

    def __getitem__(self, name: str) -> Tensor:
        path = self.folder / self.index[name]
        try:
            return _open(path).get_tensor(name)
        except SafetensorError as error:
            raise UserError(f"{path} is damaged ({error}); get it again") from None


class ModelWeights(ByName):
    """The weights among a checkpoint's tensors, by their names in the model."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.tensors = tensors
        self.index = {name.removeprefix("model."): name for name in tensors if name.startswith("model.")}

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[self.index[name]]


def write(folder: Path, config: Config, tensors: Mapping[str, Tensor], limit: int) -> None:
    """Write the sidecar files of a checkpoint's tensors, in files of up to `limit` bytes."""

    def extra() -> Tensors:
        for name in (f"model.{matrix}" for matrix in VOCABULARY):
            if name in tensors:
                yield f"padding.{name}", tensors[name][config.model.vocab_size :].clone()
        yield from ((name, tensors[name]) for name in tensors if name.startswith("mask."))

    write_safetensors(folder, "megahp", extra(), limit)
    names = sorted(SafetensorsFiles(folder, "megahp"))
    sidecar = {"config": config_to_dict(config), "table": table_of(config).to_dict(), "tensors": names}
    write_json(folder / SETTINGS, sidecar)


def restore(
    folder: Path, layer: Mapping[str, Mapping[str, Any]], weights: Tensors
) -> tuple[Mapping[str, Mapping[str, Any]], Tensors]:
    """Return the settings, as a layer for `resolve`, and the named tensors of a checkpoint.

    With a sidecar, these are the ones that were exported; without one, the layer and weights that another format holds,
    in SP. Raises UserError where the two disagree.
    """
    file = folder / SETTINGS
    if not file.exists():
        return layer, ((f"model.{name}", weight) for name, weight in weights)
    remedy = f"remove {file} to import the model as it is"
    sidecar, extra = read_json(file, "sidecar", REMEDY), SafetensorsFiles(folder, "megahp")
    kinds = {"config": dict, "table": dict, "tensors": list}
    if wrong := [key for key, kind in kinds.items() if not isinstance(sidecar.get(key), kind)]:
        raise UserError(f"{file} has no {wrong[0]}, or one of another type; {remedy}")
    config = resolve.from_dict(sidecar["config"], str(file))
    if not table_of(config).is_of(sidecar["table"]):
        raise UserError(f"{file} has another parameterization table than this megahp; {remedy}")
    if missing := {str(name) for name in sidecar["tensors"]} - set(extra):
        raise UserError(f"{folder}/megahp.safetensors lacks {min(missing)}; restore it, or {remedy}")
    imported = resolve.resolve([(str(folder), layer)]).config
    kept = table_of(imported)
    exported, _ = fold_multipliers(config, {}, kept)
    # biases may differ: an architecture may have more of them than our model
    same = [key for key in layer["model"] if key not in ("bias", "qkv_bias")]
    pairs = {key: (getattr(imported.model, key), getattr(exported, key)) for key in same}
    pairs["sequence_length"] = imported.data.sequence_length, longest(config)
    for key, (now, before) in pairs.items():
        if now != before:
            raise UserError(f"{folder}: {key} is {now!r} and was {before!r}; {remedy}")

    def tensors() -> Tensors:
        try:
            for short, weight in unfold_multipliers(config, weights, kept):
                name, mask = f"model.{short}", f"mask.{short}"
                if f"padding.{name}" in extra:
                    weight = torch.cat((weight[: config.model.vocab_size], extra[f"padding.{name}"]))
                if mask in extra:
                    if weight[~extra[mask]].any():
                        raise UserError(f"{name} is not 0 where it is masked")
                    yield mask, extra[mask]
                yield name, weight
        except (UserError, RuntimeError, IndexError) as error:  # the latter two where shapes do not match
            raise UserError(f"{folder}: {error}; {remedy}") from None

    return config_to_dict(config), tensors()


def write_safetensors(folder: Path, name: str, tensors: Iterable[tuple[str, Tensor]], limit: int) -> None:
    """Write NAME.safetensors, or several files of up to `limit` bytes and their index."""
    files: list[Path] = []
    weight_map: dict[str, int] = {}
    size = 0
    for number, group in enumerate(in_files(tensors, limit), 1):
        files.append(folder / f"{name}-{number:05d}.safetensors")
        save_file(group, files[-1], metadata={"format": "pt"})
        weight_map |= dict.fromkeys(group, number)
        size += sum(tensor.nbytes for tensor in group.values())
    if len(files) == 1:
        files[0].rename(folder / f"{name}.safetensors")
        return
    # their number, which each file's name holds, is known only now
    names = [f"{name}-{number:05d}-of-{len(files):05d}.safetensors" for number in range(1, len(files) + 1)]
    for file, final in zip(files, names, strict=True):
        file.rename(folder / final)
    index = {"metadata": {"total_size": size}, "weight_map": {key: names[n - 1] for key, n in weight_map.items()}}
    write_json(folder / f"{name}.safetensors.index.json", index)


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def _open(path: Path) -> Any:
    remedy = "name a model's folder that has it, or its index"
    try:
        refuse_irregular(path, "file", remedy)
        return safe_open(path, "pt")
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} cannot be read ({error}); {remedy}") from None
