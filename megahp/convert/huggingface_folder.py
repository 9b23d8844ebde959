"""A model's folder as Hugging Face has it, read and written a tensor at a time."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from megahp.config import Config
from megahp.convert import sidecar
from megahp.convert.huggingface import OLDER, Tensors, export, import_
from megahp.convert.sidecar import MODELS, Files, Weights, write_files, write_json
from megahp.files import read_json


def write(folder: Path, config: Config, tensors: Mapping[str, Tensor], eod: int, limit: int) -> None:
    """Write the model of a checkpoint whose tensors have these names, in files of `limit` bytes. eod: the token that
    ends a document. Raises UserError where no architecture has the model."""
    hf_config, exported = export(config, Weights(tensors))
    folder.mkdir(parents=True)
    write_files(folder, "model", exported, limit)
    sidecar.write(folder, config, tensors, limit)
    ends = {"bos_token_id": None, "eos_token_id": eod}
    write_json(folder / "generation_config.json", ends)
    write_json(folder / "config.json", hf_config | ends)


def read(folder: Path) -> tuple[Mapping[str, Mapping[str, Any]], Tensors]:
    """Settings, as a layer for `resolve`, and the tensors of a checkpoint by name. Raises UserError."""
    layer, weights = import_(read_json(folder / "config.json", "model settings", MODELS), Files(folder, "model"))
    return sidecar.restored(folder, layer, weights)


def link_without_code(folder: Path, bare: Path) -> None:
    """Link a folder's weights into another, beside what its config.json says of the model. What has transformers import
    or fetch something stays behind: classes (auto_map), kernels (_attn_implementation), quantizers, adapters."""
    from transformers import AutoConfig

    found = read_json(folder / "config.json", "model settings", MODELS)
    its = AutoConfig.for_model(found["model_type"])
    known = {"architectures", *its.to_dict(), *its.attribute_map, *its.attribute_map.values(), *OLDER, *OLDER.values()}
    known |= {"rope_scaling", "torch_dtype"}  # to older versions of transformers
    kept = {key: value for key, value in found.items() if key in known and not key.startswith("_")}
    write_json(bare / "config.json", kept)
    for file in (*folder.glob("model*.safetensors"), *folder.glob("model*.safetensors.index.json")):
        (bare / file.name).symlink_to(file.resolve())
