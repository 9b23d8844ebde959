"""Extend vocabularies by the real command: rows against numpy and SentencePiece, old tokens unchanged."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from corpus import write_corpus
from distributed import runs, world
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer, sentencepiece_model_pb2
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor

from megahp import checkpoint, cli
from megahp.checkpoint.shards import Tensors
from megahp.config import Config, resolve
from megahp.evaluate.sample import single_rank_model
from megahp.parallel.parameters import model_state, storage
from megahp.train.run import state_of_weights

SCRIPT = Path(__file__).parents[2] / "tools" / "extend_vocabulary.py"
COMMAND = ["extend-vocabulary"]
LETTERS = {chr(byte): byte for byte in (*range(33, 127), *range(161, 173), *range(174, 256))}  # as GPT-2 shows bytes
LETTERS |= {chr(256 + n): byte for n, byte in enumerate(b for b in range(256) if b not in LETTERS.values())}
LETTER_OF = {byte: letter for letter, byte in LETTERS.items()}
MERGES = ["t h", "th e", "Ġ the", "i n", "Ġ in", "Ġ Ġ", "Ã ©", "in g", "Ġin g", "Ġ Ð", "e r"]  # one is half a character
BASE = {
    "model": {"layers": 1, "width": 16, "heads": 2},
    "data": {"sequence_length": 24, "lengths": ["1e6:48"]},
    "train": {"tokens": 10**7},
}


SHIFT = 5  # of the donor's ids


def byte_level(path: Path, merges: int, more: tuple[str, ...] = (), eod: str = "<|endoftext|>", shift: int = 0) -> str:
    """A tokenizer.json of bytes, an end of document, so many merges, and further special tokens; all ids but those of
    the last turned by `shift`."""
    vocab = {LETTER_OF[byte]: byte for byte in range(256)} | {eod: 256}
    pairs = [tuple(merge.split()) for merge in MERGES[:merges]]
    vocab |= {"".join(pair): 257 + n for n, pair in enumerate(pairs)}
    vocab = {piece: (number + shift) % len(vocab) for piece, number in vocab.items()}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=pairs))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tree = json.loads(tokenizer.to_str())
    plain = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False) | {"special": True}
    names = {vocab[eod]: eod} | {257 + len(pairs) + n: name for n, name in enumerate(more)}
    tree["added_tokens"] = [{"id": number, "content": name, **plain} for number, name in names.items()]
    path.write_text(json.dumps(tree))
    return str(path)


def sentencepiece(path: Path, more: tuple[str, ...], prefix: bool, byte_fallback: bool = True) -> str:
    """A SentencePiece model, with further pieces at its end. prefix: it puts a space before a text."""
    model = io.BytesIO()
    lines = Path(contextlib.__file__).read_text().split("\n")
    SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=model, model_type="bpe", vocab_size=420, minloglevel=3,
        add_dummy_prefix=prefix, remove_extra_whitespaces=False, byte_fallback=byte_fallback,
    )  # fmt: skip
    proto = sentencepiece_model_pb2.ModelProto.FromString(model.getvalue())
    for number, piece in enumerate(more):
        proto.pieces.add(piece=piece, score=-1000.0 - number)
    path.write_bytes(proto.SerializeToString())
    return str(path)


@torch.no_grad()
def written(folder: Path, tokenizer: str, vocab_size: int, **model: Any) -> dict[str, Tensor]:
    """Write a checkpoint of random weights, including the vocabulary's padding."""
    layers = [BASE, {"model": model | {"vocab_size": vocab_size}, "data": {"tokenizer": tokenizer}}]
    config = resolve.resolve([("test", layer) for layer in layers]).config
    generator = torch.Generator().manual_seed(len(str(folder)))
    weights = {name: storage(weight) for name, weight in model_state(single_rank_model(config)).items()}
    tensors = {name: torch.randn(weight.shape, generator=generator) for name, weight in weights.items()}
    masks = {"mask.blocks.0.mlp.up.weight": torch.ones(3, dtype=torch.bool)}
    moments = {"exp_avg.embedding.weight": torch.ones(3)}
    everything = iter((tensors | masks | moments).items())
    checkpoint.write(checkpoint.path(folder / "checkpoints", 7), everything, state_of_weights(config), 10**9)
    return tensors | masks


def settings_in(folder: Path) -> Config:
    state = checkpoint.read_state(checkpoint.find(folder))
    return resolve.from_dict(state["config"], "state")


def logits(folder: Path, ids: list[int]) -> Tensor:
    from megahp.commands.convert import our_logits

    config, tensors = settings_in(folder), Tensors(checkpoint.find(folder))
    weights = [(name, tensors[name]) for name in tensors if name.startswith("model.")]
    return our_logits(config, weights, torch.tensor([ids]))


def extend(*words: object) -> tuple[int, str]:
    output = io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        code = cli.main([*COMMAND, *map(str, words)])
    return code, output.getvalue()


def everything(folder: Path) -> dict[str, Any]:
    results: dict[str, Any] = {}

    def case(name: str, before: Mapping[str, Tensor], *words: object) -> None:
        code, output = extend(*words)
        assert code == 0, output
        path = checkpoint.find(words[1])
        assert not checkpoint.problems(path)
        results[name] = {"before": before, "after": dict(Tensors(path).items()), "said": output}
        results[name]["settings"] = settings_in(words[1])

    small, wide = byte_level(folder / "small.json", 3), byte_level(folder / "wide.json", len(MERGES), ("<|user|>",))
    of_bytes = written(folder / "bytes", "bytes", 257, tied_embeddings=True)
    case(
        "bytes, mean", of_bytes, folder / "bytes", folder / "a", "--tokenizer", wide, "--rule", "mean", "--text", SCRIPT
    )
    of_small = written(folder / "small", small, 260)
    case("small, mean", of_small, folder / "small", folder / "b", "--tokenizer", wide, "--rule", "mean")
    case("small, zeros", of_small, folder / "small", folder / "c", "--tokenizer", wide, "--rule", "zeros")
    many = byte_level(folder / "many.json", 3, tuple(f"<{n}>" for n in range(400)))
    case("many, zeros", of_small, folder / "small", folder / "d", "--tokenizer", many, "--rule", "zeros")
    donor = written(folder / "donor", byte_level(folder / "donor.json", 10, shift=SHIFT), 267, width=24)
    words = ("--tokenizer", wide, "--rule", "projection", "--donor", folder / "donor", "--file-size", 1e-5)
    case("small, projection", of_small, folder / "small", folder / "e", *words)
    results["small, projection"]["donor"] = donor
    for kind, prefix in (("plain", False), ("prefix", True)):
        pieces = ("▁contextlibs", "ings", "▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁", "ключ", "returns", "selfs", "thes")
        old = sentencepiece(folder / f"{kind}.model", (), prefix)
        new = sentencepiece(folder / f"{kind} wide.model", pieces, prefix)
        before = written(folder / kind, old, 420)
        case(kind, before, folder / kind, folder / f"{kind} wide", "--tokenizer", new, "--rule", "mean")
        results[kind]["files"] = old, new
    written(folder / "ended", byte_level(folder / "ended.json", 0, eod="</s>"), 257)
    byte_level(folder / "ended_twice.json", 0, ("<|endoftext|>",), eod="</s>")
    written(folder / "fat", wide, 269, width=256)
    written(folder / "dumb", sentencepiece(folder / "dumb.model", (), False, byte_fallback=False), 420)
    sentencepiece(folder / "dumb_wide.model", ("ключ",), False, byte_fallback=False)
    tree = json.loads(Path(small).read_text())
    tree["model"]["vocab"]["a b"] = len(tree["model"]["vocab"])
    (folder / "strange.json").write_text(json.dumps(tree))
    written(folder / "hurt", "bytes", 257)
    (checkpoint.find(folder / "hurt") / "index.json").write_text("{")
    ids = list(b"the thing is in there")
    results["logits"] = [logits(folder / place, ids) for place in ("small", "b", "c", "e")]
    results["trained"] = trained(folder, folder / "b")
    results["mistakes"] = {words: extend(*words.format(folder=folder).split()) for words, _ in MISTAKES}
    results["left over"] = [path.name for path in folder.glob("*never*")]
    return results


def trained(folder: Path, begun: Path) -> dict[str, Tensor]:
    """Train the embeddings for a step from the written run file."""
    write_corpus(folder / "corpus", 0.02)
    (folder / "corpus.json").unlink(missing_ok=True)
    words = f"data.train=['{folder}/corpus'] log.root={folder} log.name=stage log.tensorboard=false train.steps=1"
    words += " train.weights=embeddings train.noise_scale=false train.validation_samples=0 batch.micro_batch=4"
    config = resolve.load(begun / "config.toml", [*words.split(), "batch.global_batch=4"]).config
    runs.go(config)
    return dict(Tensors(checkpoint.find(config.directory)).items())


MISTAKES = [
    ("{folder}/small {folder}/never --tokenizer bytes --rule mean", "257 tokens, no more than 260"),
    (
        "{folder}/small {folder}/never --tokenizer {folder}/plain.model --rule mean",
        "token 0 is b'<unk>' and was b'\\x00'",
    ),
    ("{folder}/small {folder}/b --tokenizer {folder}/wide.json --rule mean", "b exists"),
    ("{folder}/small {folder}/never --tokenizer {folder}/no.json --rule mean", "does not exist"),
    ("{folder}/none {folder}/never --tokenizer {folder}/wide.json --rule mean", "neither a checkpoint"),
    ("{folder}/small {folder}/never --tokenizer {folder}/wide.json --rule projection", "no --donor"),
    ("{folder}/small {folder}/never --tokenizer {folder}/wide.json --rule mean --donor {folder}/donor", "--rule mean"),
    (
        "{folder}/small {folder}/never --tokenizer {folder}/wide.json --rule projection --donor {folder}/bytes",
        "none of the 9 new tokens",
    ),
    (
        "{folder}/small {folder}/never --tokenizer {folder}/wide.json --rule projection --donor {folder}/fat",
        "shares 260 tokens with SRC, and a map from its width needs 512",
    ),
    ("{folder}/ended {folder}/never --tokenizer {folder}/ended_twice.json --rule mean", "257 ends a document, and 256"),
    ("{folder}/dumb {folder}/never --tokenizer {folder}/dumb_wide.model --rule mean", "cannot spell the new token"),
    ("{folder}/small {folder}/never --tokenizer {folder}/strange.json --rule mean", "token 'a b' has ' '"),
    (
        "{folder}/small {folder}/never --tokenizer {folder}/wide.json --rule projection "
        "--donor {folder}/hurt/checkpoints/step-00000007",
        "damaged",
    ),
    (
        "{folder}/small {folder}/never --tokenizer {folder}/wide.json --rule zeros --text {folder}",
        "not a file with text",
    ),
    ("{folder}/small {folder}/never --tokenizer {folder}/wide.json --rule zeros --file-size 0", "--file-size 0"),
]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory, tool: ModuleType) -> dict[str, Any]:
    return world.run(1, everything, tmp_path_factory.mktemp("vocabulary"))[0]


MATRICES = ("model.embedding.weight", "model.unembedding.weight")


def rows(case: dict[str, Any], name: str, first: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the old matrix, and the new one's rows from `first`."""
    return case["before"][name].double().numpy(), case["after"][name].double().numpy()[first:]


@pytest.mark.parametrize(
    ("case", "first", "vocabulary", "padded"),
    [
        ("bytes, mean", 257, 269, 384),
        ("small, mean", 260, 269, 384),
        ("small, projection", 260, 269, 384),
        ("many, zeros", 260, 660, 768),
        ("prefix", 420, 427, 512),
    ],
)
def test_all_else_is_as_it_was(results: Any, case: str, first: int, vocabulary: int, padded: int) -> None:
    """Old rows and padding, other weights and masks are bitwise equal; no moments; new padding is the mean."""
    before, after, config = (results[case][key] for key in ("before", "after", "settings"))
    assert before.keys() == after.keys()
    for name, value in before.items():
        if name not in MATRICES:
            assert after[name].equal(value)
            continue
        assert after[name][:first].equal(value[:first]) and len(after[name]) == padded
        assert after[name][vocabulary : len(value)].equal(value[vocabulary:])
        new_padding = after[name][max(vocabulary, len(value)) :].double().numpy()
        np.testing.assert_allclose(
            new_padding, np.broadcast_to(rows(results[case], name, 0)[0][:first].mean(0), new_padding.shape), atol=1e-6
        )
    assert (config.model.vocab_size, config.data.sequence_length, config.data.lengths) == (vocabulary, 48, ())


def test_mean_of_bytes(results: Any) -> None:
    new = [b"th", b"the", b" the", b"in", b" in", b"  ", "é".encode(), b"ing", b" ing", b" \xd0", b"er", b"<|user|>"]
    old, after = rows(results["bytes, mean"], MATRICES[0], 257)
    np.testing.assert_allclose(after[: len(new)], [old[list(token)].mean(0) for token in new], atol=1e-6)
    assert (
        "tokens per byte, 1 before" in results["bytes, mean"]["said"] and "12 by mean" in results["bytes, mean"]["said"]
    )


# as `tokenizers` itself cuts them: 257 to 259 are th, the, Ġthe
PARTS = [[105, 110], [32, 105, 110], [32, 32], [195, 169], [105, 110, 103], [32, 105, 110, 103], [32, 208], [101, 114]]
PARTS.append(list(b"<|user|>"))


@pytest.mark.parametrize("name", MATRICES)
def test_mean_of_tokens(results: Any, name: str) -> None:
    old, after = rows(results["small, mean"], name, 260)
    np.testing.assert_allclose(after[: len(PARTS)], [old[part].mean(0) for part in PARTS], atol=1e-6)
    assert not results["small, zeros"]["after"][name][260:269].any()


@pytest.mark.parametrize("kind", ["plain", "prefix"])
def test_mean_of_sentencepieces(results: Any, kind: str) -> None:
    """Compare with SentencePiece's own split, where it neither adds nor drops a space."""
    old_file, new_file = results[kind]["files"]
    proto = sentencepiece_model_pb2.ModelProto.FromString(Path(old_file).read_bytes())
    proto.normalizer_spec.add_dummy_prefix = False
    pieces = SentencePieceProcessor(model_proto=proto.SerializeToString())
    added = [SentencePieceProcessor(model_file=new_file).id_to_piece(number) for number in range(420, 427)]
    old, after = rows(results[kind], MATRICES[1], 420)
    expected = [old[pieces.encode(piece.replace("▁", " "))].mean(0) for piece in added]
    np.testing.assert_allclose(after[:7], expected, atol=1e-6)


@pytest.mark.parametrize("name", MATRICES)
def test_projection_is_least_squares(results: Any, name: str) -> None:
    """Compare with normal equations. The donor lacks the last merge and the special token."""
    case = results["small, projection"]
    old, after = rows(case, name, 260)
    donor = case["donor"][name].double().numpy()[(np.arange(267) + SHIFT) % 267]
    shared, ours = donor[:260], old[:260]
    fitted = np.linalg.inv(shared.T @ shared) @ shared.T @ ours
    np.testing.assert_allclose(after[:7], donor[260:267] @ fitted, atol=1e-5)
    np.testing.assert_allclose(after[7:9], [old[part].mean(0) for part in PARTS[7:]], atol=1e-6)
    assert "7 by projection" in case["said"] and "2 by mean" in case["said"]


def test_old_tokens_keep_their_logits(results: Any) -> None:
    before, *after = results["logits"]
    assert all(each[..., :260].equal(before) for each in after)


def test_its_run_file_trains_embeddings_alone(results: Any) -> None:
    before, after = results["small, mean"]["after"], results["trained"]
    weights = {name for name in before if name.startswith("model.")}
    assert {name for name in weights if not before[name].equal(after[name])} == set(MATRICES)


@pytest.mark.parametrize(("words", "why"), MISTAKES)
def test_invalid_input(results: Any, words: str, why: str) -> None:
    code, output = results["mistakes"][words]
    assert code == 2 and output.startswith("megahp: ") and len(output.splitlines()) == 1 and why in output, output
    assert results["left over"] == []
