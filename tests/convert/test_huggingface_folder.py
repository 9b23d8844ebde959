"""Folders from elsewhere: nothing but the model's settings, and weights in the folder, is read."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from commands.test_convert import convert, needs_transformers
from safetensors import safe_open

from megahp.exit_codes import NOT_CHECKED

CANARY = "from pathlib import Path\nPath({!r}).touch()\nclass LlamaForCausalLM: ...\nclass LlamaConfig: ...\n"
HOOKS: dict[str, Any] = {
    "auto_map": {"AutoModelForCausalLM": "canary.LlamaForCausalLM", "AutoConfig": "canary.LlamaConfig"},
    "_attn_implementation": "kernels-community/flash-attn",
    "attn_implementation": "kernels-community/flash-attn",
    "use_kernels": True,
    "pad_token_id": None,
}


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = transformers.LlamaConfig(vocab_size=257, max_position_embeddings=64, num_key_value_heads=4, **sizes)
    folder = tmp_path_factory.mktemp("llama")
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def imported(folder: Path, target: Path) -> tuple[int, str]:
    return convert("huggingface", "megahp", folder, target, "--tokenizer", "bytes", "--text", __file__)


@needs_transformers
def test_no_code_or_kernel_of_a_folder_is_run(llama: Path, tmp_path: Path) -> None:
    theirs, canary = tmp_path / "theirs", tmp_path / "canary"
    shutil.copytree(llama, theirs)
    (theirs / "canary.py").write_text(CANARY.format(str(canary)))
    config = json.loads((theirs / "config.json").read_text())
    (theirs / "config.json").write_text(json.dumps(config | HOOKS))
    (theirs / "adapter_config.json").write_text('{"base_model_name_or_path": "someone/model", "peft_type": "LORA"}')
    code, output = imported(theirs, tmp_path / "ours")
    assert code == 0 and "through megahp and transformers" in output, output
    assert not canary.exists()


@needs_transformers
@pytest.mark.parametrize("name", ["../secret.safetensors", "/etc/passwd", "sub/model.safetensors", ""])
def test_weights_are_read_of_the_folder_alone(llama: Path, tmp_path: Path, name: str) -> None:
    theirs = tmp_path / "theirs"
    shutil.copytree(llama, theirs)
    (theirs / "model.safetensors").rename(tmp_path / "secret.safetensors")
    listing = {"weight_map": {"model.norm.weight": name}}
    (theirs / "model.safetensors.index.json").write_text(json.dumps(listing))
    code, output = imported(theirs, tmp_path / "ours")
    assert code == 2 and repr(name) in output and "no file of this folder" in output and output.count("\n") == 1, output


@needs_transformers
def test_what_transformers_cannot_load_is_converted_and_not_checked(llama: Path, tmp_path: Path) -> None:
    shutil.copytree(llama, theirs := tmp_path / "theirs")
    (theirs / "model.safetensors").rename(theirs / "model-1.safetensors")
    with safe_open(theirs / "model-1.safetensors", "pt") as file:
        listing = {"weight_map": dict.fromkeys(file.keys(), "model-1.safetensors")}
    (theirs / "model.safetensors.index.json").write_text(json.dumps(listing))  # without metadata
    code, said = imported(theirs, tmp_path / "ours")
    assert code == NOT_CHECKED and "not checked: transformers cannot load" in said, said
    assert (tmp_path / "ours/checkpoints").is_dir()


@pytest.mark.parametrize("name", ["model", "megahp"])
def test_nobody_waits_for_a_pipe(llama: Path, tmp_path: Path, name: str) -> None:
    shutil.copytree(llama, theirs := tmp_path / "theirs")
    (theirs / "megahp.json").write_text("{}")
    (theirs / f"{name}.safetensors").unlink(missing_ok=True)
    os.mkfifo(theirs / f"{name}.safetensors")
    code, said = imported(theirs, tmp_path / "ours")
    assert code == 2 and f"{name}.safetensors is not a regular file" in said and said.count("\n") == 1, said


@needs_transformers
@pytest.mark.parametrize(
    "text", ['{"config": 1}', '{"config": {}, "table": [], "tensors": []}', "[]", "{", '{"config": {}}']
)
def test_what_stands_beside_a_model_is_checked(llama: Path, tmp_path: Path, text: str) -> None:
    theirs = tmp_path / "theirs"
    shutil.copytree(llama, theirs)
    shutil.copy(llama / "model.safetensors", theirs / "megahp.safetensors")
    (theirs / "megahp.json").write_text(text)
    code, output = imported(theirs, tmp_path / "ours")
    assert code == 2 and "megahp.json" in output and output.count("\n") == 1, output
