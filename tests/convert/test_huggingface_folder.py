"""Folders from elsewhere: nothing but the model's settings, and weights in the folder, is read."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from commands.test_convert import convert, needs_transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from megahp import checkpoint
from megahp.checkpoint.shards import Tensors
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


def imported(folder: Path, target: Path, *more: str) -> tuple[int, str]:
    text = more or ("--text", __file__)
    return convert("huggingface", "megahp", folder, target, "--tokenizer", "bytes", *text)


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


def rewritten(llama: Path, folder: Path, change: Any, **settings: Any) -> Path:
    """A copy of the folder whose tensors and settings are changed."""
    shutil.copytree(llama, folder)
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | settings))
    return folder


def grow(name: str, rows: int) -> Any:
    """A change that gives a matrix more rows, or fewer."""

    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name] = torch.cat((tensors[name], torch.ones_like(tensors[name])))[:rows].clone()

    return change


HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


@needs_transformers
@pytest.mark.parametrize("more", [[], ["--no-check"]])
def test_a_tied_flag_beside_another_head(llama: Path, tmp_path: Path, more: list[str]) -> None:
    """F15: which of the two is right is not guessed, with or without a check. A head that is the embedding is fine."""
    theirs = rewritten(llama, tmp_path / "theirs", lambda _: None, tie_word_embeddings=True)
    code, said = imported(theirs, tmp_path / "ours", *more)
    assert code == 2 and f"{HEAD} differs from {EMBEDDING}" in said and said.count("\n") == 1, said
    assert not (tmp_path / "ours").exists()
    same = rewritten(theirs, tmp_path / "same", lambda tensors: tensors.update({HEAD: tensors[EMBEDDING].clone()}))
    assert imported(same, tmp_path / "ours", *more)[0] == 0


@needs_transformers
@pytest.mark.parametrize(("dtype", "word"), [(torch.float8_e4m3fn, "F8_E4M3"), (torch.int8, "I8"), (torch.uint8, "U8")])
def test_weights_that_are_quantized(llama: Path, tmp_path: Path, dtype: torch.dtype, word: str) -> None:
    """F20: refused by their dtype, before anything is read, with or without a quantization_config."""
    name = "model.layers.0.mlp.up_proj.weight"
    theirs = rewritten(llama, tmp_path / "theirs", lambda tensors: tensors.update({name: tensors[name].to(dtype)}))
    code, said = imported(theirs, tmp_path / "ours", "--no-check")
    assert code == 2 and f"{name} has the dtype {word}" in said and said.count("\n") == 1, said
    config = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    named = rewritten(llama, tmp_path / "named", lambda _: None, quantization_config=config)
    code, said = imported(named, tmp_path / "ours")
    assert code == 2 and "quantization_config = " in said and said.count("\n") == 1, said


@needs_transformers
def test_an_embedding_with_more_rows_than_tokens(llama: Path, tmp_path: Path) -> None:
    """F24: rows that pad it are left out, and the tokens' are checked through transformers."""

    def padded(tensors: dict[str, torch.Tensor]) -> None:
        for name in (HEAD, EMBEDDING):
            grow(name, 320)(tensors)

    code, said = imported(rewritten(llama, tmp_path / "theirs", padded), tmp_path / "ours")
    assert code == 0 and "through megahp and transformers" in said, said
    ours = Tensors(checkpoint.find(tmp_path / "ours"))
    theirs = load_file(llama / "model.safetensors")
    assert ours["model.embedding.weight"].shape == (384, 32)
    for name, their in (("model.embedding.weight", EMBEDDING), ("model.unembedding.weight", HEAD)):
        assert ours[name][:257].equal(theirs[their])
    few = rewritten(llama, tmp_path / "few", grow(EMBEDDING, 200))
    code, said = imported(few, tmp_path / "never")
    assert code == 2 and "the embedding has 200 rows, and vocab_size is 257" in said and said.count("\n") == 1, said


@needs_transformers
def test_files_that_contradict_each_other(llama: Path, tmp_path: Path) -> None:
    """A file beside an index of others, a tensor in two files, in none, or not in the index: none is chosen."""
    tensors = load_file(llama / "model.safetensors")
    half = {name: tensors[name] for name in list(tensors)[:5]}
    rest = {name: tensor for name, tensor in tensors.items() if name not in half}
    files = {"a.safetensors": half, "b.safetensors": rest}
    index = {name: file for file, held in files.items() for name in held}
    first = min(half)
    cases: dict[str, tuple[dict[str, Any], dict[str, str], str, int]] = {
        "as it should be": (files, index, "not checked", 0),
        "older": ({**files, "model.safetensors": tensors}, index, "remove the one that is older", 2),
        "twice": ({**files, "b.safetensors": {**rest, first: tensors[first]}}, index, f"holds {first}", 2),
        "nowhere": (
            {**files, "a.safetensors": {**half, "more": half[first].clone()}},
            index,
            "holds more, which its",
            2,
        ),
        "lost": ({**files, "a.safetensors": {k: v for k, v in half.items() if k != first}}, index, f"lacks {first}", 2),
        "one": ({"model.safetensors": tensors}, dict.fromkeys(tensors, "model.safetensors"), "not checked", 0),
    }
    for name, (held, weight_map, words, expected) in cases.items():
        folder = tmp_path / name
        folder.mkdir()
        shutil.copy(llama / "config.json", folder)
        for file, content in held.items():
            save_file(content, folder / file, metadata={"format": "pt"})
        listing = {"metadata": {"total_size": 1}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(listing))
        code, said = imported(folder, tmp_path / f"{name} ours", "--no-check")
        assert code == expected and words in said, (name, said)
        assert said.count("\n") == 1 or code == 0


@needs_transformers
def test_what_is_no_model_is_named(llama: Path, tmp_path: Path) -> None:
    """Weights that are not finite, weights as pickles only, a config.json of a gigabyte: one line, and nothing left."""
    nan = rewritten(llama, tmp_path / "nan", lambda tensors: tensors["model.norm.weight"][3:4].fill_(torch.nan))
    code, said = imported(nan, tmp_path / "ours")
    assert code == 2 and "model.norm.weight holds NaN or infinity" in said and said.count("\n") == 1, said
    shutil.copytree(llama, pickled := tmp_path / "pickled")
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    code, said = imported(pickled, tmp_path / "ours")
    assert code == 2 and "pytorch_model.bin is a pickle" in said and said.count("\n") == 1, said
    with (pickled / "config.json").open("r+") as large:
        large.truncate(2**30)
    code, said = imported(pickled, tmp_path / "ours")
    assert code == 2 and "has 1,073,741,824 bytes" in said and said.count("\n") == 1, said
    assert not (tmp_path / "ours").exists() and not list(tmp_path.glob(".partial*"))


@needs_transformers
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
