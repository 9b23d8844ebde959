"""Tokenizers of exported models, against the libraries that read them, and what a round trip keeps beside them."""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import shutil
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from commands.test_convert import GQA, convert, needs_transformers, settings_of, written
from safetensors.torch import load_file
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer
from tokenizers import Tokenizer, decoders, models, normalizers, processors, trainers

from megahp import cli
from megahp.checkpoint import find
from megahp.checkpoint import settings_of as settings_of_checkpoint
from megahp.config import resolve
from megahp.convert import tokenizers
from megahp.convert.tokenizers import of_sentencepiece
from megahp.errors import UserError

TEXT = Path(argparse.__file__).read_text()
LLAMA = {"model_type": "bpe", "byte_fallback": True, "normalization_rule_name": "identity"}
LLAMA |= {"remove_extra_whitespaces": False, "add_dummy_prefix": True, "allow_whitespace_only_pieces": True}
KINDS: dict[str, dict[str, Any]] = {
    "llama": LLAMA,
    "default": {**LLAMA, "normalization_rule_name": "nmt_nfkc", "remove_extra_whitespaces": True},
    "without byte fallback": {"model_type": "bpe"},
    "symbols": {**LLAMA, "add_dummy_prefix": False, "user_defined_symbols": ["<|start|>", "\n\n", "\n"]},
    "unigram": {"model_type": "unigram"},
}
TEXTS = ["", " ", "  ", "a", " a", "a ", "   a  b   ", "\n", "\n\n x", "\t\tx", "<|start|>a  b", "aaaaaaaa", "0123 45"]
TEXTS += ["caf\u00e9", "e\u0301", "\ufb01\u2460", "a\u00a0b", "\u3000x", "\u6f22\u6f22a", "\U0001f600\x00"]
TEXTS += [TEXT[at : at + 200] for at in range(0, 60_000, 170)]


def trained(file: Path, **options: Any) -> Path:
    with file.open("wb") as model:
        SentencePieceTrainer.train(
            sentence_iterator=iter(TEXT.split("\n")), model_writer=model, vocab_size=600, minloglevel=3, **options
        )
    return file


@pytest.mark.parametrize("kind", KINDS)
def test_every_text_has_sentencepieces_tokens(tmp_path: Path, kind: str) -> None:
    """F23: dummy prefix, byte fallback, normalisation, removed spaces, symbols of the user's; back to text too."""
    file = trained(tmp_path / "tokenizer.model", **KINDS[kind])
    pieces, built = SentencePieceProcessor(model_file=str(file)), of_sentencepiece(str(file))
    ours = Tokenizer.from_str(json.dumps(built))
    for text in TEXTS:
        ids = pieces.encode(text)
        found = ours.encode(text, add_special_tokens=False).ids
        if kind == "unigram":  # where two ways to cut a text are as likely, the libraries choose another
            assert sum(map(pieces.get_score, found)) == pytest.approx(sum(map(pieces.get_score, ids)), rel=1e-6), text
        else:
            assert found == ids, text
        if "byte_fallback" in KINDS[kind]:  # else unknown characters have another text
            assert ours.decode(ids) == pieces.decode(ids), text


def test_what_a_json_cannot_express_is_refused(tmp_path: Path) -> None:
    """F23: symbols of several characters, and a space before each text: the space would come after each symbol too, and
    spaces beside it be removed."""
    for number, kind in enumerate(("llama", "without byte fallback")):
        file = trained(tmp_path / f"{number}.model", **KINDS[kind], user_defined_symbols=["<|start|>"])
        with pytest.raises(UserError, match=r"symbols such as '<\|start\|>' and spaces put before"):
            of_sentencepiece(str(file))


def test_kept_ids_of_special_tokens_are_ids(tmp_path: Path) -> None:
    name = str(tmp_path / "tokenizer.json")
    assert tokenizers.special_tokens(name, 7) == {"bos_token_id": None, "eos_token_id": 7}
    kept = {"eos_token_id": [1, 2], "bos_token_id": 0, "pad_token_id": None}
    (tmp_path / "config.json").write_text(json.dumps(kept))
    assert tokenizers.special_tokens(name, 7) == kept
    for wrong in ("2", [1, "2"], True, 1.5):
        (tmp_path / "config.json").write_text(json.dumps({**kept, "eos_token_id": wrong}))
        with pytest.raises(UserError, match="eos_token_id = .* is neither a token's id nor a list of them"):
            tokenizers.special_tokens(name, 7)


@needs_transformers
def test_a_llama_of_sentencepiece_is_exported_right_or_not_at_all(tmp_path: Path) -> None:
    """F23, through transformers; and with another tokenizer than the model's nothing stays."""
    from transformers import AutoTokenizer

    file = trained(tmp_path / "tokenizer.model", **LLAMA)
    config = settings_of("sp", {**GQA, "vocab_size": 600}, data={"tokenizer": str(file)})
    written(config, tmp_path / "ours")
    code, said = convert("megahp", "huggingface", tmp_path / "ours", tmp_path / "theirs")
    assert code == 0 and "through megahp and transformers" in said, said
    theirs, pieces = AutoTokenizer.from_pretrained(tmp_path / "theirs"), SentencePieceProcessor(model_file=str(file))
    assert [theirs.encode(text, add_special_tokens=False) for text in TEXTS] == pieces.encode(TEXTS)
    assert (theirs.eos_token, theirs.eos_token_id) == ("</s>", 2)

    def wrong(name: str) -> dict[str, Any]:
        built = of_sentencepiece(name)
        return built | {"normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}}

    with mock.patch.object(tokenizers, "of_sentencepiece", wrong):
        code, said = convert("megahp", "huggingface", tmp_path / "ours", tmp_path / "never")
    assert code == 1 and "to other tokens" in said and said.count("megahp: ") == 1, said
    assert not list(tmp_path.glob("*never*"))


KEPT = {
    "bos_token": "<s>",
    "eos_token": "</s>",
    "pad_token": {"content": "<pad>", "__type": "AddedToken", "special": True},
    "add_bos_token": True,
    "add_eos_token": False,
    "model_max_length": 4096,
    "padding_side": "left",
    "chat_template": "{% for message in messages %}{{ message.content }}{% endfor %}",
}
GENERATION = {"bos_token_id": 1, "eos_token_id": [2, 5], "temperature": 0.6, "top_p": 0.9, "max_new_tokens": 77}


def llama_folder(folder: Path, **names: str) -> Path:
    """Write a folder like Llama's: bfloat16, a tokenizer that begins texts, a chat template, generation settings."""
    import transformers

    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    ids = {"bos_token_id": 1, "eos_token_id": [2, 5], "pad_token_id": 3}
    config = transformers.LlamaConfig(vocab_size=500, max_position_embeddings=64, **ids, **sizes)
    transformers.LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    fast = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    fast.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    fast.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    special = ["<unk>", "<s>", "</s>", "<pad>"] + [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=500, special_tokens=special, show_progress=False)
    fast.train_from_iterator([TEXT[:20_000]], trainer)
    fast.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    saved = json.loads(fast.to_str())
    saved["added_tokens"] = saved["added_tokens"][:4]  # the bytes are pieces as others
    (folder / "tokenizer.json").write_text(json.dumps(saved))
    tokenizer_config = {"tokenizer_class": "LlamaTokenizer", **KEPT}
    auto_map = {"auto_map": {"AutoTokenizer": ["their.Tokenizer", None]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer_config | auto_map))
    (folder / "special_tokens_map.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>"}))
    (folder / "generation_config.json").write_text(json.dumps(GENERATION))
    (folder / "chat_template.jinja").write_text(KEPT["chat_template"] + "\n")
    return folder


@needs_transformers
def test_a_round_trip_keeps_what_stands_beside_a_model(tmp_path: Path) -> None:
    """F21, F22: begin, end and pad tokens, template, generation settings, limits and dtype, and so after a move."""
    from transformers import AutoTokenizer, GenerationConfig

    source = llama_folder(tmp_path / "theirs")
    code, said = convert("huggingface", "megahp", source, tmp_path / "r1")
    assert code == 0, said
    (tmp_path / "elsewhere").mkdir()
    moved = shutil.move(tmp_path / "r1", tmp_path / "elsewhere/r2")
    code, said = convert("megahp", "huggingface", moved, tmp_path / "again")
    assert code == 0, said
    for file in ("generation_config.json", "special_tokens_map.json", "chat_template.jinja", "tokenizer.json"):
        assert (tmp_path / "again" / file).read_text() == (source / file).read_text()
    tokenizer_config = json.loads((tmp_path / "again/tokenizer_config.json").read_text())
    assert tokenizer_config == {"tokenizer_class": "LlamaTokenizer", **KEPT}  # and no code
    before, after = (json.loads((folder / "config.json").read_text()) for folder in (source, tmp_path / "again"))
    ids = ("bos_token_id", "eos_token_id", "pad_token_id", "max_position_embeddings")
    assert [before[key] for key in ids] == [after[key] for key in ids] == [1, [2, 5], 3, 64]
    assert after["torch_dtype"] == "bfloat16"
    one, other = (load_file(folder / "model.safetensors") for folder in (source, tmp_path / "again"))
    assert one.keys() == other.keys() and all(one[name].equal(other[name]) for name in one)
    assert all(tensor.dtype == torch.bfloat16 for tensor in other.values())
    (source / "tokenizer_config.json").write_text(json.dumps(tokenizer_config))
    theirs, ours = (AutoTokenizer.from_pretrained(folder) for folder in (source, tmp_path / "again"))
    messages = [{"role": "user", "content": "hello there"}]
    assert theirs.encode("hello there") == ours.encode("hello there") and ours.encode("hello")[0] == 1
    assert theirs.apply_chat_template(messages) == ours.apply_chat_template(messages)
    assert ours.model_max_length == 4096 and ours.pad_token_id == 3
    assert GenerationConfig.from_pretrained(tmp_path / "again").eos_token_id == [2, 5]


@needs_transformers
def test_an_imported_run_can_be_moved(tmp_path: Path) -> None:
    """F22: evaluated, sampled and trained on after a move, though another model is imported in its old place."""
    source = llama_folder(tmp_path / "theirs")
    assert convert("huggingface", "megahp", source, tmp_path / "r1", "--no-check")[0] == 0
    (tmp_path / "r1").rename(tmp_path / "r2")
    shutil.copytree(source, other := tmp_path / "other")
    small = Tokenizer.from_file(str(other / "tokenizer.json"))
    small.add_special_tokens(["<new>"])
    small.save(str(other / "tokenizer.json"))
    settings = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**settings, "vocab_size": 500}))
    (tmp_path / "r1").mkdir()
    shutil.copy(other / "tokenizer.json", tmp_path / "r1")
    text = tmp_path / "text.txt"
    text.write_text("def hello():\n    return 1\n" * 5)
    output = io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        assert cli.main(["evaluate", str(tmp_path / "r2"), str(text)]) == 0, output.getvalue()
        assert cli.main(["sample", str(tmp_path / "r2"), "--tokens", "2"]) == 0, output.getvalue()
    tokenizer = str(tmp_path / "r2/tokenizer.json")
    assert settings_of_checkpoint(find(tmp_path / "r2")).data.tokenizer == tokenizer
    config = resolve.load(tmp_path / "r2/config.toml").config
    assert (config.data.tokenizer, config.train.start_from) == (tokenizer, str(tmp_path / "r2"))
