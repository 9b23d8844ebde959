"""A model's folder as Hugging Face has it, read and written a tensor at a time."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from megahp import config
from megahp.convert import sidecar
from megahp.convert.huggingface import Tensors, export, import_
from megahp.convert.sidecar import MODELS, Files, Weights, write_files, write_json
from megahp.files import read_json


def write(folder: Path, settings: config.Config, tensors: Mapping[str, Tensor], eod: int, limit: int) -> None:
    """Write the model of a checkpoint whose tensors have these names, in files of `limit` bytes. eod: the token that
    ends a document. Raises UserError where no architecture has the model."""
    hf_config, exported = export(settings, Weights(tensors))
    folder.mkdir(parents=True)
    write_files(folder, "model", exported, limit)
    sidecar.write(folder, settings, tensors, limit)
    ends = {"bos_token_id": None, "eos_token_id": eod}
    write_json(folder / "generation_config.json", ends)
    write_json(folder / "config.json", hf_config | ends)


def read(folder: Path) -> tuple[Mapping[str, Mapping[str, Any]], Tensors]:
    """Settings, as a layer for `resolve`, and the tensors of a checkpoint by name. Raises UserError."""
    layer, weights = import_(read_json(folder / "config.json", "model settings", MODELS), Files(folder, "model"))
    return sidecar.restored(folder, layer, weights)
