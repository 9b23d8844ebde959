"""Series as tokenized data: what is written, what is left out, each mistake in one line; and a run that reads it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megahp import cli
from megahp.config import Config, resolve
from megahp.data.indexed import IndexedDataset
from megahp.data.tokenizer import load_tokenizer
from megahp.errors import UserError
from megahp.parallel.layout import Layout
from megahp.series.binning import fit_tails
from megahp.series.coding import load_coding
from megahp.train.prepare import open_data, prepare

WINDOW = ("--conditioning", 12, "--horizon", 6)
RANDOM = np.random.default_rng(5)
SERIES = {
    "wave": np.sin(np.arange(60) / 3) + RANDOM.normal(scale=0.1, size=60),
    "gaps": np.where(RANDOM.uniform(size=40) < 0.2, np.nan, RANDOM.normal(size=40)),
    "short": RANDOM.normal(size=13),
}


def lines(series: dict[str, Any]) -> str:
    return "".join(
        json.dumps({"name": name, "value": [None if np.isnan(y) else y for y in values]}) + "\n"
        for name, values in series.items()
    )


Run = Callable[..., int]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    (tmp_path / "a.jsonl").write_text(lines(SERIES))

    def run(*words: object, file: str = "a.jsonl", coding: str = "a.series", output: str = "out") -> int:
        files = ["--input", tmp_path / file, "--output", tmp_path / output, "--tokenizer", tmp_path / coding]
        return cli.main(["preprocess", *map(str, (*files, *words))])

    return run


def test_every_window_is_a_document(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("--series", *WINDOW, "--levels", 5, 7, "--sub-series", 3, "--order", "backfill", "--stride", 2)
    assert run(*words) == 0
    coding, dataset = load_coding(tmp_path / "a.series"), IndexedDataset(str(tmp_path / "out"))
    assert (coding.levels, coding.sub_series, coding.order) == ((5, 7), 3, "backfill")
    windows = [np.array(list(coding.windows(values, 2))) for values in SERIES.values()]
    assert [len(each) for each in windows] == [25, 15, 1]
    tokens, scale = coding.encode(np.concatenate(windows))
    assert [dataset.tokens(n).tolist() for n in range(dataset.documents)] == tokens.tolist()
    z = scale.apply(np.concatenate(windows))
    assert coding.binning.tails == pytest.approx(fit_tails(coding.binning, [z]))
    described = json.loads((tmp_path / "out.json").read_text())
    assert described == {
        **{"tokenizer": str(tmp_path / "a.series"), "tokenizer_fingerprint": coding.fingerprint},
        **{"vocab_size": 14, "eod": 13, "bos": 13, "documents": 41, "tokens": 41 * 37, "largest_id": 13},
        "fingerprint": dataset.fingerprint,
    }
    assert "41 windows of 3 series, 1517 tokens" in capsys.readouterr().out
    # an existing coding is used, tails too, and not contradicted
    before = (tmp_path / "a.series").read_bytes()
    assert run("--series", "--overwrite", "--levels", 5, 7) == 0
    assert (tmp_path / "a.series").read_bytes() == before
    assert run("--series", "--overwrite", "--levels", 7, 5) == 2
    assert "--levels [7, 5] is not" in capsys.readouterr().err


def test_tails_may_be_given(run: Run, tmp_path: Path) -> None:
    assert run("--series", *WINDOW, "--tails", 3, 4.5) == 0
    assert load_coding(tmp_path / "a.series").binning.tails == (3.0, 4.5)


UNUSABLE = {
    "constant": ([2.0] * 40, "it is constant"),
    "one": ([*[np.nan] * 30, 1.0, *[np.nan] * 9], "it has one value"),
    "none": ([np.nan] * 40, "no value is known"),
    "late": ([*[2.0] * 30, *range(6)], "before its last 6 values, it is constant"),
    "brief": (list(range(11)), "before its last 6 values, a horizon of 6 is longer than its history of 5"),
}


@pytest.mark.parametrize("name", UNUSABLE)
def test_unusable_series_are_left_out(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    values, reason = UNUSABLE[name]
    (tmp_path / "b.jsonl").write_text(lines({name: values}))
    assert run("--series", *WINDOW, file="b.jsonl") == 2
    assert capsys.readouterr().err == f"megahp: --input holds no usable window: {name}: {reason}; correct it\n"
    assert not list(tmp_path.glob("out*")) and not (tmp_path / "a.series").exists()
    (tmp_path / "b.jsonl").write_text(lines({name: values, **SERIES}))
    assert run("--series", *WINDOW, file="b.jsonl") == 0
    assert f"left out 1 series: {reason}, the first {name}" in capsys.readouterr().out


def test_windows_of_constant_given_values_are_left_out(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "b.jsonl").write_text(lines({"step": [*[0.0] * 20, *range(1, 5)]}))
    assert run("--series", *WINDOW, file="b.jsonl") == 2  # of history too, until the horizon
    assert run("--series", "--conditioning", 12, "--horizon", 3, file="b.jsonl") == 0
    out = capsys.readouterr().out
    assert "1 windows of 1 series" in out and "left out 18 windows: given values are constant" in out


MISTAKES: dict[str, tuple[tuple[object, ...], str]] = {
    "horizon": (("--series", "--conditioning", 12), "give --conditioning and --horizon"),
    "stride": (("--series", *WINDOW, "--stride", 0), "--stride is 0"),
    "levels": (("--series", *WINDOW, "--levels", 12, 1), "at least 2 bins each"),
    "sub-series": (("--series", *WINDOW, "--sub-series", 4), "4 sub-series do not divide a horizon of 6"),
    "range": (("--series", *WINDOW, "--range", 1, 0), "must be finite and ascending"),
    "tails": (("--series", *WINDOW, "--tails", 0, 1), "must be above 0"),
    "text's": (("--series", *WINDOW, "--no-eod"), "--no-eod has no effect with --series"),
    "not series'": (WINDOW, "--conditioning goes with --series alone"),
    "neither": ((), "codes series; add --series"),
    "column": (("--series", *WINDOW, "--value-column", "y"), "has no column 'y'"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_one_line(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    words, problem = MISTAKES[name]
    assert run(*words) == 2
    error = capsys.readouterr().err
    assert problem in error and error.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl"]


def test_a_tokenizer_of_texts_is_refused(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--series", *WINDOW, coding="a.json") == 2
    assert "with --series name a *.series file" in capsys.readouterr().err


def settings(folder: Path, *words: str) -> Config:
    base: dict[str, dict[str, Any]] = {
        "data": {
            "train": [str(folder / "out")],
            "tokenizer": str(folder / "a.series"),
            "sequence_length": 55,
            "validation_fraction": 0,
        },
        "train": {"tokens": 55 * 64, "validation_samples": 0},
        "log": {"root": str(folder)},
        "model": {"layers": 1, "width": 32, "heads": 2},
    }
    return resolve.resolve([("base", base), ("words", resolve.parse_overrides(words))]).config


def test_a_run_reads_a_window_a_sample(run: Run, tmp_path: Path) -> None:
    assert run("--series", *WINDOW) == 0
    config = prepare(settings(tmp_path), Layout(), 1, False)
    assert config.model.levels == (12, 12, 12) and config.model.vocab_size == 38
    assert (config.data.eos, config.data.bos, config.data.begin) == ("37", "37", "bos")
    tokens = open_data(config).batch(np.arange(64), documents=False).tokens.numpy()
    dataset = IndexedDataset(str(tmp_path / "out"))
    windows = {tuple(dataset.tokens(n).tolist()) for n in range(dataset.documents)}
    assert {tuple(row[:-1]) for row in tokens.tolist()} <= windows and (tokens[:, [0, -1]] == 37).all()


@pytest.mark.parametrize(
    ("word", "problem"),
    [
        ("data.sequence_length=54", "a sample is a window of .*, of 55 tokens; set it to 55"),
        ("data.lengths=['1000:110']", "data.lengths: a sample is a window"),
        ("model.levels=[12,12]", r"model.levels = \[12, 12\] are not those of"),
        ("model.vocab_size=30", "less than the 38 tokens"),
    ],
)
def test_settings_that_do_not_fit_the_coding(run: Run, tmp_path: Path, word: str, problem: str) -> None:
    assert run("--series", *WINDOW) == 0
    with pytest.raises(UserError, match=problem):
        prepare(settings(tmp_path, word), Layout(), 1, False)


def test_another_coding_is_refused(run: Run, tmp_path: Path) -> None:
    assert run("--series", *WINDOW) == 0
    content = (tmp_path / "a.series").read_text()
    (tmp_path / "a.series").write_text(content.replace('"low": -0.1', '"low": -0.2'))
    with pytest.raises(UserError, match="is not the one .*out was written with"):
        prepare(settings(tmp_path), Layout(), 1, False)


def test_it_encodes_no_text(run: Run, tmp_path: Path) -> None:
    assert run("--series", *WINDOW) == 0
    tokenizer = load_tokenizer(str(tmp_path / "a.series"))
    assert tokenizer.decode([3, 37]) == "3 37"
    for encode in (tokenizer.encode, tokenizer.encode_counting, tokenizer.encode_batch):
        with pytest.raises(UserError, match="codes series, and no text"):
            encode("1.5")
    with pytest.raises(UserError, match="both are 37; omit them"):
        load_tokenizer(str(tmp_path / "a.series"), "3")
