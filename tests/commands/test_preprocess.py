import gzip
import io
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from megahp import cli
from megahp.data.indexed import IndexedDataset
from megahp.data.tokenizer import fingerprint_of, load_tokenizer

SCRIPT = Path(__file__).parents[2] / "tools" / "preprocess_data.py"
COMMAND = ["preprocess"]
zstandard = pytest.importorskip("zstandard")

TEXTS = ["def f():\n\treturn 1\n", "été\n\n", "", "  x = 2", "数据 \u2581 0123\r\n"]


@pytest.fixture
def run(tool, tmp_path):
    def run(*arguments, tokenizer="bytes", output="out", workers=1):
        fixed = ["--output", tmp_path / output, "--tokenizer", tokenizer, "--workers", workers]
        return cli.main([*COMMAND, "--input", *map(str, (*arguments, *fixed))])

    return run


def documents(prefix, tokenizer="bytes", eod=True):
    """Return the texts of an output prefix, after checking how each ends."""
    tokenizer = load_tokenizer(str(tokenizer))
    dataset = IndexedDataset(str(prefix))
    rows = [dataset.tokens(d).tolist() for d in range(dataset.documents)]
    assert all((row.count(tokenizer.eod), row[-1] == tokenizer.eod) == (eod, eod) for row in rows)
    return [tokenizer.decode(row) for row in rows]


def json_lines(texts, key="text"):
    return "".join(json.dumps({"id": 1, key: text}) + "\n" for text in texts).encode()


def corpus(folder, files=60):
    source = random.Random(0)
    for k in range(files):
        path = folder / f"{'abc'[k % 3]}" / f"{source.randrange(10**6)}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        words = source.choices(["self", "return", "x", "数", "\n    ", "value_12", "(", ")"], k=source.randrange(4000))
        path.write_text(" ".join(words))
    return folder


def test_a_text_file_is_one_document_kept_to_the_byte(run, tmp_path, capsys):
    (tmp_path / "a.txt").write_bytes(b"one\r\n\n two\t")
    assert run(tmp_path / "a.txt") == 0
    assert documents(tmp_path / "out") == ["one\r\n\n two\t"]
    assert json.loads((tmp_path / "out.json").read_text()) == {
        "tokenizer": "bytes",
        "tokenizer_fingerprint": fingerprint_of("bytes"),
        "vocab_size": 257,
        "eod": 256,
        "bos": None,
        "documents": 1,
        "tokens": 12,
    }
    assert "1 documents, 12 tokens" in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.txt", "out.bin", "out.idx", "out.json"]


def zstandard_frames(data):
    """Compress into two frames, as `zstd` on two files and `cat` would."""
    return zstandard.compress(data[:70]) + zstandard.compress(data[70:])


@pytest.mark.parametrize(
    ("name", "pack"), [("d.jsonl", bytes), ("d.jsonl.gz", gzip.compress), ("d.jsonl.zst", zstandard_frames)]
)
def test_json_lines_are_documents(run, tmp_path, name, pack):
    (tmp_path / name).write_bytes(pack(json_lines(TEXTS, "content")))
    assert run(tmp_path / name, "--json-key", "content") == 0
    assert documents(tmp_path / "out") == [text for text in TEXTS if text]


@pytest.mark.parametrize(("name", "pack"), [("d.jsonl.gz", gzip.compress), ("d.jsonl.zst", zstandard.compress)])
def test_a_cut_archive_is_refused_not_taken_for_short(run, tmp_path, capsys, name, pack):
    whole = pack(json_lines(str(random.Random(k).random()) for k in range(20_000)))
    (tmp_path / name).write_bytes(whole[: len(whole) // 2])
    assert run(tmp_path / name) == 2
    assert name in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_a_folder_is_read_in_sorted_order_by_extension(run, tmp_path, capsys):
    folder = tmp_path / "in"
    for name in ("b/2.py", "b/1.py", "a.rst", "c.txt", "skipped.md"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    (folder / "latin.py").write_bytes(b"\xe9t\xe9")
    (folder / "empty.py").write_text("")
    assert run(folder) == 0
    assert documents(tmp_path / "out") == ["a.rst", "b/1.py", "b/2.py", "c.txt"]
    assert "skipped 1 documents" in capsys.readouterr().out
    assert run(folder, "--extensions", "md", "--no-eod", output="md") == 0
    assert documents(tmp_path / "md", eod=False) == ["skipped.md"]


def test_bad_json_lines_are_skipped_and_counted(run, tmp_path, capsys):
    bad = [b"{broken\n", b'{"text": null}\n', b'{"text": "\\ud800"}\n', b"\xff\n", b"[1]\n", b'{"other": 1}\n', b"\n"]
    bad.append(b"[" * 100_000 + b"\n")  # deeper than the parser goes
    (tmp_path / "d.jsonl").write_bytes(json_lines(["first"]) + b"".join(bad) + json_lines(["last"]))
    assert run(tmp_path / "d.jsonl") == 0
    assert documents(tmp_path / "out") == ["first", "last"]
    assert "skipped 7 documents" in capsys.readouterr().out


def test_output_does_not_depend_on_workers_and_round_trips(run, tool, tmp_path, monkeypatch):
    monkeypatch.setattr(tool, "CHUNK_CHARACTERS", 20_000)
    folder, model = corpus(tmp_path / "in"), tmp_path / "t" / "code.model"
    assert run(folder, "--train-sentencepiece", 300, tokenizer=model, output="one") == 0
    trained = model.read_bytes()
    assert run(folder, "--train-sentencepiece", 999, tokenizer=model, output="two", workers=2) == 0
    assert model.read_bytes() == trained, "an existing tokenizer is used, not trained again"
    for suffix in ("bin", "idx", "json"):
        assert (tmp_path / f"one.{suffix}").read_bytes() == (tmp_path / f"two.{suffix}").read_bytes()
    texts = [path.read_text() for path in sorted(folder.rglob("*.py"))]
    assert documents(tmp_path / "two", model) == [text for text in texts if text]


def test_long_documents_are_encoded_in_pieces_with_the_same_tokens(run, tool, tmp_path, monkeypatch):
    folder, model = corpus(tmp_path / "in"), tmp_path / "code.model"
    assert run(folder, "--train-sentencepiece", 300, tokenizer=model, output="whole") == 0
    monkeypatch.setattr(tool, "PIECE_CHARACTERS", 500)
    assert run(folder, tokenizer=model, output="pieces") == 0
    assert (tmp_path / "whole.bin").read_bytes() == (tmp_path / "pieces.bin").read_bytes()
    pieces = list(tool.split_text("line of text\n" * 500))
    assert len(pieces) > 5 and all(piece.endswith("\n") for piece in pieces)
    assert list(tool.split_text("x" * 1700)) == ["x" * 1000, "x" * 700]


def test_reading_is_never_far_ahead_of_writing(tool, monkeypatch):
    read = []

    def chunks():
        for k in range(100):
            read.append(k)
            yield [tool.Document(str(k), 1)]

    encode = tool.partial(tool.encode_chunk, ("bytes", "", ""), True)
    for done, encoded in enumerate(tool.map_in_order(encode, chunks(), workers=2)):
        assert encoded.ids.tolist() == [*str(done).encode(), 256]
        assert len(read) <= done + 1 + 4


def test_as_a_command_without_torch(tmp_path):
    """Spawned workers re-import the script; none of them, nor the script, may need the training stack."""
    (tmp_path / "d.jsonl").write_bytes(json_lines(TEXTS))
    (tmp_path / "torch.py").write_text("raise ImportError('the data tools must not import torch')")
    paths = os.pathsep.join([str(tmp_path), str(SCRIPT.parents[1])])
    command = [
        sys.executable,
        SCRIPT,
        "--input",
        "d.jsonl",
        "--output",
        "out",
        "--tokenizer",
        "bytes",
        "--workers",
        "2",
    ]
    environment = {**os.environ, "PYTHONPATH": paths}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert documents(tmp_path / "out") == [text for text in TEXTS if text]


def refused(run, capsys, *arguments, **options):
    assert run(*arguments, **options) == 2
    error = capsys.readouterr().err
    assert error.startswith("megahp: ") and error.count("\n") == 1
    return error


def test_invalid_input_is_reported_in_one_line_and_writes_nothing(run, tmp_path, capsys):
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "d.jsonl").write_bytes(json_lines(["x"], "content"))
    (tmp_path / "folder").mkdir()
    before = sorted(tmp_path.iterdir())
    model = tmp_path / "new.model"
    assert "missing" in refused(run, capsys, tmp_path / "missing")
    assert "holds no text" in refused(run, capsys, tmp_path / "empty.txt")
    assert "holds no text" in refused(
        run, capsys, tmp_path / "empty.txt", "--train-sentencepiece", 300, tokenizer=model
    )
    assert ".py .rst .txt" in refused(run, capsys, tmp_path / "folder")
    assert "id, content" in refused(run, capsys, tmp_path / "d.jsonl")
    assert "gpt2" in refused(run, capsys, tmp_path / "a.txt", tokenizer="gpt2")
    assert "--workers is 0" in refused(run, capsys, tmp_path / "a.txt", workers=0)
    assert sorted(tmp_path.iterdir()) == before


def test_existing_output_is_kept_unless_asked(run, tmp_path, capsys):
    (tmp_path / "a.txt").write_text("old")
    (tmp_path / "b.txt").write_text("new")
    assert run(tmp_path / "a.txt") == 0
    assert "out.bin" in refused(run, capsys, tmp_path / "b.txt")
    assert documents(tmp_path / "out") == ["old"]
    assert run(tmp_path / "b.txt", "--overwrite") == 0
    assert documents(tmp_path / "out") == ["new"]


def test_progress_is_printed_in_lines(tool, monkeypatch, capsys):
    clock = iter([0.0, 10.0, 40.0, 50.0])
    monkeypatch.setattr(tool.time, "monotonic", lambda: next(clock))
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    with tool.show_progress(10_000_000) as advance:
        for _ in range(3):
            advance(2_000_000)
    assert sys.stderr.getvalue() == "tokenizing: 4 of 10 MB, 0.1 MB/s, 60 s left\n"
