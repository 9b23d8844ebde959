import hashlib
import os
import random
import sys

import pytest

from megahp.data.tokenizer import _sample_lines, fingerprint_of, load_tokenizer, train_sentencepiece
from megahp.errors import UserError
from megahp.files import LARGEST

tokenizers = pytest.importorskip("tokenizers")
pytest.importorskip("sentencepiece")

CODE = '''def add(first, second):
\tif first:
        return first + second  # the sum of both  numbers 12345


class Adder:
    """Adds «numbers», été, 数."""
'''


def corpus():
    words = [f"{a}{b}" for a in ("get", "set", "run", "all", "index") for b in ("", "_item", "_self", "er", "s")]
    source = random.Random(0)
    return [CODE + "".join(f"    {' '.join(source.choices(words, k=6))}\n" for _ in range(200)) for _ in range(5)]


@pytest.fixture(scope="module")
def sentencepiece_path(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "code.model"
    train_sentencepiece(corpus(), path, 400, seed=1)
    return path


@pytest.fixture(scope="module")
def huggingface_path(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<pad>", "</s>", "<|endoftext|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus(), trainer)
    tokenizer.save(str(path))
    return path


@pytest.fixture(params=["bytes", "sentencepiece", "huggingface"])
def tokenizer(request):
    path = "bytes" if request.param == "bytes" else request.getfixturevalue(f"{request.param}_path")
    return load_tokenizer(str(path))


def random_texts(count):
    """Texts of code, blanks, special tokens and characters from all over Unicode but its surrogates."""
    source = random.Random(7)
    fragments = [
        "\n",
        "\n\n",
        "\t",
        "  ",
        " " * 9,
        "\r\n",
        "\u2581",
        "\u2581\u2581",
        "\0",
        "\ufeff",
        "\u2047",
        "\u00a0",
    ]
    fragments += [
        "<|endoftext|>",
        "</s>",
        "<unk>",
        "<0x0A>",
        "é",
        "e\u0301",
        "👩‍👩‍👧",
        "数",
        "ﬁ",
        "１２",
        CODE,
        "return",
        "x1",
    ]

    def character():
        code = source.choice([source.randrange(128), source.randrange(0x3000), source.randrange(0x110000)])
        return chr(code) if not 0xD800 <= code < 0xE000 else "?"

    for _ in range(count):
        yield "".join(
            source.choice(fragments) if source.random() < 0.5 else character() for _ in range(source.randrange(40))
        )


def test_decode_undoes_encode_for_any_text(tokenizer):
    texts = [CODE, "", " ", "\n", "   a", "a   ", "\u2581", " \u2581 ", *random_texts(1500)]
    for text in texts:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert all(0 <= i < tokenizer.vocab_size and i != tokenizer.eod for i in ids)


def test_end_of_document_decodes_to_nothing(tokenizer):
    assert tokenizer.decode([*tokenizer.encode("a b"), tokenizer.eod, *tokenizer.encode(" c")]) == "a b c"


def test_bytes():
    tokenizer = load_tokenizer("bytes")
    assert (tokenizer.vocab_size, tokenizer.eod) == (257, 256)
    assert tokenizer.encode("aé\n") == [97, 0xC3, 0xA9, 10]


def test_sentencepiece_compresses_and_names_its_end(sentencepiece_path):
    tokenizer = load_tokenizer(str(sentencepiece_path))
    text = corpus()[0]
    assert tokenizer.vocab_size == 400 and len(tokenizer.encode(text)) < 0.6 * len(text)
    assert fingerprint_of(str(sentencepiece_path)) == hashlib.sha256(sentencepiece_path.read_bytes()).hexdigest()
    assert len(tokenizer.encode("\n\n")) == 2, "a newline is a token of its own"
    assert len(tokenizer.encode("123")) <= 4, "digits stand alone"
    assert len(tokenizer.encode("        ")) < 8, "indentation is merged"


def test_training_is_reproducible(sentencepiece_path, tmp_path):
    train_sentencepiece(corpus(), tmp_path / "again.model", 400, seed=1)
    assert (tmp_path / "again.model").read_bytes() == sentencepiece_path.read_bytes()


def test_training_says_nothing_and_leaves_one_file(tmp_path, capfd):
    train_sentencepiece(corpus(), tmp_path / "quiet.model", 400, seed=1)
    assert capfd.readouterr() == ("", "")
    assert [path.name for path in tmp_path.iterdir()] == ["quiet.model"]


def test_huggingface_takes_the_first_known_end(huggingface_path):
    tokenizer = load_tokenizer(str(huggingface_path))
    assert tokenizer.eod == tokenizers.Tokenizer.from_file(str(huggingface_path)).token_to_id("<|endoftext|>") == 2


def test_sample_lines_is_bounded_even_and_seeded():
    texts = ["".join(f"{line:07d}\n" for line in range(start, start + 100)) for start in range(0, 100_000, 100)]
    lines = _sample_lines(iter(texts), 70_000, seed=3)
    assert 30_000 <= sum(map(len, lines)) <= 70_000
    thirds = [sum(low <= int(line) / 100_000 < low + 0.25 for line in lines) for low in (0, 0.25, 0.5, 0.75)]
    assert max(thirds) < 1.15 * min(thirds)
    assert lines == _sample_lines(iter(texts), 70_000, seed=3) != _sample_lines(iter(texts), 70_000, seed=4)
    assert _sample_lines(["a\n\nb\n", "c"], 1000, seed=0) == ["a", "b", "c"]


def test_one_line_longer_than_the_sample_is_kept():
    assert _sample_lines(["x" * 500], 100, seed=0) == ["x" * 500]


@pytest.mark.parametrize(
    ("texts", "vocab_size", "reason"),
    [
        ([], 400, "holds no text"),
        (["", "\n"], 400, "holds no text"),
        (["ab"], 4000, "too high"),
        (["ab"], 10, "10 pieces cannot"),
    ],
)
def test_training_that_cannot_work_is_one_line(tmp_path, texts, vocab_size, reason):
    with pytest.raises(UserError, match=reason) as error:
        train_sentencepiece(texts, tmp_path / "bad.model", vocab_size)
    assert "bad.model" in str(error.value) and "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_training_overwrites_nothing(sentencepiece_path):
    with pytest.raises(UserError, match="exists"):
        train_sentencepiece(corpus(), sentencepiece_path, 400)


@pytest.mark.parametrize("name", ["gpt2", "missing.model", "missing.json", "x.txt"])
def test_unknown_tokenizers_are_named(name):
    with pytest.raises(UserError, match=name):
        load_tokenizer(name)


@pytest.mark.parametrize("name", ["bad.model", "bad.json"])
def test_damaged_tokenizers_are_named(tmp_path, name):
    (tmp_path / name).write_bytes(b"nonsense")
    with pytest.raises(UserError, match=name):
        load_tokenizer(str(tmp_path / name))
    os.truncate(tmp_path / name, LARGEST + 1)  # which a library would read whole
    with pytest.raises(UserError, match="268,435,457 bytes"):
        load_tokenizer(str(tmp_path / name))
    (tmp_path / name).unlink()
    os.mkfifo(tmp_path / name)
    with pytest.raises(UserError, match="not a regular file"):
        load_tokenizer(str(tmp_path / name))


def test_a_tokenizer_without_an_end_is_refused(tmp_path):
    path = tmp_path / "endless.json"
    tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0}, unk_token="a")).save(str(path))
    with pytest.raises(UserError, match="end-of-document"):
        load_tokenizer(str(path))


def test_a_missing_package_is_named(monkeypatch, sentencepiece_path):
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    with pytest.raises(UserError, match="pip install sentencepiece"):
        load_tokenizer(str(sentencepiece_path))
