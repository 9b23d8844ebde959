"""Larger vocabularies by the real command: rows against numpy and the tokenizers' own libraries, old tokens untouched."""

from __future__ import annotations

import contextlib
import io
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from corpus import write_corpus
from distributed import world
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer, sentencepiece_model_pb2
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor

from megahp import checkpoint, resolve
from megahp.checkpoint.shards import Tensors
from megahp.config import Config
from megahp.parallel.parameters import saved, storage
from megahp.train.run import state_of_weights
from megahp.train.sample import alone

SCRIPT = Path(__file__).parents[2] / "tools" / "extend_vocabulary.py"
LETTERS = {chr(byte): byte for byte in (*range(33, 127), *range(161, 173), *range(174, 256))}  # as GPT-2 shows bytes
LETTERS |= {chr(256 + n): byte for n, byte in enumerate(b for b in range(256) if b not in LETTERS.values())}
LETTER_OF = {byte: letter for letter, byte in LETTERS.items()}
MERGES = ["t h", "th e", "Ġ the", "i n", "Ġ in", "Ġ Ġ", "Ã ©", "in g", "Ġin g", "Ġ Ð", "e r"]  # one is half a character
BASE = {
    "model": {"layers": 1, "width": 16, "heads": 2},
    "data": {"sequence_length": 24, "lengths": ["1e6:48"]},
    "train": {"tokens": 10**7},
}


def byte_level(path: Path, merges: int, more: tuple[str, ...] = (), eod: str = "<|endoftext|>") -> str:
    """A tokenizer.json of bytes, an end of document, so many merges, and further special tokens."""
    vocab = {LETTER_OF[byte]: byte for byte in range(256)} | {eod: 256}
    pairs = [tuple(merge.split()) for merge in MERGES[:merges]]
    vocab |= {"".join(pair): 257 + n for n, pair in enumerate(pairs)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=pairs))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tree = json.loads(tokenizer.to_str())
    plain = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False) | {"special": True}
    names = {256: eod} | {257 + len(pairs) + n: name for n, name in enumerate(more)}
    tree["added_tokens"] = [{"id": number, "content": name, **plain} for number, name in names.items()]
    path.write_text(json.dumps(tree))
    return str(path)


def sentencepiece(path: Path, more: tuple[str, ...], prefix: bool) -> str:
    """A SentencePiece model, with further pieces at its end. prefix: it puts a space before a text."""
    model = io.BytesIO()
    lines = Path(contextlib.__file__).read_text().split("\n")
    SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=model, model_type="bpe", vocab_size=420, byte_fallback=True,
        add_dummy_prefix=prefix, remove_extra_whitespaces=False, minloglevel=3,
    )  # fmt: skip
    proto = sentencepiece_model_pb2.ModelProto.FromString(model.getvalue())
    for number, piece in enumerate(more):
        proto.pieces.add(piece=piece, score=-1000.0 - number)
    path.write_bytes(proto.SerializeToString())
    return str(path)


@torch.no_grad()
def written(folder: Path, tokenizer: str, vocab_size: int, **model: Any) -> dict[str, Tensor]:
    """A checkpoint in which every weight, the vocabulary's padding too, is random."""
    layers = [BASE, {"model": model | {"vocab_size": vocab_size}, "data": {"tokenizer": tokenizer}}]
    settings = resolve.resolve([("test", layer) for layer in layers]).config
    generator = torch.Generator().manual_seed(len(str(folder)))
    weights = {name: storage(weight) for name, weight in saved(alone(settings)).items()}
    tensors = {name: torch.randn(weight.shape, generator=generator) for name, weight in weights.items()}
    masks = {"mask.blocks.0.mlp.up.weight": torch.ones(3, dtype=torch.bool)}
    moments = {"exp_avg.embedding.weight": torch.ones(3)}
    everything = iter((tensors | masks | moments).items())
    checkpoint.write(checkpoint.path(folder / "checkpoints", 7), everything, state_of_weights(settings), 10**9)
    return tensors | masks


def settings_in(folder: Path) -> Config:
    state = checkpoint.read_state(checkpoint.find(folder))
    return resolve.from_dict(state["config"], "state")


def logits(folder: Path, ids: list[int]) -> Tensor:
    from convert_checkpoint import our_logits

    settings, tensors = settings_in(folder), Tensors(checkpoint.find(folder))
    weights = [(name, tensors[name]) for name in tensors if name.startswith("model.")]
    return our_logits(settings, weights, torch.tensor([ids]))


def extend(tool: Any, *words: object) -> tuple[int, str]:
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        code = tool.main([*map(str, words)])
    return code, said.getvalue()


def everything(folder: Path) -> dict[str, Any]:
    sys.path.insert(0, str(SCRIPT.parent))
    import extend_vocabulary as tool

    found: dict[str, Any] = {}

    def case(name: str, before: Mapping[str, Tensor], *words: object) -> None:
        code, said = extend(tool, *words)
        assert code == 0, said
        path = checkpoint.find(words[1])
        assert not checkpoint.problems(path)
        found[name] = {"before": before, "after": dict(Tensors(path).items()), "said": said}
        found[name]["settings"] = settings_in(words[1])

    small, wide = byte_level(folder / "small.json", 3), byte_level(folder / "wide.json", len(MERGES), ("<|user|>",))
    of_bytes = written(folder / "bytes", "bytes", 257, tied_embeddings=True)
    case("bytes, mean", of_bytes, folder / "bytes", folder / "a", "--tokenizer", wide, "--rule", "mean", "--text", SCRIPT)
    of_small = written(folder / "small", small, 260)
    case("small, mean", of_small, folder / "small", folder / "b", "--tokenizer", wide, "--rule", "mean")
    case("small, zeros", of_small, folder / "small", folder / "c", "--tokenizer", wide, "--rule", "zeros")
    many = byte_level(folder / "many.json", 3, tuple(f"<{n}>" for n in range(400)))
    case("many, zeros", of_small, folder / "small", folder / "d", "--tokenizer", many, "--rule", "zeros")
    donor = written(folder / "donor", byte_level(folder / "donor.json", len(MERGES) - 1), 266, width=24, heads=2)
    words = ("--tokenizer", wide, "--rule", "projection", "--donor", folder / "donor", "--file-size", 1e-5)
    case("small, projection", of_small, folder / "small", folder / "e", *words)
    found["small, projection"]["donor"] = donor
    for kind, prefix in (("plain", False), ("prefix", True)):
        pieces = ("▁contextlibs", "ings", "▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁", "ключ")
        old = sentencepiece(folder / f"{kind}.model", (), prefix)
        new = sentencepiece(folder / f"{kind} wide.model", pieces, prefix)
        before = written(folder / kind, old, 420)
        case(kind, before, folder / kind, folder / f"{kind} wide", "--tokenizer", new, "--rule", "mean")
        found[kind]["files"] = old, new
    ids = list(b"the thing is in there")
    found["logits"] = [logits(folder / place, ids) for place in ("small", "b", "c", "e")]
    found["trained"] = trained(folder, folder / "b")
    found["mistakes"] = {words: extend(tool, *words.format(folder=folder).split()) for words, _ in MISTAKES}
    found["left over"] = [path.name for path in folder.glob("*never*")]
    return found


def trained(folder: Path, begun: Path) -> dict[str, Tensor]:
    """After a step of the embeddings alone, from the run file that was written."""
    from megahp.launch import World
    from megahp.parallel.layout import Layout
    from megahp.train.loop import train
    from megahp.train.run import prepare

    write_corpus(folder / "corpus", 0.02)
    (folder / "corpus.json").unlink(missing_ok=True)
    words = f"data.train=['{folder}/corpus'] log.root={folder} log.name=stage log.tensorboard=false train.steps=1"
    words += " train.weights=embeddings train.noise_scale=false train.validation_samples=0 batch.micro_batch=4"
    settings = resolve.load(begun / "config.toml", [*words.split(), "batch.global_batch=4"]).config
    return dict(Tensors(checkpoint.find(train(prepare(settings, Layout(), 1, False), World(), Layout(), False))).items())


MISTAKES = [
    ("{folder}/small {folder}/never --tokenizer bytes --rule mean", "257 tokens, no more than 260"),
    ("{folder}/small {folder}/never --tokenizer {folder}/plain.model --rule mean", "token 0 is b'<unk>' and was b'\\x00'"),
    ("{folder}/small {folder}/b --tokenizer {folder}/wide.json --rule mean", "b exists"),
    ("{folder}/small {folder}/never --tokenizer {folder}/no.json --rule mean", "does not exist"),
    ("{folder}/none {folder}/never --tokenizer {folder}/wide.json --rule mean", "neither a checkpoint"),
    ("{folder}/small {folder}/never --tokenizer {folder}/wide.json --rule projection", "no --donor"),
    ("{folder}/small {folder}/never --tokenizer {folder}/wide.json --rule mean --donor {folder}/donor", "--rule mean"),
    (
        "{folder}/small {folder}/never --tokenizer {folder}/wide.json --rule projection --donor {folder}/bytes",
        "none of the 8 new tokens",
    ),
    ("{folder}/small {folder}/never --tokenizer {folder}/wide.json --rule zeros --text {folder}", "no file that holds"),
    ("{folder}/small {folder}/never --tokenizer {folder}/wide.json --rule zeros --file-size 0", "--file-size 0"),
]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory, tool: ModuleType) -> dict[str, Any]:
    return world.run(1, everything, tmp_path_factory.mktemp("vocabulary"))[0]
