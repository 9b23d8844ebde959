import contextlib
import hashlib
import json
import os
import random
import sys

import pytest

from megahp import cli
from megahp.commands.preprocess import load_tokenizer_once
from megahp.data.indexed import IndexedDataset
from megahp.data.tokenizer import (
    _sample_lines,
    encode_parts,
    fingerprint_of,
    load_tokenizer,
    refuse_other,
    train_sentencepiece,
)
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


# A tokenizer is what it encodes.

KINDS = ["unigram", "bpe", "bpe-whole-words", "fallback", "wordpiece", "wordlevel"]
SPECIAL = ["<unk>", "<s>", "</s>"]


def build(kind, path, **change):
    """Save a tokenizer.json whose vocabulary itself holds its special tokens, as texts with HTML make them useful."""
    models, trainers, pre = tokenizers.models, tokenizers.trainers, tokenizers.pre_tokenizers
    words = {"vocab_size": 400, "special_tokens": SPECIAL, "show_progress": False}
    alphabet = pre.ByteLevel.alphabet()
    bytes_alone = pre.ByteLevel(add_prefix_space=False, use_regex=False)
    made, trainer, pre_tokenizer = {
        "unigram": (models.Unigram(), trainers.UnigramTrainer(unk_token="<unk>", **words), pre.Metaspace()),
        "bpe": (models.BPE(), trainers.BpeTrainer(initial_alphabet=alphabet, **words), bytes_alone),
        "bpe-whole-words": (
            models.BPE(ignore_merges=True),
            trainers.BpeTrainer(initial_alphabet=alphabet, **words),
            pre.Sequence([pre.WhitespaceSplit(), bytes_alone]),
        ),
        "fallback": (  # as Llama's; its bytes are made special tokens too
            models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True),
            trainers.BpeTrainer(**words | {"special_tokens": SPECIAL + [f"<0x{byte:02X}>" for byte in range(256)]}),
            pre.Split(" ", "merged_with_next"),
        ),
        "wordpiece": (models.WordPiece(unk_token="<unk>"), trainers.WordPieceTrainer(**words), pre.WhitespaceSplit()),
        "wordlevel": (models.WordLevel(unk_token="<unk>"), trainers.WordLevelTrainer(**words), pre.WhitespaceSplit()),
    }[kind]
    decoders = tokenizers.decoders
    decoder = decoders.Metaspace() if kind == "unigram" else decoders.WordPiece()
    decoder = decoders.ByteLevel() if "bpe" in kind else decoder
    decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()]) if kind == "fallback" else decoder
    tokenizer = tokenizers.Tokenizer(made)
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizer, decoder
    # a BPE finds it in a text only if its merges spell it, as those of one that saw HTML may
    tokenizer.train_from_iterator(
        [*corpus(), "< / > s x\n" * 9, "a </s> b <s> </s></s> c</s>d </s>\n" * 300 * (kind in ("bpe", "fallback"))],
        trainer,
    )
    tokenizer.save(str(path))
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    return path


@pytest.mark.parametrize("kind", KINDS)
def test_f6_a_text_never_becomes_a_special_token(tmp_path, kind):
    """F6: a document that holds the text `</s>`, where the vocabulary itself holds it; other texts keep their ids."""
    path = build(kind, tmp_path / "tokenizer.json")
    tokenizer, theirs = load_tokenizer(str(path)), tokenizers.Tokenizer.from_file(str(path))
    theirs.encode_special_tokens = True
    spelt = "add </s> first</s></s> <s>x </s>"
    found = [theirs.encode(part, add_special_tokens=False).ids for part in (spelt, " </s>", "</s>")]
    assert any(2 in ids for ids in found), "this kind would have made an end of it"
    assert (tokenizer.eod, tokenizer.bos, tokenizer.vocab_size) == (2, 1, theirs.get_vocab_size())
    for part in (spelt, " </s>", "</s>", "<s>", "<unk>", CODE + spelt):
        ids = tokenizer.encode(part)
        assert not {1, 2} & set(ids)
        assert kind != "unigram" or part == "<unk>" or tokenizer.decode(ids).strip() == part.strip()
    for text in (CODE, *corpus()[:2], "Ж / ÿ \0"):
        assert tokenizer.encode(text) == theirs.encode(text, add_special_tokens=False).ids
    assert tokenizer.decode([0, 2, 1]) == "<unk>", "special tokens keep their names"


@pytest.mark.parametrize("model_type", ["unigram", "bpe"])
@pytest.mark.parametrize(("symbols", "name"), [(["run"], "run"), ([], "\u2581run")], ids=["user-defined", "ordinary"])
def test_f6_nor_with_sentencepiece(tmp_path, model_type, symbols, name):
    """F6, where the end of a .model is a piece that its library finds in texts."""
    import sentencepiece

    lines = (line for text in corpus() for line in text.split("\n"))
    sizes = {"bpe": 150, "unigram": 62}
    words = {"model_type": model_type, "vocab_size": sizes[model_type], "user_defined_symbols": symbols}
    prefix, names = tmp_path / "tokenizer", {"eos_id": -1, "bos_id": -1, "minloglevel": 3}
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=lines, model_prefix=str(prefix), **words, **names)
    theirs = sentencepiece.SentencePieceProcessor(model_file=f"{prefix}.model")
    end = theirs.piece_to_id(name)
    assert end in theirs.encode("a run b")
    with pytest.raises(UserError, match="--eos"):  # an ordinary piece is no end that could be guessed
        load_tokenizer(f"{prefix}.model")
    tokenizer = load_tokenizer(f"{prefix}.model", name)
    assert tokenizer.eod == end and end not in tokenizer.encode("a run b run")
    assert tokenizer.decode(tokenizer.encode("a run b")) == "a run b"
    assert tokenizer.encode(CODE) == theirs.encode(CODE)


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_f4_state_in_the_file_changes_no_id(tmp_path, kind):
    """F4: as transformers saves a tokenizer after a call with truncation and padding; and a BPE with dropout."""
    clean = load_tokenizer(str(build(kind, tmp_path / "clean.json")))
    state = tokenizers.Tokenizer.from_file(str(tmp_path / "clean.json"))
    state.enable_truncation(max_length=16)
    state.enable_padding(length=100_000, pad_id=0)
    added = tokenizers.processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)])
    state.post_processor = added
    saved = json.loads(state.to_str())
    if kind == "bpe":
        saved["model"]["dropout"] = 0.5
    (tmp_path / "state.json").write_text(json.dumps(saved, indent=3))
    tokenizer = load_tokenizer(str(tmp_path / "state.json"))
    assert len(clean.encode(corpus()[0])) > 1000
    assert tokenizer.encode(corpus()[0]) == clean.encode(corpus()[0])
    assert tokenizer.adds_bos and not clean.adds_bos
    assert fingerprint_of(tokenizer.path) == fingerprint_of(clean.path), "it encodes the same"


def folder_of(tmp_path, **files):
    """A tokenizer with `</s>` as an ordinary token and several special ones, as Gemma's, and files beside it."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    tokenizer.add_special_tokens(["<pad>", "<eos>", "<bos>", "<turn>"])
    tokenizer.add_tokens(["</s>", "<s>"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    saved = json.loads((tmp_path / "tokenizer.json").read_text())
    saved["model"]["vocab"] = {letter: 6 + i for i, letter in enumerate(alphabet)}
    for token, name in enumerate(["<pad>", "<eos>", "<bos>", "<turn>", "</s>", "<s>"]):
        saved["model"]["vocab"][name] = token
    (tmp_path / "tokenizer.json").write_text(json.dumps(saved))
    for name, content in files.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    return str(tmp_path / "tokenizer.json")


CONFIGURED = [
    ({}, (1, 2)),  # the special ones, though `</s>` comes first in the list
    ({"tokenizer_config": {"eos_token": "<turn>", "bos_token": None}, "config": {"bos_token_id": 0}}, (3, None)),
    ({"tokenizer_config": {"eos_token": {"content": "<turn>"}, "bos_token": {"content": "<pad>"}}}, (3, 0)),
    ({"special_tokens_map": {"eos_token": "</s>", "bos_token": "<s>"}, "config": {"eos_token_id": 3}}, (4, 5)),
    ({"generation_config": {"eos_token_id": [3, 1], "bos_token_id": 0}}, (3, 0)),
    ({"config": {"eos_token_id": 3, "bos_token_id": True}}, (3, 2)),
]


@pytest.mark.parametrize(("files", "expected"), CONFIGURED)
def test_f5_the_end_is_the_configured_one(tmp_path, files, expected):
    """F5: from the files beside the tokenizer first; what ends or begins a document is then no ordinary token."""
    tokenizer = load_tokenizer(folder_of(tmp_path, **files))
    assert (tokenizer.eod, tokenizer.bos) == expected
    ids = tokenizer.encode("a</s>b<s><eos><turn>")
    assert not {tokenizer.eod, tokenizer.bos, 1, 2, 3} & set(ids) and (4 in ids) == (tokenizer.eod != 4)
    assert {4, 5} <= {*ids, tokenizer.eod, tokenizer.bos}
    for eos, bos, given in [("<pad>", "1", (0, 1)), ("3", "none", (3, None)), ("</s>", "<s>", (4, 5))]:
        tokenizer = load_tokenizer(folder_of(tmp_path, **files), eos, bos)
        assert (tokenizer.eod, tokenizer.bos) == given, "the user's word is first"
        assert not {*given, 1, 2, 3} & set(tokenizer.encode("a</s>b<s><eos><turn>"))


@pytest.mark.parametrize(
    ("files", "words", "problem"),
    [
        ({"tokenizer_config": {"eos_token": "<|im_end|>"}}, {}, "tokenizer_config.json names '<|im_end|>'"),
        ({"generation_config": {"eos_token_id": 10**6}}, {}, "generation_config.json names 1000000"),
        ({"tokenizer_config": [1]}, {}, "tokenizer_config.json holds no object"),
        ({}, {"eos": "<|im_end|>"}, "--eos names '<|im_end|>'"),
        ({}, {"bos": "99999"}, "--bos names 99999"),
    ],
)
def test_f5_an_end_that_is_not_there_is_one_line(tmp_path, files, words, problem):
    with pytest.raises(UserError, match="(give --|correct or remove)") as error:
        load_tokenizer(folder_of(tmp_path, **files), **words)
    assert problem in str(error.value) and "\n" not in str(error.value)


def test_f8_a_fingerprint_is_of_what_is_encoded(tmp_path):
    """F8: another tokenizer of the same size has another, and a file that is saved again keeps it."""
    path = build("bpe", tmp_path / "tokenizer.json")
    saved, first = json.loads(path.read_text()), fingerprint_of(str(path))

    def fingerprint(change):
        copy = json.loads(json.dumps(saved))
        change(copy)
        (tmp_path / "other.json").write_text(json.dumps(copy, indent=1))
        assert load_tokenizer(str(tmp_path / "other.json")).vocab_size == 400
        return fingerprint_of(str(tmp_path / "other.json"))

    def swap(copy):
        vocab = copy["model"]["vocab"]
        vocab["x"], vocab["y"] = vocab["y"], vocab["x"]

    same = [
        lambda copy: None,
        lambda copy: copy.update(truncation=None, decoder=None),
        lambda copy: copy["model"].update(dropout=0.1, merges=[" ".join(pair) for pair in saved["model"]["merges"]]),
        lambda copy: copy["model"].pop("byte_fallback"),
    ]
    others = [
        swap,
        lambda copy: copy["model"]["merges"].reverse(),
        lambda copy: copy["pre_tokenizer"].update(add_prefix_space=True),
        lambda copy: copy.update(normalizer={"type": "Lowercase"}),
        lambda copy: copy["added_tokens"][1].update(special=False),
    ]
    assert {fingerprint(change) for change in same} == {first}
    assert len({first, *map(fingerprint, others)}) == 6
    refuse_other(str(path), first, "x")
    refuse_other(str(path), hashlib.sha256(path.read_bytes()).hexdigest(), "x")  # of data by an older megahp
    refuse_other(str(path), "", "x")
    with pytest.raises(UserError, match="is not the one x"):
        refuse_other(str(tmp_path / "other.json"), first, "x")


def test_what_is_lost_is_counted(tmp_path, sentencepiece_path, huggingface_path):
    """Unknown tokens, and characters that a tokenizer drops without a trace."""
    stripping = {"type": "Sequence", "normalizers": [{"type": "Replace", "pattern": {"String": "é"}, "content": ""}]}
    cases = [
        ("unigram", {}, "add Ж Ю self", 2),
        ("wordlevel", {}, "run Ж Ю run", 2),
        ("wordpiece", {}, "run Ж Ю run", 2),
        ("bpe", {}, "add Ж Ю self", 0),
        ("bpe", {"normalizer": stripping}, "éé add", 2),
        ("bpe", {"pre_tokenizer": {"type": "WhitespaceSplit"}}, "add Ж Ю self", 2),
    ]
    for number, (kind, change, text, expected) in enumerate(cases):
        tokenizer = load_tokenizer(str(build(kind, tmp_path / f"{number}.json", **change)))
        ids, lost = tokenizer.encode_counting(text)
        assert ids == tokenizer.encode(text) and lost == expected, kind
    for path in ("bytes", sentencepiece_path, huggingface_path):
        assert load_tokenizer(str(path)).encode_counting("add Ж Ю self\u2581")[1] == 0


def test_preprocessing_is_blind_to_state_and_says_what_is_lost(tmp_path, capsys):
    """F4, F6 as a user meets them: tokens, ends and losses of `megahp preprocess`."""
    folder_of(tmp_path, generation_config={"eos_token_id": [3, 1]})
    texts = ["first </s> text <turn> " * 100, "second"]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))

    def tokens(name, *words):
        load_tokenizer_once.cache_clear()  # of a process that runs one command
        command = ["preprocess", "--input", "in.jsonl", "--output", name, "--workers", "1", "--tokenizer"]
        with contextlib.chdir(tmp_path):
            assert cli.main([*command, "tokenizer.json", *words]) == 0
            data = IndexedDataset(name)
            return [data.tokens(document).tolist() for document in range(data.documents)]

    first = tokens("clean")
    assert [[i for i in ids if i < 6] for ids in first] == [[4] * 100 + [3], [3]], "4 is an ordinary token"
    assert len(first[0]) == 1 + len(texts[0]) - 3 * 100  # `</s>` is one token
    description = json.loads((tmp_path / "clean.json").read_text())
    assert description | {"eod": 3, "bos": 2} == description
    saved = json.loads((tmp_path / "tokenizer.json").read_text())
    limit = {"truncation": {"direction": "Right", "max_length": 8, "strategy": "LongestFirst", "stride": 0}}
    (tmp_path / "tokenizer.json").write_text(json.dumps(saved | limit, indent=1))
    assert tokens("state") == first and "unknown" not in capsys.readouterr().out
    given = tokens("given", "--eos", "</s>", "--bos", "<pad>")
    assert [(ids[0], ids[-1], ids.count(4)) for ids in given] == [(0, 4, 1)] * 2
    lossy = {"normalizer": {"type": "Replace", "pattern": {"String": "f"}, "content": ""}}
    (tmp_path / "tokenizer.json").write_text(json.dumps(saved | lossy))
    assert len(tokens("lossy")[0]) == len(first[0]) - 100
    said = capsys.readouterr().out
    assert "100 unknown tokens, or characters that tokenizer.json drops" in said and "spaces" not in said
    spaces = {"normalizer": {"type": "Replace", "pattern": {"Regex": "\\s+"}, "content": " "}}
    (tmp_path / "tokenizer.json").write_text(json.dumps(saved | spaces))
    tokens("spaces")
    assert "tokenizer.json does not keep all spaces" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["unigram", "bpe", "bytes", "sentencepiece", "sentencepiece-with-prefix"])
def test_a_text_in_parts_has_the_ids_of_the_whole(tmp_path, sentencepiece_path, kind):
    """What a tokenizer puts before a text comes once, though a long document is encoded in parts."""
    pre = tokenizers.pre_tokenizers
    prefixing = pre.Metaspace(prepend_scheme="first") if kind == "unigram" else pre.ByteLevel(add_prefix_space=False)
    path = str(sentencepiece_path) if kind == "sentencepiece" else kind
    if kind in KINDS:
        tokenizer = tokenizers.Tokenizer.from_file(str(build(kind, tmp_path / "tokenizer.json")))
        tokenizer.pre_tokenizer = pre.Sequence([pre.Split("\n", "isolated"), prefixing])
        tokenizer.save(path := str(tmp_path / "tokenizer.json"))
    elif kind.endswith("prefix"):
        import sentencepiece

        words = {"vocab_size": 69, "user_defined_symbols": ["\n"], "minloglevel": 3, "remove_extra_whitespaces": False}
        path, texts = str(tmp_path / "prefix.model"), (line for text in corpus() for line in text.split("\n"))
        sentencepiece.SentencePieceTrainer.train(sentence_iterator=texts, model_prefix=path[:-6], **words)
    tokenizer = load_tokenizer(path)
    lines = corpus()[0].splitlines(keepends=True)[:50]
    parts = [
        ids.tolist() for ids, _ in encode_parts(tokenizer, [(line, not number) for number, line in enumerate(lines)])
    ]
    assert [i for ids in parts for i in ids] == tokenizer.encode("".join(lines))
