"""Read and write a Hugging Face model's folder, a tensor at a time."""

from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megahp.config import Config
from megahp.convert import sidecar
from megahp.convert.families import family_of_type
from megahp.convert.huggingface import OLD_BUFFERS, OLD_KEYS, Tensors, export, import_
from megahp.convert.sidecar import REMEDY, ModelWeights, SafetensorsFiles, write_json, write_safetensors
from megahp.errors import UserError
from megahp.files import read_json

# of weights: safetensors' word -> transformers' name
DTYPES = {"F64": "float64", "F32": "float32", "BF16": "bfloat16", "F16": "float16"}


def write(
    folder: Path,
    config: Config,
    tensors: Mapping[str, Tensor],
    special_tokens: Mapping[str, Any],
    limit: int,
    architecture: str | None = None,
) -> None:
    """Write the model of a checkpoint's tensors, in files of up to `limit` bytes. special_tokens: their keys in
    config.json, and ids. architecture: its model_type; None = the first that fits.

    Raises UserError where the architecture, or none, can represent the model.
    """
    only = family_of_type(architecture) if architecture else None
    hf_config, exported = export(config, ModelWeights(tensors), only)
    dtype = narrowest(tensor for _, tensor in exported)
    _, exported = export(config, ModelWeights(tensors), only)
    folder.mkdir(parents=True)
    write_safetensors(folder, "model", ((name, tensor.to(dtype or tensor.dtype)) for name, tensor in exported), limit)
    sidecar.write(folder, config, tensors, limit)
    # as old versions of transformers name it, which new ones read too; of tensors of several dtypes, the most frequent
    dtypes = Counter(SafetensorsFiles(folder, "model").dtypes.values())
    described = {**hf_config, **special_tokens, "torch_dtype": DTYPES[dtypes.most_common(1)[0][0]]}
    write_json(folder / "config.json", described)


def narrowest(tensors: Iterable[Tensor]) -> torch.dtype | None:
    """Return the 16-bit dtype that holds all values exactly, as it does those of an imported model that was not trained
    further. None if there is none, which the first tensors tell of a trained model."""
    candidates = [torch.bfloat16, torch.float16]
    for tensor in tensors:
        candidates = [dtype for dtype in candidates if tensor.to(dtype).to(tensor.dtype).equal(tensor)]
        if not candidates:
            return None
    return candidates[0]


def read(folder: Path) -> tuple[Mapping[str, Mapping[str, Any]], Tensors]:
    """Return the settings, as a layer for `resolve`, and the named tensors of a checkpoint. Raises UserError."""
    hf_config = read_json(folder / "config.json", "model settings", REMEDY)
    if not any(folder.glob("model*.safetensors*")) and (pickles := sorted(folder.glob("*.bin"))):
        remedy = "save the model again by transformers' save_pretrained, which writes safetensors"
        raise UserError(f"{pickles[0]} is a pickle, which is not read since it can execute anything; {remedy}")
    files = SafetensorsFiles(folder, "model")
    for name, dtype in files.dtypes.items():
        if dtype not in DTYPES and not OLD_BUFFERS.search(name):
            problem = f"{name} has the dtype {dtype}, and megahp reads {', '.join(DTYPES)}"
            raise UserError(f"{folder}: {problem}; get the model's weights before they were quantized")
    layer, weights = import_(hf_config, files)
    return sidecar.restore(folder, layer, weights)


def link_without_code(folder: Path, target: Path) -> None:
    """Link a folder's weights into another, beside a config.json that only describes the model.

    Keys that have transformers import or download something are dropped: classes (auto_map), kernels
    (_attn_implementation), quantizers, adapters.
    """
    from transformers import AutoConfig

    hf_config = read_json(folder / "config.json", "model settings", REMEDY)
    known = AutoConfig.for_model(hf_config["model_type"])
    keys = {"architectures", *known.to_dict(), *known.attribute_map, *known.attribute_map.values()}
    keys |= {
        *OLD_KEYS,
        *OLD_KEYS.values(),
        "rope_scaling",
        "torch_dtype",
        "rope_local_base_freq",
        "sliding_window_pattern",
    }  # of older versions of transformers
    kept = {key: value for key, value in hf_config.items() if key in keys and not key.startswith("_")}
    stem = family_of_type(hf_config["model_type"]).top_level["embedding"]
    shapes = SafetensorsFiles(folder, "model").shapes
    (name,) = {f"{stem}.weight", f"{stem.partition('.')[2]}.weight"} & shapes.keys()
    kept["vocab_size"] = shapes[name][0]  # with the rows that pad it, which transformers takes for tokens
    write_json(target / "config.json", kept)
    for file in (*folder.glob("model*.safetensors"), *folder.glob("model*.safetensors.index.json")):
        (target / file.name).symlink_to(file.resolve())
