import bz2
import gzip
import io
import json
import lzma
import os
import random
import shutil
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import psutil
import pytest

from megahp import cli
from megahp.data import texts
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
        "largest_id": 256,
        "fingerprint": IndexedDataset(str(tmp_path / "out")).fingerprint,
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
    assert run(folder, "--most-bad", 0.2) == 0
    assert documents(tmp_path / "out") == ["a.rst", "b/1.py", "b/2.py", "c.txt"]
    assert f"left out 1: not UTF-8, the first {folder}/latin.py" in capsys.readouterr().out
    assert run(folder, "--extensions", "md", "--no-eod", output="md") == 0
    assert documents(tmp_path / "md", eod=False) == ["skipped.md"]


def test_bad_json_lines_are_skipped_and_counted(run, tmp_path, capsys):
    bad = [b"{broken\n", b'{"text": null}\n', b'{"text": "\\ud800"}\n', b"\xff\n", b"[1]\n", b'{"other": 1}\n', b"\n"]
    bad.append(b"[" * 100_000 + b"\n")  # deeper than the parser goes
    (tmp_path / "d.jsonl").write_bytes(json_lines(["first"]) + b"".join(bad) + json_lines(["last"]))
    assert run(tmp_path / "d.jsonl", "--most-bad", 0.8) == 0
    assert documents(tmp_path / "out") == ["first", "last"]
    out = capsys.readouterr().out
    assert "left out 2: no JSON, the first" in out and "d.jsonl:2\n" in out


def test_output_does_not_depend_on_workers_and_round_trips(run, tool, tmp_path, monkeypatch):
    monkeypatch.setattr(tool, "CHUNK_CHARACTERS", 20_000)
    folder, model = corpus(tmp_path / "in"), tmp_path / "t" / "code.model"
    assert run(folder, "--train-sentencepiece", 300, tokenizer=model, output="one") == 0
    trained = model.read_bytes()
    assert run(folder, "--train-sentencepiece", 999, tokenizer=model, output="two", workers=2) == 0
    assert model.read_bytes() == trained, "an existing tokenizer is used, not trained again"
    for suffix in ("bin", "idx", "json"):
        assert (tmp_path / f"one.{suffix}").read_bytes() == (tmp_path / f"two.{suffix}").read_bytes()
    whole = [path.read_text() for path in sorted(folder.rglob("*.py"))]
    assert documents(tmp_path / "two", model) == [text for text in whole if text]


def test_long_documents_are_encoded_in_pieces_with_the_same_tokens(run, tool, tmp_path, monkeypatch):
    folder, model = corpus(tmp_path / "in"), tmp_path / "code.model"
    assert run(folder, "--train-sentencepiece", 300, tokenizer=model, output="whole") == 0
    monkeypatch.setattr(texts, "PIECE_CHARACTERS", 500)
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
            yield [tool.Piece(0, k, str(k), k)]

    encode = tool.partial(tool.encode_chunk, ("bytes", "", "", "library"), True)
    for done, encoded in enumerate(tool.map_in_order(encode, chunks(), workers=2)):
        assert encoded.ids.tolist() == [*str(done).encode(), 256]
        assert len(read) <= done + 1 + 4


KILLED_WHILE_THEY_WRITE = """
from itertools import repeat
from megahp.commands.preprocess import map_in_order

if __name__ == "__main__":
    for _ in range(5):
        results = map_in_order(bytes, repeat(bytes(1 << 23)), 2)
        next(results)
        results.close()
"""


def test_workers_killed_while_they_write_are_not_waited_for(tmp_path):
    """F9: chunks and results larger than a pipe holds, as they are by default."""
    (tmp_path / "kill.py").write_text(KILLED_WHILE_THEY_WRITE)
    subprocess.run([sys.executable, "kill.py"], cwd=tmp_path, env=ENVIRONMENT, timeout=60, check=True)


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
        for done in (2_000_000, 4_000_000, 6_000_000):
            advance(done)
    assert sys.stderr.getvalue() == "tokenizing: 4 of 10 MB, 0.1 MB/s, 120 s left\n"


ROWS = [{"text": "one"}, {"text": "two\n", "more": [1, {"a": "}"}]}, {"text": "three"}]
LINES = json_lines(["one", "two\n", "three"])


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("F2.json", LINES),
        ("F3.json.gz", gzip.compress(LINES)),
        ("a.JSONL", LINES),
        ("a.ndjson.GZ", gzip.compress(LINES)),
        ("a.jsonl.bz2", bz2.compress(LINES)),
        ("a.jsonl.xz", lzma.compress(LINES)),
        ("without-an-ending", LINES),
        ("misnamed.txt", LINES),
        ("misnamed-as-not-compressed.jsonl", gzip.compress(LINES)),
        ("bom-and-crlf.jsonl", b"\xef\xbb\xbf" + LINES.replace(b"\n", b"\r\n")),
        ("first-line-longer-than-the-head.json", LINES.replace(b'"id": 1', b'"id": "%s"' % (b"x" * 70_000))),
        ("array.json", json.dumps(ROWS).encode()),
        ("indented.json", b"\xef\xbb\xbf" + json.dumps(ROWS, indent=2).encode() + b"\n"),
        ("array.txt.zst", zstandard.compress(json.dumps(ROWS).encode())),
    ],
)
def test_a_file_is_what_it_holds(run, tmp_path, monkeypatch, name, content):
    """F2, F3 and their kin."""
    monkeypatch.setattr(texts, "BLOCK", 16)  # records lie across blocks
    (tmp_path / name).write_bytes(content)
    assert run(tmp_path / name) == 0
    assert documents(tmp_path / "out") == ["one", "two\n", "three"]


def test_all_kinds_in_one_call(run, tmp_path):
    """F3: nothing is dropped beside a good file."""
    (tmp_path / "a.jsonl").write_bytes(LINES)
    (tmp_path / "b.json.gz").write_bytes(gzip.compress(LINES))
    (tmp_path / "c.md.xz").write_bytes(lzma.compress(b"\xef\xbb\xbfa text\r\n"))
    assert run(*(tmp_path / name for name in ("a.jsonl", "b.json.gz", "c.md.xz"))) == 0
    assert documents(tmp_path / "out") == ["one", "two\n", "three"] * 2 + ["a text\r\n"]


@pytest.mark.parametrize("kind", ["parquet", "arrow", "stream", "large_string"])
def test_columns_are_documents(run, tmp_path, kind, capsys):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import ipc, parquet

    whole = [f"text {number}" for number in range(3000)]
    kept = pyarrow.large_string() if kind == "large_string" else pyarrow.string()
    table = pyarrow.table({"id": range(3001), "text": pyarrow.array([*whole, None], kept)})
    path = tmp_path / ("a.parquet" if kind in ("parquet", "large_string") else "a.arrow")
    if path.suffix == ".parquet":
        parquet.write_table(table, path, row_group_size=700)
    else:
        with (ipc.new_stream if kind == "stream" else ipc.new_file)(path, table.schema) as writer:
            writer.write_table(table, max_chunksize=700)
    assert run(tmp_path, "--extensions", path.suffix) == 0
    assert documents(tmp_path / "out") == whole
    assert f"left out 1: no text in 'text', the first {path}:3001\n" in capsys.readouterr().out
    assert "which has id, text; choose one" in refused(run, capsys, path, "--json-key", "body", output="other")
    path.write_bytes(path.read_bytes()[:-200])
    if kind != "stream":  # whose rows may end anywhere
        assert f"'{path}' cannot be read" in refused(run, capsys, path, output="other")


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("object.json", b'{\n "a": 1,\n "text": "x"\n}', "neither lines nor an array of records"),
        ("notebook.txt", b'{\n "cells": [\n  {\n   "x": "y"}]}', "neither lines nor an array of records"),
        ("other.txt", b'{"a": 1}\n{"a": 2}\n', "--json-key 'text' is not in"),
        ("words.json", b"some words", "neither lines nor an array of records"),
        ("utf16.txt", "text".encode("utf-16"), "is UTF-16 or UTF-32"),
        ("utf16.jsonl", LINES.decode().encode("utf-16"), "is UTF-16 or UTF-32"),
        ("utf16-without-mark.txt", "text".encode("utf-16-le"), "is binary"),
        ("image", b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", "is binary"),
        ("table.csv", b"text,label\na,1\n", "is a table"),
        ("big.parquet", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
        ("page.parquet", b"<html>not found</html>", "holds no data of Parquet"),
        ("a.txt.gz", b"a text", "is named as compressed, and is not"),
        ("nested.json", b'[{"a": ' + b"[" * 100_000, "nested too deeply"),
        ("cut.json", json.dumps(ROWS).encode()[:-4], "record 3"),
        ("more.json", json.dumps(ROWS).encode() + b"x", "text follows the array"),
    ],
)
def test_what_cannot_be_told_is_refused_by_name(run, tmp_path, capsys, name, content, reason):
    (tmp_path / "good.txt").write_text("good")
    (tmp_path / name).write_bytes(content)
    error = refused(run, capsys, tmp_path / "good.txt", tmp_path / name)
    assert reason in error and name in error
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(["good.txt", name])


def test_a_file_name_that_cannot_be_printed_can_be_read_and_told(run, tmp_path, capsys):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / os.fsdecode(b"\xe9\n.txt")).write_text("text")
    (tmp_path / "in" / os.fsdecode(b"\xe9\n.jsonl")).write_bytes(b"[]\n" + LINES)
    assert run(tmp_path / "in", "--most-bad", 1) == 0
    assert (
        "left out 1: no text in 'text', the first" in (out := capsys.readouterr().out) and "udce9\\n.jsonl:1\n" in out
    )


def test_a_format_can_be_said(run, tmp_path, capsys):
    (tmp_path / "package.json").write_text('{\n "name": "x"\n}')
    (tmp_path / "a.csv").write_text("a,b\n")
    assert run(tmp_path, "--extensions", ".json", ".csv", "--format", "text") == 0
    assert documents(tmp_path / "out") == ["a,b\n", '{\n "name": "x"\n}']
    (tmp_path / "words.txt").write_text("no JSON\n")
    assert "1 of 1 documents are bad" in refused(
        run, capsys, tmp_path / "words.txt", "--format", "json", output="other"
    )


def test_what_is_left_out_of_a_folder_is_counted(run, tmp_path, capsys):
    folder = tmp_path / "in"
    for name in ("a.txt", ".git/b.txt", ".git/c.txt", "real/d.txt", ".e.txt", "f.md", "g.md"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    (folder / "link").symlink_to("real")
    (folder / "h.txt").symlink_to("a.txt")
    (folder / "i.txt").symlink_to("nowhere")
    (folder / "j.txt").write_bytes(b"\0\1")
    (folder / "k.txt").write_bytes(b"ends in \xe9")
    (folder / "l.txt").write_bytes(b"a\0" * 10)
    (folder / "m.txt").touch()
    os.mkfifo(folder / "n.txt")
    (folder / "o.jsonl").touch()
    (folder / os.fsdecode(b"p\xe9\n.txt")).write_bytes(b"\xff")
    assert run(folder, folder / "a.txt", "--most-bad", 1) == 0
    assert documents(tmp_path / "out") == ["a.txt", "real/d.txt"]
    told = [line.split("left out ")[1] for line in capsys.readouterr().out.splitlines() if "left out" in line]
    assert sorted(told) == sorted(
        [
            f"1: a hidden folder, the first {folder}/.git",
            f"1: a hidden file, the first {folder}/.e.txt",
            f"1: a link to a folder, the first {folder}/link",
            f"2: another ending, see --extensions, the first {folder}/f.md",
            f"2: the same file as another, the first {folder}/h.txt",
            f"1: no regular file, the first {folder}/n.txt",
            f"1: a link to nothing, the first {folder}/i.txt",
            f"2: binary, the first {folder}/j.txt",
            f"2: not UTF-8, the first {folder}/k.txt",
            f"2: empty, the first {folder}/m.txt",
        ]
    )


def test_more_bad_documents_than_allowed_write_nothing(run, tmp_path, capsys):
    """F13, and F14: a nested line is a bad one."""
    lines = [*json_lines(map(str, range(99))).splitlines(), b"[" * 5000]
    path = tmp_path / "F13.jsonl"
    path.write_bytes(b"\n".join(lines))
    assert run(path) == 0  # 1 % is allowed
    assert f"left out 1: JSON nested too deeply, the first {path}:100\n" in capsys.readouterr().out
    path.write_bytes(lines[0] + b"\n" + b"{broken\n" * 99)
    error = refused(run, capsys, path, output="new")
    assert f"99 of 100 documents are bad, above --most-bad 0.01, the first at {path}:2: no JSON" in error
    assert sorted(each.name for each in tmp_path.iterdir()) == ["F13.jsonl", "out.bin", "out.idx", "out.json"]


@pytest.mark.parametrize("way", ["itself", "symbolic", "hard", "tokenizer", "in a folder", "dots"])
def test_an_output_that_is_an_input_is_refused(run, tmp_path, capsys, way):
    """F1, whatever the name."""
    path = tmp_path / ("wiki.json" if way in ("itself", "tokenizer", "dots") else "input.jsonl")
    path.write_bytes(content := LINES)
    if way == "symbolic":
        (tmp_path / "wiki.json").symlink_to(path)
    elif way == "hard":
        os.link(path, tmp_path / "wiki.json")
    source, tokenizer = (tmp_path / "a.txt", path) if way == "tokenizer" else (path, "bytes")
    (tmp_path / "a.txt").write_text("text")
    if way == "in a folder":  # with a description of megahp's, which alone could be replaced
        path = tmp_path / "wiki.json"
        assert run(tmp_path / "a.txt", output="wiki") == 0
        path.write_text(json.dumps(json.loads(path.read_text())) + "\n")
        source, content = tmp_path, path.read_bytes()
    before = sorted(tmp_path.iterdir())
    output = "none/../wiki" if way == "dots" else "wiki"  # a folder that preprocessing would make
    words = refused(run, capsys, source, "--overwrite", "--extensions", ".json", output=output, tokenizer=tokenizer)
    assert f"--output would replace '{tmp_path}/{output}.json', which is the input '{path}'" in words
    assert path.read_bytes() == content and sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("name", ["out.bin", "out.idx", "out.json", "out.unfinished/precious"])
def test_a_file_of_others_is_not_replaced(run, tmp_path, capsys, name):
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text('{"vocab_size": 3}')
    assert "out." in refused(run, capsys, tmp_path / "a.txt", "--overwrite")
    assert (tmp_path / name).read_text() == '{"vocab_size": 3}'
    assert not (tmp_path / "out.bin").exists() or name == "out.bin"


@pytest.mark.parametrize("content", [LINES, gzip.compress(LINES), b"a text\n"])
def test_standard_input(tmp_path, content):
    command = [sys.executable, SCRIPT, "--input", "-", "--output", "out", "--tokenizer", "bytes", "--workers", "1"]
    done = subprocess.run(command, cwd=tmp_path, input=content, capture_output=True, env=ENVIRONMENT)
    assert (done.returncode, done.stderr) == (0, b"")
    assert documents(tmp_path / "out") == (["a text\n"] if b"text\n" in content else ["one", "two\n", "three"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.bin", "out.idx", "out.json"]


ENVIRONMENT = {**os.environ, "PYTHONPATH": str(SCRIPT.parents[1])}
SLOWLY = """
import sys, time
from megahp import cli
from megahp.commands import preprocess

read = preprocess.read_pieces

def read_slowly(*words):
    for piece in read(*words):
        time.sleep(0.002)
        yield piece

if __name__ == "__main__":
    preprocess.CHUNK_CHARACTERS, preprocess.SECONDS_BETWEEN_LINES, preprocess.read_pieces = 2000, 0, read_slowly
    preprocess.SECONDS_BETWEEN_SAVES = float(sys.argv[1])
    sys.exit(cli.main(["preprocess", *sys.argv[2:]]))
"""


@pytest.mark.parametrize(
    ("whom", "number", "code", "seconds"),
    [
        ("parent", signal.SIGTERM, 143, 30),
        ("group", signal.SIGINT, 130, 30),  # as a terminal does it
        ("group", signal.SIGTERM, 143, 30),  # as Slurm does it
        ("parent", signal.SIGHUP, 129, 30),  # as a lost connection does it
        ("parent", signal.SIGKILL, -9, 0),
        ("worker", signal.SIGKILL, 2, 30),
    ],
)
def test_the_end_of_a_process_leaves_nothing_but_what_resumes(
    run, tmp_path, monkeypatch, capsys, whom, number, code, seconds
):
    """F9: no worker lives on, holding the pipe open, no temporary file stays, and the work that was done is kept."""
    (tmp_path / "slowly.py").write_text(SLOWLY)
    for name in ("a.jsonl", "b.jsonl"):
        (tmp_path / name).write_bytes(json_lines(f"{name} text number {k} " * 5 for k in range(500)))
    words = ["--input", "a.jsonl", "b.jsonl", "--output", "out", "--tokenizer", "bytes", "--workers", "2"]
    command = [sys.executable, "slowly.py", str(seconds), *words]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    # who started these tests in the background may have had ctrl-C ignored, which is inherited
    heed = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    started = subprocess.Popen(command, cwd=tmp_path, env=ENVIRONMENT, preexec_fn=heed, start_new_session=True, **pipes)
    for _ in range(20):
        assert started.stderr.readline().startswith(b"tokenizing: ")
    children = psutil.Process(started.pid).children(recursive=True)
    assert len(children) >= 2
    if whom == "group":
        os.killpg(started.pid, number)
    elif whom == "parent":
        started.send_signal(number)
    else:
        next(child for child in children if "spawn_main" in " ".join(child.cmdline())).send_signal(number)
    _, err = started.communicate(timeout=60)  # to the end of the pipe: all that hold it
    assert started.returncode == code and b"Traceback" not in err, err
    assert code == -signal.SIGKILL or b"the same command resumes" in err
    assert psutil.wait_procs(children, timeout=30)[1] == []
    assert {path.name for path in tmp_path.iterdir()} == {"a.jsonl", "b.jsonl", "slowly.py", "out.unfinished"}
    monkeypatch.chdir(tmp_path)
    for output, told in (("out", "resumes after "), ("whole", "")):
        assert run("a.jsonl", "b.jsonl", output=output) == 0
        assert told in capsys.readouterr().err
    for suffix in ("bin", "idx", "json"):
        assert Path(f"out.{suffix}").read_bytes() == Path(f"whole.{suffix}").read_bytes()
    assert not Path("out.unfinished").exists()


def interrupted(run, tool, monkeypatch, pieces, *words):
    """Press ctrl-C after some pieces were read, into chunks of one document."""

    def read(*words):
        for number, piece in enumerate(texts.read_pieces(*words)):
            if number == pieces:
                raise KeyboardInterrupt
            yield piece

    with monkeypatch.context() as patch:
        patch.setattr(tool, "read_pieces", read)
        patch.setattr(tool, "CHUNK_CHARACTERS", 1)
        assert run(*words) == 130


@pytest.mark.parametrize(
    ("change", "kept"),
    [
        ("nothing", 7),
        ("a later file", 7),
        ("a file more", 7),
        ("the file it is in", 0),
        ("an earlier file", 0),
        ("the order", 0),
        ("a setting", 0),
        ("a damaged state", 0),
        ("cut data", 0),
    ],
)
def test_a_resume_goes_on_only_from_what_it_would_have_written(run, tool, tmp_path, monkeypatch, capsys, change, kept):
    monkeypatch.chdir(tmp_path)
    for name in "abc":
        Path(f"{name}.jsonl").write_bytes(json_lines(f"{name}{k} {'x' * k}" for k in range(5)))
    names, words = [f"{name}.jsonl" for name in "abc"], []
    interrupted(run, tool, monkeypatch, 7, *names)
    assert "stopped by SIGINT; the same command resumes" in capsys.readouterr().err
    changed = {"a later file": "c", "the file it is in": "b", "an earlier file": "a"}.get(change)
    if changed:
        Path(f"{changed}.jsonl").write_bytes(json_lines(["another"]))
    elif change == "a file more":
        shutil.copy("a.jsonl", "d.jsonl")
        names.append("d.jsonl")
    elif change == "the order":
        names.reverse()
    elif change == "a setting":
        words = ["--no-eod"]
    elif change == "a damaged state":
        Path("out.unfinished/state").write_text('{"state": {}, "documents": "x"}')
    elif change == "cut data":
        os.truncate("out.unfinished/bin", 10)
    assert run(*names, *words) == 0
    assert (f"resumes after {kept} documents" in capsys.readouterr().err) == bool(kept)
    assert run(*names, *words, output="whole") == 0
    for suffix in ("bin", "idx", "json"):
        assert Path(f"out.{suffix}").read_bytes() == Path(f"whole.{suffix}").read_bytes()


def test_a_long_text_is_read_in_pieces(run, tool, tmp_path, monkeypatch):
    """Its tokens are those of the whole, a fault at its end leaves out all of it, and work before it is kept."""
    monkeypatch.chdir(tmp_path)
    lines = [f"line {number} {'é' * (number % 90)}\n" for number in range(900)]
    Path("a.txt").write_text("".join(lines))
    Path("b.txt").write_text("".join(reversed(lines)) + "x" * 3000)
    Path("c.txt.gz").write_bytes(gzip.compress("".join(lines).encode() + b"\xe9"))
    names = ["a.txt", "b.txt", "c.txt.gz", "--most-bad", 0.5]
    assert run(*names, output="whole") == 0
    assert documents(tmp_path / "whole") == [Path(name).read_text() for name in names[:2]]
    monkeypatch.setattr(texts, "PIECE_CHARACTERS", 500)
    monkeypatch.setattr(texts, "BLOCK", 333)
    interrupted(run, tool, monkeypatch, 120, *names)
    state = json.loads(Path("out.unfinished/state").read_text())
    assert state["documents"] == 1, "a mark is set after a document, never inside"
    assert run(*names) == 0
    assert Path("out.bin").read_bytes() == Path("whole.bin").read_bytes()


def test_memory_does_not_grow_with_a_document(tmp_path):
    """Of 48 MB; its ids alone would take 200 MB."""
    with open(tmp_path / "a.txt", "w") as file:
        for _ in range(48):
            file.write(("x" * 63 + "\n") * 15_625)
    words = ["preprocess", "--input", "a.txt", "--output", "out", "--tokenizer", "bytes", "--workers", "1"]
    peak = "int(open('/proc/self/status').read().split('VmHWM:')[1].split()[0])"  # KiB; of a child it would be ours too
    script = f"from megahp import cli\nassert cli.main({words}) == 0\nprint({peak})"
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, env=ENVIRONMENT, capture_output=True, check=True
    )
    assert int(done.stdout.split()[-1]) < 100_000
    dataset = IndexedDataset(str(tmp_path / "out"))
    assert (dataset.documents, dataset.total_tokens) == (1, 48_000_001)


def test_progress_is_over_the_bytes_of_compressed_files_too(run, tool, tmp_path, monkeypatch):
    for name in ("a.jsonl.gz", "b.jsonl.zst", "c.txt"):
        pack = {"gz": gzip.compress, "st": zstandard.compress}.get(name[-2:], bytes)
        (tmp_path / name).write_bytes(pack(json_lines(str(random.Random(k).random()) for k in range(20_000))))
    seen = []
    monkeypatch.setattr(tool, "CHUNK_CHARACTERS", 100_000)
    monkeypatch.setattr(tool, "show_progress", lambda total: tool.contextmanager(lambda: iter([seen.append]))())
    assert run(tmp_path, "--extensions", "jsonl", ".txt") == 0
    assert seen == sorted(seen) and len(set(seen)) > 20
    assert seen[-1] == sum((tmp_path / name).stat().st_size for name in ("a.jsonl.gz", "b.jsonl.zst", "c.txt"))


def test_parts_are_merged(run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in "ab":
        Path(f"{name}.jsonl").write_bytes(json_lines(f"{name} {k}" for k in range(5)))
        assert run(f"{name}.jsonl", output=f"part-{name}") == 0
    assert run("a.jsonl", "b.jsonl", output="whole") == 0
    parts = sorted(map(str, Path().glob("part-*")))  # three files of each
    assert cli.main(["merge", *parts, "--output", "all"]) == 0
    for suffix in ("bin", "idx", "json"):
        assert Path(f"all.{suffix}").read_bytes() == Path(f"whole.{suffix}").read_bytes()
    told = json.loads(Path("part-b.json").read_text())
    Path("part-b.json").write_text(json.dumps({**told, "tokenizer_fingerprint": "another"}))
    for words, reason in (
        ([], "'all.bin' exists; choose another, or add --overwrite"),
        (["--overwrite"], "merge what one tokenizer wrote"),
        (["--overwrite", "--output", "part-a"], "would replace 'part-a.bin', which is the input 'part-a.bin'"),
    ):
        part = ["part-b"] * (reason.startswith("merge"))
        assert cli.main(["merge", "part-a", *part, "--output", "all", *words]) == 2
        assert reason in capsys.readouterr().err
