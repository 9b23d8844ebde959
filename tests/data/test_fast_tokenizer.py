import json
import random
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import sentencepiece
import tokenizers
from tokenizers import pre_tokenizers

from megahp import cli
from megahp.commands.preprocess import load_tokenizer_once
from megahp.data import fast_tokenizer
from megahp.data.fast_tokenizer import FastTokenizer, InexactError
from megahp.data.tokenizer import load_tokenizer, train_sentencepiece
from megahp.errors import UserError

LLAMA = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LINE = "the's isn't I'VE 12345 naïve 数据 👍🏽 été </s> <s> <unk> <|endoftext|> <0x0A> self.x() ١٢٣"
WORDS = [*LINE.split(), "\n", "\n \n\n\t ", "\r\n", "", "\u2581"]
PREFIX = {"vocab_size": 400, "model_type": "bpe", "byte_fallback": True, "minloglevel": 3, "hard_vocab_limit": False}
PREFIX |= {"normalization_rule_name": "identity", "remove_extra_whitespaces": False}
NEW = "\u088f\ua7ce\U00016ea0"  # letters of Unicode 17


def lines(seed=0, count=300):
    source = random.Random(seed)
    texts = [" ".join(source.choices(WORDS, k=source.randrange(1, 30))) for _ in range(count)]
    return [text + chr(source.choice([0x41, 0xE9, 0x4E2D, 0x1F600, 0x301, 0x200D, 0xA0])) for text in texts]


def byte_level(path, first):
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = first
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(lines(1), trainer)
    tokenizer.save(str(path))


@pytest.fixture(scope="module", params=["gpt2.json", "llama.json", "ours.model", "prefix.model"])
def path(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("fast") / request.param
    if path.name == "ours.model":
        train_sentencepiece(lines(1), path, 400)
    elif path.name == "prefix.model":
        sentencepiece.SentencePieceTrainer.train(
            **PREFIX, sentence_iterator=iter(lines(1)), model_prefix=str(path)[:-6]
        )
    elif path.name == "gpt2.json":
        byte_level(path, pre_tokenizers.ByteLevel(add_prefix_space=False))
    else:
        split = pre_tokenizers.Split(tokenizers.Regex(LLAMA), "isolated")
        byte_level(path, pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)]))
    return str(path)


@pytest.fixture
def fake(monkeypatch):
    """In place of gigatoken, which may not be installed: tokenizers, with an id less for texts that hold `wrong`."""
    module = SimpleNamespace(wrong=None)

    class Tokenizer:
        def __init__(self, text):
            self.library = tokenizers.Tokenizer.from_str(text)

        def encode(self, text):
            ids = np.array(self.library.encode(text, add_special_tokens=False).ids, np.uint32)
            return ids[:-1] if module.wrong and module.wrong in text else ids

        from_json = classmethod(lambda cls, text: cls(text))

    module.Tokenizer = Tokenizer
    monkeypatch.setitem(sys.modules, "gigatoken", module)
    module.__spec__ = object()  # it can be found
    load_tokenizer_once.cache_clear()
    yield module
    load_tokenizer_once.cache_clear()


def test_gigatoken_encodes_as_the_tokenizer_does(path, monkeypatch):
    """What it is not compared on, too: special tokens are text, and letters newer than its tables are letters."""
    pytest.importorskip("gigatoken")
    own = load_tokenizer(path)
    fast = FastTokenizer(own)
    monkeypatch.setattr(FastTokenizer, "_compare", lambda *arguments: None)
    texts = ["", " ", "\n", "\u2581", *lines(2, 2000), *(f"{letter}'S {letter}a1{letter}. \n" for letter in NEW)]
    for text, ids, lost, expected in zip(
        texts, *fast.encode_batch(texts), map(own.encode_counting, texts), strict=True
    ):
        assert (ids.tolist(), lost) == expected, text
    assert fast.decode(fast.encode(texts[9])) == own.decode(own.encode(texts[9]))


@pytest.fixture
def gpt2(tmp_path):
    byte_level(tmp_path / "tokenizer.json", pre_tokenizers.ByteLevel(add_prefix_space=False))
    return str(tmp_path / "tokenizer.json")


def test_the_first_texts_and_some_later_ones_are_compared(gpt2, fake, monkeypatch):
    monkeypatch.setattr(fast_tokenizer, "FIRST", 1000)
    monkeypatch.setattr(fast_tokenizer, "SHARE", 0.01)
    compared = []
    monkeypatch.setattr(
        FastTokenizer,
        "_compare",
        lambda self, text, ids: compared.append(text) or setattr(self, "_compared", self._compared + len(text)),
    )
    fast = FastTokenizer(load_tokenizer(gpt2))
    for _ in range(100):
        fast.encode_batch(["ten chars." * 5] * 20)
    assert compared[:20] == ["ten chars." * 5] * 20
    assert 1000 + 0.01 * 100_000 <= sum(map(len, compared)) <= 1000 + 0.01 * 100_000 + 100


def test_another_id_is_named(gpt2, fake):
    fast = FastTokenizer(load_tokenizer(gpt2))
    fake.wrong = "été"
    fast.encode_batch(["good"])
    with pytest.raises(InexactError, match=r"encodes '.*' to \[.*\] where '.*tokenizer.json' has \[.*; use --engine"):
        fast.encode_batch(["good", "an été"])


def preprocess(folder, output, *words):
    load_tokenizer_once.cache_clear()
    names = "--input", str(folder / "in.jsonl"), "--output", str(folder / output), "--workers", "1", "--overwrite"
    code = cli.main(["preprocess", *names, "--tokenizer", str(folder / "tokenizer.json"), *words])
    return code, *((folder / f"{output}.{suffix}").read_bytes() for suffix in ("bin", "idx") if not code)


def test_a_job_begins_again_without_what_proves_inexact(gpt2, fake, tmp_path, monkeypatch, capsys):
    """And ends as if it had never been used, unless it was asked for."""
    monkeypatch.setattr(fast_tokenizer, "FIRST", 10**9)
    monkeypatch.setattr("megahp.commands.preprocess.CHUNK_CHARACTERS", 1000)
    texts = [*lines(3), "wrong here", *lines(4)]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    code, *expected = preprocess(tmp_path, "own", "--engine", "library")
    assert code == 0 and preprocess(tmp_path, "fast", "--engine", "gigatoken") == (0, *expected)
    fake.wrong = "wrong"
    capsys.readouterr()
    assert preprocess(tmp_path, "again") == (0, *expected)
    assert "use --engine library; begins again with the tokenizer's own library" in capsys.readouterr().err
    assert preprocess(tmp_path, "asked", "--engine", "gigatoken") == (2,)
    assert "gigatoken encodes" in capsys.readouterr().err and not (tmp_path / "asked.bin").exists()


def test_what_gigatoken_does_not_read_is_left_to_the_library(fake, tmp_path, monkeypatch, capsys):
    """Or refused, if it was asked for."""
    (tmp_path / "in.jsonl").write_text(json.dumps({"text": "aé"}) + "\n")
    drops = tokenizers.models.BPE({"a": 0, "</s>": 1}, [])  # what it lacks is counted by its own library alone
    tokenizers.Tokenizer(drops).save(str(tmp_path / "tokenizer.json"))
    assert preprocess(tmp_path, "auto", "--eos", "</s>")[0] == 0
    assert preprocess(tmp_path, "asked", "--eos", "</s>", "--engine", "gigatoken") == (2,)
    assert "use --engine library" in capsys.readouterr().err
    for change in ({"remove_extra_whitespaces": True}, {"normalization_rule_name": "nfkc"}):
        texts = {"sentence_iterator": iter(lines(1)), "model_prefix": str(tmp_path / "changing")}
        sentencepiece.SentencePieceTrainer.train(**PREFIX | change, **texts)
        with pytest.raises(UserError, match="does not encode as '.*changing.model' does"):
            FastTokenizer(load_tokenizer(str(tmp_path / "changing.model")))
    with pytest.raises(UserError, match="does not encode as 'bytes' does"):
        FastTokenizer(load_tokenizer("bytes"))
    monkeypatch.setitem(sys.modules, "gigatoken", None)
    assert preprocess(tmp_path, "missing", "--eos", "</s>", "--engine", "gigatoken") == (2,)
    assert "pip install 'megahp[fast]'" in capsys.readouterr().err
